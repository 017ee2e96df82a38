// Where token ids come from: one long sequence, read at any place. Hides file formats, decompression and
// memory maps. Sources are immutable and thread-safe; reads may block on the disk.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/types/span.h"
#include "runtime/base/status.h"

namespace shoal {

class TokenSource {
 public:
  virtual ~TokenSource() = default;

  // Tokens.
  virtual int64_t size() const = 0;
  // Every id is at least 0 and below this, by the source's format; the ids in use may all be smaller.
  virtual int64_t vocabulary_bound() const = 0;
  // Fills `out` with the ids at [offset, offset + out.size()), which must lie within the source. DATA_LOSS or
  // INVALID_ARGUMENT: a stored id is no valid token; the message names file and position.
  virtual absl::Status Read(int64_t offset, absl::Span<int32_t> out) const = 0;
};

using TokenSourcePtr = std::shared_ptr<const TokenSource>;  // Shared: splits of one source end in any order.

// The bytes of a text file (plain, .zst or .gz), held in memory. Errors as TextReader's.
absl::StatusOr<TokenSourcePtr> OpenText(const std::string& path);

// Megatron's <prefix>.bin and <prefix>.idx, mapped; all documents, one after the other. Any integer type of
// token. The index is checked as a whole first (models/data/megatron.h); ids are checked when read.
// INVALID_ARGUMENT: there is an `end_of_document`, and the first document ends with another token: files do not say how their
// documents end, and one that is not there would go unnoticed.
absl::StatusOr<TokenSourcePtr> OpenMegatron(const std::string& prefix, std::optional<int32_t> end_of_document = std::nullopt);

// `size` independent, uniform ids below `vocab_size`: id i is a function of (seed, i) alone. For benchmarks.
TokenSourcePtr RandomTokens(uint64_t seed, int64_t vocab_size, int64_t size);

// The ids at [begin, begin + size) of `source`, which must lie within it.
TokenSourcePtr Slice(TokenSourcePtr source, int64_t begin, int64_t size);

// `source`, whose reads fail with INVALID_ARGUMENT at an id of `vocab_size` or more: "NAME: token 300 at 17
// ...". `source` itself when its bound excludes that.
TokenSourcePtr CheckVocabulary(TokenSourcePtr source, int64_t vocab_size, std::string name);

}  // namespace shoal
