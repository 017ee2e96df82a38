#include "models/data/megatron.h"

#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "models/data/token_source.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr std::string_view kMagic("MMIDIDX\0\0", 9);
constexpr uint64_t kVersion = 1;
// Magic, version, type, number of sequences, number of document boundaries: the arrays after it are
// misaligned.
constexpr int64_t kHeaderBytes = 9 + 8 + 1 + 8 + 8;
// Bytes of the three arrays, per sequence (i32 length, i64 offset) and per document boundary (i64 sequence).
constexpr int64_t kBytesPerSequence = 4 + 8;
constexpr int64_t kBytesPerBoundary = 8;
constexpr int64_t kFlushBytes = 1 << 20;

template <class T>
T Load(const std::byte* bytes, int64_t index = 0) {
  T value;
  std::memcpy(&value, bytes + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

template <class T>
void Store(T value, std::string* out) {
  out->append(reinterpret_cast<const char*>(&value), sizeof(T));
}

struct Header {
  MegatronType type;
  int64_t sequences;
  int64_t boundaries;
};

absl::StatusOr<Header> ParseHeader(absl::Span<const std::byte> bytes) {
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (size < kHeaderBytes) {
    return absl::DataLossError(
        absl::StrCat("is ", size, " bytes long, but the header alone has ", kHeaderBytes));
  }
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return absl::InvalidArgumentError("magic: is not MMIDIDX: no Megatron index");
  }
  const uint64_t version = Load<uint64_t>(bytes.data() + 9);
  if (version != kVersion)
    return absl::InvalidArgumentError(absl::StrCat("version: is ", version, ", want 1"));
  const int code = Load<uint8_t>(bytes.data() + 17);
  if (code < 1 || code > 8)
    return absl::InvalidArgumentError(absl::StrCat("dtype: is ", code, ", want 1 to 8"));
  const auto type = static_cast<MegatronType>(code);
  if (type == MegatronType::kF32 || type == MegatronType::kF64) {
    return absl::InvalidArgumentError(
        absl::StrCat("dtype: is ", code, " (floating point), want an integer type"));
  }
  const uint64_t sequences = Load<uint64_t>(bytes.data() + 18);
  const uint64_t boundaries = Load<uint64_t>(bytes.data() + 26);
  // Bounded by the file's size first, so that the sums below cannot overflow.
  const uint64_t room = static_cast<uint64_t>(size - kHeaderBytes);
  if (sequences > room / kBytesPerSequence) {
    return absl::DataLossError(
        absl::StrCat("sequence count: is ", sequences, ", too many for a file of ", size, " bytes"));
  }
  if (boundaries > room / kBytesPerBoundary) {
    return absl::DataLossError(
        absl::StrCat("document count: is ", boundaries, ", too many for a file of ", size, " bytes"));
  }
  if (boundaries < 1) return absl::DataLossError("document count: is 0, want at least 1");
  const uint64_t wanted = kHeaderBytes + sequences * kBytesPerSequence + boundaries * kBytesPerBoundary;
  if (static_cast<uint64_t>(size) == wanted + sequences && sequences > 0) {
    return absl::InvalidArgumentError("sequence modes: present; multimodal datasets are not supported");
  }
  if (static_cast<uint64_t>(size) != wanted) {
    return absl::DataLossError(absl::StrCat("file size: is ", size, " bytes, want ", wanted, " for ",
                                            sequences, " sequences and ", boundaries,
                                            " document boundaries"));
  }
  return Header{type, static_cast<int64_t>(sequences), static_cast<int64_t>(boundaries)};
}

absl::StatusOr<MegatronIndex> ParseIndex(absl::Span<const std::byte> bytes) {
  SHOAL_ASSIGN_OR_RETURN(const Header header, ParseHeader(bytes));
  MegatronIndex index;
  index.type = header.type;
  const std::byte* const lengths = bytes.data() + kHeaderBytes;
  const std::byte* const offsets = lengths + 4 * header.sequences;
  const std::byte* const starts = offsets + 8 * header.sequences;
  index.sequence_lengths.resize(header.sequences);
  for (int64_t i = 0; i < header.sequences; ++i) {
    const int32_t length = Load<int32_t>(lengths, i);
    if (length < 0) return absl::DataLossError(absl::StrCat("sequence length ", i, ": is ", length));
    const int64_t offset = Load<int64_t>(offsets, i);
    const int64_t wanted = index.tokens * SizeOf(header.type);
    if (offset != wanted) {
      return absl::DataLossError(absl::StrCat("sequence offset ", i, ": is ", offset, ", want ", wanted,
                                              " after the sequences before it"));
    }
    index.sequence_lengths[i] = length;
    index.tokens += length;
  }
  index.document_starts.resize(header.boundaries);
  int64_t previous = 0;
  for (int64_t i = 0; i < header.boundaries; ++i) {
    const int64_t start = Load<int64_t>(starts, i);
    const bool first = i == 0, last = i + 1 == header.boundaries;
    if (start < previous || start > header.sequences || (first && start != 0) ||
        (last && start != header.sequences)) {
      return absl::DataLossError(absl::StrCat("document ", i, ": starts at sequence ", start,
                                              "; want 0 first, rising, ", header.sequences, " last"));
    }
    index.document_starts[i] = previous = start;
  }
  return index;
}

// The tokens of a .bin file, `T` each.
template <class T>
class MegatronTokens : public TokenSource {
 public:
  MegatronTokens(std::shared_ptr<const MappedFile> bin, int64_t size) : bin_(std::move(bin)), size_(size) {}
  int64_t size() const override { return size_; }
  int64_t vocabulary_bound() const override {
    constexpr auto kIds = static_cast<int64_t>(std::numeric_limits<int32_t>::max());
    return std::min(static_cast<int64_t>(std::numeric_limits<T>::max()), kIds) + 1;
  }
  absl::Status Read(int64_t offset, absl::Span<int32_t> out) const override {
    SHOAL_CHECK(offset >= 0 && static_cast<int64_t>(out.size()) <= size_ - offset)
        << "tokens " << offset << "+" << out.size() << " of " << size_;
    for (size_t i = 0; i < out.size(); ++i) {
      const T id = Load<T>(bin_->bytes().data(), offset + static_cast<int64_t>(i));
      if (std::cmp_less(id, 0) || std::cmp_greater(id, std::numeric_limits<int32_t>::max())) {
        return absl::DataLossError(absl::StrCat(bin_->path(), ": token ", id, " at ",
                                                offset + static_cast<int64_t>(i), " is no token id"));
      }
      out[i] = static_cast<int32_t>(id);
    }
    return absl::OkStatus();
  }

 private:
  const std::shared_ptr<const MappedFile> bin_;
  const int64_t size_;
};

TokenSourcePtr MakeTokens(MegatronType type, std::shared_ptr<const MappedFile> bin, int64_t size) {
  switch (type) {
    case MegatronType::kU8:
      return std::make_shared<MegatronTokens<uint8_t>>(std::move(bin), size);
    case MegatronType::kI8:
      return std::make_shared<MegatronTokens<int8_t>>(std::move(bin), size);
    case MegatronType::kI16:
      return std::make_shared<MegatronTokens<int16_t>>(std::move(bin), size);
    case MegatronType::kU16:
      return std::make_shared<MegatronTokens<uint16_t>>(std::move(bin), size);
    case MegatronType::kI32:
      return std::make_shared<MegatronTokens<int32_t>>(std::move(bin), size);
    case MegatronType::kI64:
      return std::make_shared<MegatronTokens<int64_t>>(std::move(bin), size);
    case MegatronType::kF32:
    case MegatronType::kF64:
      break;
  }
  SHOAL_CHECK(false) << "ParseHeader lets integer types through alone";
}

// Of the first document that has tokens.
absl::Status CheckEnd(const MegatronIndex& index, const TokenSource& tokens, int32_t end_of_document) {
  int64_t size = 0;
  for (size_t document = 0; size == 0 && document + 1 < index.document_starts.size(); ++document) {
    const auto sequence = index.sequence_lengths.begin();
    size = std::accumulate(sequence + index.document_starts[document], sequence + index.document_starts[document + 1], int64_t{0});
  }
  if (size == 0) return absl::OkStatus();
  int32_t last = 0;
  SHOAL_RETURN_IF_ERROR(tokens.Read(size - 1, absl::MakeSpan(&last, 1)));
  if (last == end_of_document) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("its first document, of ", size, " tokens, ends with token ", last, ", not with ", end_of_document));
}

}  // namespace

int64_t SizeOf(MegatronType type) {
  switch (type) {
    case MegatronType::kU8:
    case MegatronType::kI8:
      return 1;
    case MegatronType::kI16:
    case MegatronType::kU16:
      return 2;
    case MegatronType::kI32:
    case MegatronType::kF32:
      return 4;
    case MegatronType::kI64:
    case MegatronType::kF64:
      return 8;
  }
  return 0;
}

std::string_view Name(MegatronType type) {
  switch (type) {
    case MegatronType::kU8:
      return "u8";
    case MegatronType::kI8:
      return "i8";
    case MegatronType::kI16:
      return "i16";
    case MegatronType::kU16:
      return "u16";
    case MegatronType::kI32:
      return "i32";
    case MegatronType::kI64:
      return "i64";
    case MegatronType::kF32:
      return "f32";
    case MegatronType::kF64:
      return "f64";
  }
  return "unknown";
}

MegatronType MegatronTypeFor(int64_t vocab_size) {
  return vocab_size < 65500 ? MegatronType::kU16 : MegatronType::kI32;
}

absl::StatusOr<MegatronIndex> ReadMegatronIndex(const std::string& path) {
  SHOAL_ASSIGN_OR_RETURN(const std::shared_ptr<const MappedFile> file, MappedFile::Open(path));
  absl::StatusOr<MegatronIndex> index = ParseIndex(file->bytes());
  if (!index.ok()) return Annotate(index.status(), path);
  return index;
}

absl::StatusOr<TokenSourcePtr> OpenMegatron(const std::string& prefix, std::optional<int32_t> end_of_document) {
  SHOAL_ASSIGN_OR_RETURN(const MegatronIndex index, ReadMegatronIndex(prefix + ".idx"));
  SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<const MappedFile> bin, MappedFile::Open(prefix + ".bin"));
  const int64_t wanted = index.tokens * SizeOf(index.type);
  if (static_cast<int64_t>(bin->bytes().size()) != wanted) {
    return absl::DataLossError(absl::StrCat(bin->path(), ": file size: is ", bin->bytes().size(),
                                            " bytes, want ", wanted, " for the ", index.tokens, " tokens of ",
                                            prefix, ".idx"));
  }
  TokenSourcePtr tokens = MakeTokens(index.type, std::move(bin), index.tokens);
  if (end_of_document.has_value()) SHOAL_RETURN_IF_ERROR(CheckEnd(index, *tokens, *end_of_document), prefix);
  return tokens;
}

MegatronWriter::MegatronWriter(std::string prefix, int64_t vocab_size, std::unique_ptr<FileWriter> bin)
    : prefix_(std::move(prefix)),
      vocab_size_(vocab_size),
      type_(MegatronTypeFor(vocab_size)),
      bin_(std::move(bin)) {}

absl::StatusOr<std::unique_ptr<MegatronWriter>> MegatronWriter::Create(std::string prefix,
                                                                       int64_t vocab_size) {
  SHOAL_CHECK(vocab_size >= 1 && vocab_size <= int64_t{1} << 31) << vocab_size;
  constexpr int64_t kSizeUnknown = 0;
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<FileWriter> bin, FileWriter::Create(prefix + ".bin", kSizeUnknown));
  return std::unique_ptr<MegatronWriter>(new MegatronWriter(std::move(prefix), vocab_size, std::move(bin)));
}

absl::Status MegatronWriter::AddDocument(absl::Span<const int32_t> tokens) {
  if (tokens.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    return absl::InvalidArgumentError(absl::StrCat("document ", documents(), " has ", tokens.size(),
                                                   " tokens; a sequence length is an i32"));
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab_size_) {
      return absl::InvalidArgumentError(absl::StrCat("document ", documents(), ": token ", tokens[i], " at ",
                                                     i, " does not fit a vocabulary of ", vocab_size_));
    }
    if (type_ == MegatronType::kU16) {
      Store(static_cast<uint16_t>(tokens[i]), &buffer_);
    } else {
      Store(tokens[i], &buffer_);
    }
    if (static_cast<int64_t>(buffer_.size()) >= kFlushBytes) SHOAL_RETURN_IF_ERROR(Flush());
  }
  lengths_.push_back(static_cast<int32_t>(tokens.size()));
  tokens_ += static_cast<int64_t>(tokens.size());
  return absl::OkStatus();
}

absl::Status MegatronWriter::Flush() {
  SHOAL_RETURN_IF_ERROR(bin_->Append(buffer_.data(), static_cast<int64_t>(buffer_.size())));
  buffer_.clear();
  return absl::OkStatus();
}

absl::Status MegatronWriter::Finish() {
  SHOAL_RETURN_IF_ERROR(Flush());
  const std::string path = prefix_ + ".idx";
  const std::string index = Index();
  const auto bytes = static_cast<int64_t>(index.size());
  // All bytes are on their way before anything old is touched: a full disk costs nothing.
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<FileWriter> idx, FileWriter::Create(path, bytes));
  SHOAL_RETURN_IF_ERROR(idx->Append(index.data(), bytes));
  // An old index must not stand beside the new tokens, even for a moment.
  if (unlink(path.c_str()) != 0 && errno != ENOENT)
    return ErrnoStatus(errno, absl::StrCat("replacing ", path));
  SHOAL_RETURN_IF_ERROR(bin_->Commit());
  return idx->Commit();
}

std::string MegatronWriter::Index() const {
  std::string index(kMagic);
  Store(kVersion, &index);
  Store(static_cast<uint8_t>(type_), &index);
  Store(static_cast<uint64_t>(lengths_.size()), &index);
  Store(static_cast<uint64_t>(lengths_.size() + 1), &index);
  for (const int32_t length : lengths_) Store(length, &index);
  int64_t offset = 0;
  for (const int32_t length : lengths_) {
    Store(offset, &index);
    offset += length * SizeOf(type_);
  }
  for (int64_t sequence = 0; sequence <= documents(); ++sequence) Store(sequence, &index);
  return index;
}

}  // namespace shoal
