// Reads a text file piece by piece, through the decompressor that its name asks for: .zst, .gz, otherwise
// none. Hides file descriptors and the two libraries; frames (zstd) and members (gzip) may follow one
// another. One thread at a time. Errors name the file: NOT_FOUND and the like from the system, DATA_LOSS with
// the byte of the (compressed) file where damaged or cut-off data was noticed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/types/span.h"
#include "runtime/base/status.h"

namespace shoal {

class TextReader {
 public:
  static absl::StatusOr<std::unique_ptr<TextReader>> Open(const std::string& path);
  virtual ~TextReader() = default;

  // Writes the next bytes of the text to the front of `out` (not empty) and returns how many: fewer than
  // out.size() only at the end, 0 past it. Blocks on the disk.
  virtual absl::StatusOr<size_t> Read(absl::Span<char> out) = 0;
};

// The rest of the text.
absl::StatusOr<std::string> ReadAll(TextReader& reader);

// Cuts a text into lines. Line ends ("\n" or "\r\n") belong to no line; the last line needs none.
class LineReader {
 public:
  explicit LineReader(TextReader& reader);  // Borrows `reader`.

  // False at the end, and then `line` is left alone.
  absl::StatusOr<bool> Next(std::string* line);
  // Of the line that Next() gave last, counted from 1.
  int64_t number() const { return number_; }

 private:
  TextReader& reader_;
  std::string buffer_;
  size_t begin_ = 0;
  size_t end_ = 0;
  int64_t number_ = 0;
};

}  // namespace shoal
