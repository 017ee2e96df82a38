// Megatron's indexed dataset, byte exact: <prefix>.bin holds the tokens of all documents one after the other,
// <prefix>.idx their type, the length of every sequence and where documents start. Hides the layout of the
// index. Reading as a source of tokens: OpenMegatron in models/data/token_source.h.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/types/span.h"
#include "runtime/base/status.h"
#include "runtime/files/file.h"

namespace shoal {

// The codes of the index. Some forks exchanged the meanings of 6 and 7; neither is a type of tokens.
enum class MegatronType : uint8_t {
  kU8 = 1,
  kI8 = 2,
  kI16 = 3,
  kI32 = 4,
  kI64 = 5,
  kF64 = 6,
  kF32 = 7,
  kU16 = 8
};

int64_t SizeOf(MegatronType type);
std::string_view Name(MegatronType type);  // "u16"
// Megatron's choice: u16 below 65500 ids, i32 from there on.
MegatronType MegatronTypeFor(int64_t vocab_size);

struct MegatronIndex {
  MegatronType type = MegatronType::kU16;
  std::vector<int32_t> sequence_lengths;  // [S], in tokens.
  std::vector<int64_t>
      document_starts;  // [D], as sequence numbers: the first is 0, the last is S. D = documents + 1.
  int64_t tokens = 0;   // Sum of the lengths.
};

// Reads and checks an .idx file: DATA_LOSS or INVALID_ARGUMENT naming file and field when a length, an
// offset, a document or the file's size contradicts the rest.
absl::StatusOr<MegatronIndex> ReadMegatronIndex(const std::string& path);

// Writes a pair of files, one sequence per document. They appear under their names only in Finish(), the
// index last, so that a reader finds a whole pair or no index. Not thread-safe.
class MegatronWriter {
 public:
  // Replaces an old pair of that name. `vocab_size` decides the type of the tokens.
  static absl::StatusOr<std::unique_ptr<MegatronWriter>> Create(std::string prefix, int64_t vocab_size);

  // INVALID_ARGUMENT: an id outside the vocabulary, or more than 2^31 - 1 tokens. RESOURCE_EXHAUSTED: the
  // disk is full. After an error only the destructor may follow, which removes what was written.
  absl::Status AddDocument(absl::Span<const int32_t> tokens);
  // At most once, last.
  absl::Status Finish();

  MegatronType type() const { return type_; }
  int64_t documents() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t tokens() const { return tokens_; }

 private:
  MegatronWriter(std::string prefix, int64_t vocab_size, std::unique_ptr<FileWriter> bin);
  absl::Status Flush();
  std::string Index() const;  // The bytes of the .idx file.

  const std::string prefix_;
  const int64_t vocab_size_;
  const MegatronType type_;
  std::unique_ptr<FileWriter> bin_;
  std::string buffer_;
  std::vector<int32_t> lengths_;
  int64_t tokens_ = 0;
};

}  // namespace shoal
