#include "runtime/files/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "runtime/files/json.h"

namespace shoal {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

constexpr uint64_t kHeaderBytesMax = 100'000'000;                       // The reference reader's limit.
constexpr int64_t kBytesMax = std::numeric_limits<int64_t>::max() / 8;  // Counts of bits stay in range.

struct FormatType {
  std::string_view name;
  int bits;
  std::optional<DType> dtype;
};

// In the format's order, which the order of tensors in a file follows.
constexpr FormatType kTypes[] = {
    {"BOOL", 8, std::nullopt},
    {"F4", 4, std::nullopt},
    {"F6_E2M3", 6, std::nullopt},
    {"F6_E3M2", 6, std::nullopt},
    {"U8", 8, DType::kU8},
    {"I8", 8, DType::kI8},
    {"F8_E5M2", 8, std::nullopt},
    {"F8_E4M3", 8, std::nullopt},
    {"F8_E8M0", 8, std::nullopt},
    {"F8_E4M3FNUZ", 8, std::nullopt},
    {"F8_E5M2FNUZ", 8, std::nullopt},
    {"I16", 16, std::nullopt},
    {"U16", 16, std::nullopt},
    {"F16", 16, DType::kF16},
    {"BF16", 16, DType::kBF16},
    {"I32", 32, DType::kI32},
    {"U32", 32, std::nullopt},
    {"F32", 32, DType::kF32},
    {"C64", 64, std::nullopt},
    {"F64", 64, DType::kF64},
    {"I64", 64, DType::kI64},
    {"U64", 64, std::nullopt},
};

const FormatType* FindType(std::string_view name) {
  for (const FormatType& type : kTypes) {
    if (type.name == name) return &type;
  }
  return nullptr;
}

size_t TypeOrder(DType dtype) {
  for (size_t i = 0; i < std::size(kTypes); ++i) {
    if (kTypes[i].dtype == dtype) return i;
  }
  SHOAL_CHECK(false) << "no safetensors type for " << Name(dtype);
  return 0;
}

// A JSON array of integers in [0, kBytesMax].
absl::StatusOr<Shape> ParseSizes(const nlohmann::json& tensor, const char* key) {
  const auto found = tensor.find(key);
  if (found == tensor.end() || !found->is_array()) {
    return absl::InvalidArgumentError(absl::StrCat("has no array ", key));
  }
  Shape sizes;
  for (const nlohmann::json& size : *found) {
    if (!size.is_number_unsigned() || size.get<uint64_t>() > static_cast<uint64_t>(kBytesMax)) {
      return absl::InvalidArgumentError(absl::StrCat(key, " holds something else than sizes"));
    }
    sizes.push_back(size.get<int64_t>());
  }
  return sizes;
}

// Bytes of `shape`, or an error when they overflow or are no whole number.
absl::StatusOr<int64_t> BytesOf(const Shape& shape, int bits) {
  int64_t count = 1;
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(count, size, &count) || count > kBytesMax) {
      return absl::InvalidArgumentError(absl::StrCat("shape ", ShapeString(shape), " overflows"));
    }
  }
  int64_t bit_count;
  if (__builtin_mul_overflow(count, int64_t{bits}, &bit_count)) {
    return absl::InvalidArgumentError(absl::StrCat("shape ", ShapeString(shape), " overflows"));
  }
  if (bit_count % 8 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("shape ", ShapeString(shape), " does not end on a whole byte"));
  }
  return bit_count / 8;
}

absl::StatusOr<SafetensorsEntry> ParseEntry(const std::string& name, const nlohmann::json& tensor) {
  SafetensorsEntry entry;
  entry.name = name;
  if (!tensor.is_object()) return absl::InvalidArgumentError("is not described by an object");
  const auto dtype = tensor.find("dtype");
  if (dtype == tensor.end() || !dtype->is_string()) return absl::InvalidArgumentError("has no dtype");
  entry.dtype_name = dtype->get<std::string>();
  const FormatType* const type = FindType(entry.dtype_name);
  if (type == nullptr)
    return absl::InvalidArgumentError(absl::StrCat("has unknown dtype ", entry.dtype_name));
  entry.dtype = type->dtype;
  SHOAL_ASSIGN_OR_RETURN(entry.shape, ParseSizes(tensor, "shape"));
  SHOAL_ASSIGN_OR_RETURN(const Shape offsets, ParseSizes(tensor, "data_offsets"));
  if (offsets.size() != 2 || offsets[1] < offsets[0]) {
    return absl::InvalidArgumentError("data_offsets is not [begin, end] with begin <= end");
  }
  entry.begin = offsets[0];
  SHOAL_ASSIGN_OR_RETURN(entry.bytes, BytesOf(entry.shape, type->bits));
  if (offsets[1] - offsets[0] != entry.bytes) {
    return absl::InvalidArgumentError(absl::StrCat(entry.dtype_name, " ", ShapeString(entry.shape), " takes ",
                                                   entry.bytes, " bytes, data_offsets give it ",
                                                   offsets[1] - offsets[0]));
  }
  return entry;
}

absl::StatusOr<std::map<std::string, std::string>> ParseMetadata(const nlohmann::json& metadata) {
  std::map<std::string, std::string> result;
  if (!metadata.is_object()) return absl::InvalidArgumentError("__metadata__ is not an object");
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) {
      return absl::InvalidArgumentError(absl::StrCat("__metadata__: ", key, " is not a string"));
    }
    result[key] = value.get<std::string>();
  }
  return result;
}

// The header's text. The only place that trusts the size in the file's first bytes, after checking it.
absl::StatusOr<std::string_view> HeaderText(absl::Span<const std::byte> bytes) {
  if (bytes.size() < 8) {
    return absl::InvalidArgumentError(absl::StrCat("only ", bytes.size(), " bytes, no safetensors header"));
  }
  uint64_t size;
  std::memcpy(&size, bytes.data(), sizeof size);
  if (size > kHeaderBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("header of ", size, " bytes is above ", kHeaderBytesMax,
                                                   " (is it a safetensors file?)"));
  }
  if (size > bytes.size() - 8) {
    return absl::InvalidArgumentError(
        absl::StrCat("header of ", size, " bytes in a file of ", bytes.size(), " bytes: truncated?"));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, size);
  if (text.empty() || text.front() != '{') return absl::InvalidArgumentError("header does not start with {");
  return text;
}

absl::Status CheckLayout(const std::vector<SafetensorsEntry>& entries, int64_t data_bytes) {
  int64_t end = 0;
  for (const SafetensorsEntry& entry : entries) {
    if (entry.begin != end) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensor ", entry.name, ": begins at byte ", entry.begin,
          entry.begin < end ? ", inside the one before, which ends at " : ", leaving a hole after byte ",
          end));
    }
    end = entry.begin + entry.bytes;
    if (end > data_bytes) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", entry.name, ": ends at byte ", end, " of ",
                                                     data_bytes, " bytes of data: truncated?"));
    }
  }
  if (end != data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensors end at byte ", end, ", but there are ", data_bytes, " bytes of data"));
  }
  return absl::OkStatus();
}

// IEEE half to float, exactly.
float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

template <class From, class To, class Convert>
void ConvertEach(const std::byte* from, void* to, int64_t count, Convert convert) {
  To* const out = static_cast<To*>(to);
  for (int64_t i = 0; i < count; ++i) {
    From value;
    std::memcpy(&value, from + i * static_cast<int64_t>(sizeof(From)), sizeof value);
    out[i] = convert(value);
  }
}

// Specs in the order of the reference writer.
std::vector<size_t> FileOrder(const std::vector<SafetensorsSpec>& specs) {
  std::vector<size_t> order(specs.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const size_t type_a = TypeOrder(specs[a].dtype);
    const size_t type_b = TypeOrder(specs[b].dtype);
    return type_a != type_b ? type_a > type_b : specs[a].name < specs[b].name;
  });
  return order;
}

// The size field, the header and its padding to a multiple of 8. INVALID_ARGUMENT: a name that no header can
// hold.
absl::StatusOr<std::string> HeaderBytes(const std::vector<SafetensorsSpec>& specs,
                                        const std::vector<size_t>& order,
                                        const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  // Beside the header: looking a key up in ordered_json takes time linear in its keys.
  std::vector<std::pair<std::string, nlohmann::ordered_json>> entries;
  int64_t offset = 0;
  const std::string* previous = nullptr;
  for (const size_t index : order) {
    const SafetensorsSpec& spec = specs[index];
    if (spec.name == "__metadata__" || (previous != nullptr && *previous == spec.name)) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", spec.name, ": the name is taken"));
    }
    previous = &spec.name;
    const int64_t end = offset + ElementCount(spec.shape) * SizeOf(spec.dtype);
    nlohmann::ordered_json entry;
    entry["dtype"] = std::string(SafetensorsName(spec.dtype));
    entry["shape"] = std::vector<int64_t>(spec.shape.begin(), spec.shape.end());
    entry["data_offsets"] = {offset, end};
    entries.emplace_back(spec.name, std::move(entry));
    offset = end;
  }
  for (auto& entry : entries) header.get_ref<nlohmann::ordered_json::object_t&>().push_back(std::move(entry));
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception& error) {  // A name that is not UTF-8.
    return absl::InvalidArgumentError(error.what());
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  if (text.size() > kHeaderBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("header of ", text.size(), " bytes is above ", kHeaderBytesMax));
  }
  const uint64_t size = text.size();
  text.insert(0, reinterpret_cast<const char*>(&size), sizeof size);
  return text;
}

}  // namespace

std::string_view SafetensorsName(DType dtype) { return kTypes[TypeOrder(dtype)].name; }

absl::Status ConvertElements(const std::byte* from, DType from_type, void* to, DType to_type, int64_t count) {
  if (from_type == to_type) {
    if (count > 0) std::memcpy(to, from, static_cast<size_t>(count * SizeOf(to_type)));
    return absl::OkStatus();
  }
  if (to_type == DType::kF32 && from_type == DType::kBF16) {
    ConvertEach<BFloat16, float>(from, to, count, [](BFloat16 value) { return static_cast<float>(value); });
  } else if (to_type == DType::kF32 && from_type == DType::kF16) {
    ConvertEach<uint16_t, float>(from, to, count, HalfToFloat);
  } else if (to_type == DType::kF32 && from_type == DType::kF64) {
    ConvertEach<double, float>(from, to, count, [](double value) { return static_cast<float>(value); });
  } else if (to_type == DType::kBF16 && from_type == DType::kF32) {
    ConvertEach<float, BFloat16>(from, to, count, [](float value) { return BFloat16(value); });
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("no conversion from ", AbslSv(Name(from_type)), " to ", AbslSv(Name(to_type))));
  }
  return absl::OkStatus();
}

SafetensorsFile::SafetensorsFile(std::shared_ptr<const MappedFile> file, size_t data_begin,
                                 std::vector<SafetensorsEntry> entries,
                                 std::map<std::string, std::string> metadata)
    : file_(std::move(file)),
      data_begin_(data_begin),
      entries_(std::move(entries)),
      metadata_(std::move(metadata)) {
  for (size_t i = 0; i < entries_.size(); ++i) index_[entries_[i].name] = i;
}

absl::StatusOr<std::shared_ptr<const SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<const MappedFile> file, MappedFile::Open(path));
  SHOAL_ASSIGN_OR_RETURN(const std::string_view text, HeaderText(file->bytes()), path);
  SHOAL_ASSIGN_OR_RETURN(const nlohmann::json header, ParseJson(text, path));
  std::vector<SafetensorsEntry> entries;
  std::map<std::string, std::string> metadata;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      SHOAL_ASSIGN_OR_RETURN(metadata, ParseMetadata(value), path);
    } else {
      SHOAL_ASSIGN_OR_RETURN(SafetensorsEntry entry, ParseEntry(name, value), path, ": tensor ", name);
      entries.push_back(std::move(entry));
    }
  }
  std::sort(entries.begin(), entries.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.bytes < b.bytes;  // Empty ones before the next.
  });
  const size_t data_begin = 8 + text.size();
  SHOAL_RETURN_IF_ERROR(CheckLayout(entries, static_cast<int64_t>(file->bytes().size() - data_begin)), path);
  return std::shared_ptr<const SafetensorsFile>(
      new SafetensorsFile(std::move(file), data_begin, std::move(entries), std::move(metadata)));
}

const SafetensorsEntry* SafetensorsFile::Find(std::string_view name) const {
  const auto found = index_.find(AbslSv(name));
  return found == index_.end() ? nullptr : &entries_[found->second];
}

absl::Span<const std::byte> SafetensorsFile::Bytes(const SafetensorsEntry& entry) const {
  return file_->bytes().subspan(data_begin_ + static_cast<size_t>(entry.begin),
                                static_cast<size_t>(entry.bytes));
}

absl::Status SafetensorsFile::Read(const std::string& name, int64_t row_begin, const Tensor& out) const {
  const SafetensorsEntry* const entry = Find(name);
  if (entry == nullptr) return absl::NotFoundError(absl::StrCat(path(), ": no tensor ", name));
  const auto fail = [&](const auto&... why) {
    return absl::InvalidArgumentError(absl::StrCat(path(), ": tensor ", name, ": ", why...));
  };
  if (!entry->dtype.has_value()) return fail("dtype ", entry->dtype_name, " cannot be read");
  const Shape& have = entry->shape;
  const Shape& want = out.shape();
  bool fits = have.size() == want.size() && row_begin >= 0;
  for (size_t axis = 1; fits && axis < have.size(); ++axis) fits = have[axis] == want[axis];
  if (fits && !have.empty()) fits = want[0] <= have[0] && row_begin <= have[0] - want[0];
  if (fits && have.empty()) fits = row_begin == 0;
  if (!fits) {
    return fail("has shape ", ShapeString(have), ", wanted is ", ShapeString(want), " from row ", row_begin);
  }
  const int64_t row_elements = have.empty() || want[0] == 0 ? 0 : out.elements() / want[0];
  const std::byte* const from = Bytes(*entry).data() + row_begin * row_elements * SizeOf(*entry->dtype);
  SHOAL_RETURN_IF_ERROR(ConvertElements(from, *entry->dtype, out.raw(), out.dtype(), out.elements()), path(),
                        ": tensor ", name);
  return absl::OkStatus();
}

absl::StatusOr<SafetensorsSet> SafetensorsSet::Open(const std::string& path) {
  SafetensorsSet set;
  set.path_ = path;
  if (path.size() < 5 || path.compare(path.size() - 5, 5, ".json") != 0) {
    SHOAL_ASSIGN_OR_RETURN(const std::shared_ptr<const SafetensorsFile> file, SafetensorsFile::Open(path));
    for (const SafetensorsEntry& entry : file->entries()) set.items_[entry.name] = {file, &entry};
    return set;
  }
  SHOAL_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  SHOAL_ASSIGN_OR_RETURN(const nlohmann::json index, ParseJson(text, path));
  const auto fail = [&](const auto&... why) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", why...));
  };
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return fail("no object weight_map");
  }
  const size_t slash = path.find_last_of('/');
  const std::string folder = slash == std::string::npos ? "" : path.substr(0, slash + 1);
  std::map<std::string, std::shared_ptr<const SafetensorsFile>> files;
  for (const auto& [name, file_name] : index["weight_map"].items()) {
    if (!file_name.is_string()) return fail("weight_map: ", name, ": not a file name");
    const std::string file = file_name.get<std::string>();
    // An index may come from anywhere: it shall not reach beyond its own folder.
    if (file.empty() || file.find('/') != std::string::npos || file == "." || file == "..") {
      return fail("weight_map: ", name, ": not a file name: ", file);
    }
    auto& opened = files[file];
    if (opened == nullptr) {
      SHOAL_ASSIGN_OR_RETURN(opened, SafetensorsFile::Open(folder + file), path);
    }
    const SafetensorsEntry* const entry = opened->Find(name);
    if (entry == nullptr) return fail("weight_map: ", file, " does not hold tensor ", name);
    set.items_[name] = {opened, entry};
  }
  for (const auto& [file, opened] : files) {
    for (const SafetensorsEntry& entry : opened->entries()) {
      const auto item = set.items_.find(entry.name);
      if (item == set.items_.end() || item->second.file != opened) {
        return fail("weight_map does not give tensor ", entry.name, " to ", file, ", which holds it");
      }
    }
  }
  return set;
}

absl::Status SafetensorsSet::Read(const std::string& name, int64_t row_begin, const Tensor& out) const {
  const auto found = items_.find(name);
  if (found == items_.end()) return absl::NotFoundError(absl::StrCat(path_, ": no tensor ", name));
  return found->second.file->Read(name, row_begin, out);
}

absl::StatusOr<int64_t> WriteSafetensors(const std::string& path, const std::vector<SafetensorsSpec>& specs,
                                         const std::map<std::string, std::string>& metadata,
                                         const std::function<absl::StatusOr<Tensor>(size_t)>& source,
                                         DiskFaults* faults) {
  const std::vector<size_t> order = FileOrder(specs);
  SHOAL_ASSIGN_OR_RETURN(const std::string header, HeaderBytes(specs, order, metadata), path);
  int64_t total = static_cast<int64_t>(header.size());
  for (const SafetensorsSpec& spec : specs) total += ElementCount(spec.shape) * SizeOf(spec.dtype);
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<FileWriter> writer, FileWriter::Create(path, total, faults));
  SHOAL_RETURN_IF_ERROR(writer->Append(header.data(), static_cast<int64_t>(header.size())));
  for (const size_t index : order) {
    const SafetensorsSpec& spec = specs[index];
    SHOAL_ASSIGN_OR_RETURN(const Tensor tensor, source(index), "writing ", path, ": tensor ", spec.name);
    SHOAL_CHECK(tensor.shape() == spec.shape && tensor.dtype() == spec.dtype) << spec.name;
    SHOAL_RETURN_IF_ERROR(writer->Append(tensor.raw(), tensor.bytes()));
  }
  SHOAL_RETURN_IF_ERROR(writer->Commit());
  return total;
}

}  // namespace shoal
