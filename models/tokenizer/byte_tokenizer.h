// The tokenizer of a byte vocabulary: a token is one byte of the text, its id the byte's value, 0 to 255. Any
// text has tokens and comes back exactly. Pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/types/span.h"
#include "runtime/base/status.h"

namespace shoal {

inline constexpr int32_t kByteVocabulary = 256;

// Appends the tokens of `text` to `ids`.
inline void EncodeBytes(std::string_view text, std::vector<int32_t>* ids) {
  ids->reserve(ids->size() + text.size());
  for (const char c : text) ids->push_back(static_cast<unsigned char>(c));
}

// INVALID_ARGUMENT: an id is no byte.
inline absl::StatusOr<std::string> DecodeBytes(absl::Span<const int32_t> ids) {
  std::string text;
  text.reserve(ids.size());
  for (const int32_t id : ids) {
    if (id < 0 || id >= kByteVocabulary) {
      return absl::InvalidArgumentError(absl::StrCat("token ", id, " at ", text.size(), " is not a byte"));
    }
    text.push_back(static_cast<char>(id));
  }
  return text;
}

}  // namespace shoal
