#include "runtime/files/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "runtime/files/faulty_disk.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using testing::TempDir;

// A file with this header and data, whatever they claim.
std::string FileOf(std::string_view header, std::string_view data) {
  const uint64_t size = header.size();
  std::string file(reinterpret_cast<const char*>(&size), sizeof size);
  file.append(header);
  file.append(data);
  return file;
}

absl::StatusOr<std::shared_ptr<const SafetensorsFile>> OpenBytes(const TempDir& folder,
                                                                 std::string_view bytes) {
  SHOAL_RETURN_IF_ERROR(WriteFileAtomic(folder / "t.safetensors", bytes));
  return SafetensorsFile::Open(folder / "t.safetensors");
}

std::string ErrorOf(std::string_view header, std::string_view data) {
  const TempDir folder;
  const absl::Status status = OpenBytes(folder, FileOf(header, data)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << header;
  EXPECT_THAT(std::string(status.message()), HasSubstr("t.safetensors"));
  return std::string(status.message());
}

Tensor Filled(Shape shape, float first) {
  Tensor tensor = Empty(std::move(shape), DType::kF32);
  std::iota(tensor.span<float>().begin(), tensor.span<float>().end(), first);
  return tensor;
}

TEST(Safetensors, LegalFilesOpen) {
  const TempDir folder;
  const auto file = *OpenBytes(
      folder,
      FileOf(R"({"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"empty":{"dtype":"I64",)"
             R"("shape":[0,7],"data_offsets":[8,8]},"a":{"dtype":"F4","shape":[3,2],"data_offsets":[8,11]},)"
             R"("s":{"shape":[],"data_offsets":[11,12],"dtype":"U8"},"__metadata__":{"format":"pt"}}   )",
             std::string("\0\0\x80\x3f\0\0\0\x40???\x07", 12)));
  EXPECT_EQ(file->metadata().at("format"), "pt");
  ASSERT_EQ(file->entries().size(), 4u);
  EXPECT_EQ(file->entries()[0].name, "b");
  EXPECT_EQ(file->Find("a")->dtype_name, "F4");
  EXPECT_EQ(file->Find("nothing"), nullptr);

  const Tensor rows = Empty({1, 1}, DType::kF32);
  ASSERT_TRUE(file->Read("b", 1, rows).ok());
  EXPECT_EQ(rows.data<float>()[0], 2.0f);
  const Tensor scalar = Empty(Shape{}, DType::kU8);
  ASSERT_TRUE(file->Read("s", 0, scalar).ok());
  EXPECT_EQ(scalar.data<uint8_t>()[0], 7);
  EXPECT_TRUE(file->Read("empty", 0, Empty({0, 7}, DType::kI64)).ok());
}

TEST(Safetensors, ReadsThatDoNotFitAreRefused) {
  const TempDir folder;
  const auto file = *OpenBytes(folder, FileOf(R"({"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
                                              R"("q":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[8,9]}})",
                                              "123456789"));
  const auto code = [&](const char* name, int64_t row, Shape shape, DType dtype) {
    const absl::Status status = file->Read(name, row, Zeros(std::move(shape), dtype));
    EXPECT_THAT(std::string(status.message()), HasSubstr(name));
    return status.code();
  };
  EXPECT_EQ(code("c", 0, {2, 1}, DType::kF32), absl::StatusCode::kNotFound);
  EXPECT_EQ(code("b", 1, {2, 1}, DType::kF32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("b", -1, {1, 1}, DType::kF32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("b", INT64_MAX, {1, 1}, DType::kF32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("b", 0, {2}, DType::kF32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("b", 0, {2, 2}, DType::kF32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("b", 0, {2, 1}, DType::kI32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("q", 0, {1}, DType::kF32), absl::StatusCode::kInvalidArgument);
}

TEST(Safetensors, IllegalHeadersAreRefusedWithTheReason) {
  EXPECT_THAT(ErrorOf("", ""), HasSubstr("does not start with {"));
  EXPECT_THAT(ErrorOf("[]", ""), HasSubstr("does not start with {"));
  EXPECT_THAT(ErrorOf(" {}", ""), HasSubstr("does not start with {"));
  EXPECT_THAT(ErrorOf("{]", ""), HasSubstr("not valid JSON"));
  EXPECT_THAT(ErrorOf("{}x", ""), HasSubstr("not valid JSON"));
  EXPECT_THAT(ErrorOf("{}", "x"), HasSubstr("1 bytes of data"));
  const auto one = [](std::string_view entry) {
    return ErrorOf(absl::StrCat("{\"w\":", AbslSv(entry), "}"), "12345678");
  };
  EXPECT_THAT(one("7"), HasSubstr("tensor w"));
  EXPECT_THAT(one(R"({"shape":[2],"data_offsets":[0,8]})"), HasSubstr("no dtype"));
  EXPECT_THAT(one(R"({"dtype":"F31","shape":[2],"data_offsets":[0,8]})"), HasSubstr("unknown dtype F31"));
  EXPECT_THAT(one(R"({"dtype":"F32","data_offsets":[0,8]})"), HasSubstr("no array shape"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[2]})"), HasSubstr("no array data_offsets"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"), HasSubstr("shape holds"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), HasSubstr("shape holds"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]})"),
              HasSubstr("shape holds"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]})"),
              HasSubstr("overflows"));
  EXPECT_THAT(one(R"({"dtype":"F64","shape":[1152921504606846975],"data_offsets":[0,8]})"),
              HasSubstr("overflows"));
  EXPECT_THAT(one(R"({"dtype":"F4","shape":[3],"data_offsets":[0,8]})"), HasSubstr("whole byte"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,9]})"), HasSubstr("[begin, end]"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), HasSubstr("[begin, end]"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})"), HasSubstr("takes 8 bytes"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[3],"data_offsets":[0,12]})"), HasSubstr("truncated"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})"), HasSubstr("8 bytes of data"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"), HasSubstr("hole"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{})"), HasSubstr("stands twice"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"a":1})"),
              HasSubstr("a is not a string"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                  R"("v":{"dtype":"F32","shape":[1],"data_offsets":[4,8]})"),
              HasSubstr("inside the one before"));
}

TEST(Safetensors, HeaderSizesThatLieAreRefused) {
  const TempDir folder;
  const auto error = [&](uint64_t size, std::string_view rest) {
    std::string bytes(reinterpret_cast<const char*>(&size), sizeof size);
    bytes.append(rest);
    const absl::Status status = OpenBytes(folder, bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(error(UINT64_MAX, "{}"), HasSubstr("above 100000000"));
  EXPECT_THAT(error(100'000'001, "{}"), HasSubstr("above 100000000"));
  EXPECT_THAT(error(100'000'000, "{}"), HasSubstr("truncated"));
  EXPECT_THAT(error(3, "{}"), HasSubstr("truncated"));
  EXPECT_THAT(std::string(OpenBytes(folder, "1234567").status().message()), HasSubstr("only 7 bytes"));
}

TEST(Safetensors, WriterFollowsTheReferenceByteForByte) {
  const TempDir folder;
  const Tensor values = Filled({2}, 1);
  const Tensor words = Empty({1}, DType::kI64);
  words.data<int64_t>()[0] = 5;
  const std::vector<SafetensorsSpec> specs = {
      {"b", DType::kF32, {2}}, {"w", DType::kI64, {1}}, {"a\"", DType::kF32, {2}}};
  const auto written =
      WriteSafetensors(folder / "f", specs, {{"format", "pt"}},
                       [&](size_t i) -> absl::StatusOr<Tensor> { return i == 1 ? words : values; });
  ASSERT_TRUE(written.ok()) << written.status();
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"w":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
      R"("a\"":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},"b":{"dtype":"F32","shape":[2],"data_offsets":[16,24]}})";
  const std::string padded = header + std::string((8 - header.size() % 8) % 8, ' ');
  const std::string one_two("\0\0\x80\x3f\0\0\0\x40", 8);
  const std::string five("\5\0\0\0\0\0\0\0", 8);
  EXPECT_EQ(*ReadFile(folder / "f"), FileOf(padded, five + one_two + one_two));
  EXPECT_EQ(*written, *FileBytes(folder / "f"));
}

TEST(Safetensors, GoldenFilesComeBackByteForByte) {
  const TempDir folder;
  for (const char* model : {"mixtral_a", "mixtral_b"}) {
    const std::string path = absl::StrCat(SHOAL_SOURCE_DIR "/tests/oracle/", model, "/init.safetensors");
    const auto opened = SafetensorsFile::Open(path);
    ASSERT_TRUE(opened.ok()) << opened.status();
    const SafetensorsFile& file = **opened;
    std::vector<SafetensorsSpec> specs;
    for (const SafetensorsEntry& entry : file.entries())
      specs.push_back({entry.name, *entry.dtype, entry.shape});
    const auto written =
        WriteSafetensors(folder / "f", specs, file.metadata(), [&](size_t i) -> absl::StatusOr<Tensor> {
          Tensor tensor = Empty(specs[i].shape, specs[i].dtype);
          SHOAL_RETURN_IF_ERROR(file.Read(specs[i].name, 0, tensor));
          return tensor;
        });
    ASSERT_TRUE(written.ok()) << written.status();
    EXPECT_TRUE(*ReadFile(folder / "f") == *ReadFile(path)) << path;
    const auto batches =
        SafetensorsFile::Open(absl::StrCat(SHOAL_SOURCE_DIR "/tests/oracle/", model, "/batches.safetensors"));
    ASSERT_TRUE(batches.ok()) << batches.status();
    EXPECT_EQ((*batches)->Find("batches")->dtype, DType::kI32);
  }
}

TEST(Safetensors, NamesThatClashAreRefused) {
  const TempDir folder;
  const auto write = [&](const char* a, const char* b) {
    return WriteSafetensors(folder / "f", {{a, DType::kF32, {1}}, {b, DType::kF32, {1}}}, {},
                            [&](size_t) -> absl::StatusOr<Tensor> { return Filled({1}, 0); })
        .status()
        .code();
  };
  EXPECT_EQ(write("a", "a"), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(write("a", "__metadata__"), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(write("a", "\xff"), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(write("a", "b"), absl::StatusCode::kOk);
}

TEST(Safetensors, FullDiskAtAnyWriteLeavesNoFile) {
  for (int at = 0; at < 3; ++at) {
    const TempDir folder;
    FaultyDisk disk(FaultyDisk::Kind::kFull, at);
    const auto written = WriteSafetensors(
        folder / "f", {{"a", DType::kF32, {9}}, {"b", DType::kF32, {9}}}, {},
        [&](size_t) -> absl::StatusOr<Tensor> { return Filled({9}, 0); }, &disk);
    EXPECT_EQ(written.status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_TRUE(disk.failed());
    EXPECT_TRUE(ListFolder(folder.path())->empty());
  }
}

TEST(Safetensors, HalfAndBrainFloatsBecomeTheirExactValue) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    float got;
    ASSERT_TRUE(
        ConvertElements(reinterpret_cast<const std::byte*>(&half), DType::kF16, &got, DType::kF32, 1).ok());
    const int exponent = (half >> 10) & 31;
    const double mantissa = half & 1023;
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(got), mantissa != 0) << bits;
      EXPECT_EQ(std::isinf(got), mantissa == 0) << bits;
    } else {
      const double magnitude =
          exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      EXPECT_EQ(std::fabs(got), magnitude) << bits;
    }
    EXPECT_EQ(std::signbit(got), (half & 0x8000) != 0) << bits;
    ASSERT_TRUE(
        ConvertElements(reinterpret_cast<const std::byte*>(&half), DType::kBF16, &got, DType::kF32, 1).ok());
    const uint32_t word = bits << 16;
    EXPECT_EQ(std::memcmp(&got, &word, 4), 0) << bits;
  }
}

// Any bytes at all: opening ends in an error or in a file all of whose tensors can be read within the map.
TEST(Safetensors, DamagedFilesNeverReadBeyondTheFile) {
  const TempDir folder;
  const std::string good = FileOf(
      R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"I64","shape":[1],"data_offsets":[24,32]},)"
      R"("__metadata__":{"k":"v"}})",
      std::string(32, 'd'));
  const uint64_t seed = ::testing::UnitTest::GetInstance()->random_seed() + 20'260'101;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 random(seed);
  const auto below = [&](size_t bound) { return static_cast<size_t>(random() % bound); };
  constexpr std::string_view kTokens[] = {"{",     "}",     "[",          "]",       ",",
                                          ":",     "\"a\"", "\"shape\"",  "0",       "24",
                                          "1e400", "-1",    "4294967296", "\\ud800", "F4"};
  int opened_count = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    std::string bytes = good;
    const size_t changes = 1 + below(3);
    for (size_t change = 0; change < changes && !bytes.empty(); ++change) {
      const size_t at = below(bytes.size());
      switch (below(5)) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
          break;
        case 2:
          bytes.resize(at);
          break;
        case 3:
          bytes.insert(at, kTokens[below(std::size(kTokens))]);
          break;
        default:
          bytes.erase(at, 1 + below(8));
          break;
      }
      // Half of the time the size field tells the truth again, so that damage reaches the parser and its
      // checks.
      if (below(2) == 0 && bytes.size() > 40) {
        const uint64_t size = bytes.size() - 40;
        std::memcpy(bytes.data(), &size, sizeof size);
      }
    }
    const auto opened = OpenBytes(folder, bytes);
    if (!opened.ok()) {
      EXPECT_EQ(opened.status().code(), absl::StatusCode::kInvalidArgument) << opened.status();
      continue;
    }
    ++opened_count;
    int64_t total = 0;
    for (const SafetensorsEntry& entry : (*opened)->entries()) {
      total += static_cast<int64_t>((*opened)->Bytes(entry).size());
      unsigned sum = 0;
      for (const std::byte byte : (*opened)->Bytes(entry)) sum += static_cast<unsigned>(byte);
      EXPECT_GE(sum, 0u);
    }
    EXPECT_LT(total, static_cast<int64_t>(bytes.size()));
  }
  EXPECT_GT(opened_count, 50);  // Otherwise the trials never got past the first check.
}

class SafetensorsIndex : public ::testing::Test {
 protected:
  void Write(const char* file, const std::vector<std::string>& names) {
    std::vector<SafetensorsSpec> specs;
    for (const std::string& name : names) specs.push_back({name, DType::kF32, {2}});
    ASSERT_TRUE(WriteSafetensors(folder_ / file, specs, {}, [&](size_t i) -> absl::StatusOr<Tensor> {
                  return Filled({2}, static_cast<float>(specs[i].name[0]));
                }).ok());
  }
  absl::StatusOr<SafetensorsSet> Open(std::string_view weight_map) {
    const std::string path = folder_ / "model.safetensors.index.json";
    SHOAL_RETURN_IF_ERROR(WriteFileAtomic(
        path, absl::StrCat("{\"metadata\":{\"total_size\":24},\"weight_map\":", AbslSv(weight_map), "}")));
    return SafetensorsSet::Open(path);
  }
  const TempDir folder_;
};

TEST_F(SafetensorsIndex, TensorsOfAllFilesAreFound) {
  Write("1.safetensors", {"a", "b"});
  Write("2.safetensors", {"c"});
  const auto set = Open(R"({"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"})");
  ASSERT_TRUE(set.ok()) << set.status();
  const Tensor out = Empty({2}, DType::kF32);
  ASSERT_TRUE(set->Read("c", 0, out).ok());
  EXPECT_EQ(out.data<float>()[1], 'c' + 1.0f);
  EXPECT_EQ(set->Read("d", 0, out).code(), absl::StatusCode::kNotFound);
}

TEST_F(SafetensorsIndex, DisagreementOfIndexAndFilesIsNamed) {
  Write("1.safetensors", {"a", "b"});
  Write("2.safetensors", {"c"});
  const auto error = [&](std::string_view weight_map) {
    return std::string(Open(weight_map).status().message());
  };
  EXPECT_THAT(error(R"({"a":"1.safetensors"})"), HasSubstr("tensor b"));
  EXPECT_THAT(error(R"({"a":"1.safetensors","b":"2.safetensors"})"), HasSubstr("does not hold tensor b"));
  EXPECT_THAT(error(R"({"a":"3.safetensors"})"), HasSubstr("3.safetensors"));
  EXPECT_THAT(error(R"({"a":"../1.safetensors"})"), HasSubstr("not a file name"));
  EXPECT_THAT(error(R"({"a":7})"), HasSubstr("not a file name"));
  EXPECT_THAT(error("[]"), HasSubstr("weight_map"));
}

}  // namespace
}  // namespace shoal
