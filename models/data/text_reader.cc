#include "models/data/text_reader.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr size_t kBufferBytes = 256 * 1024;

// The bytes of the file as they are.
class PlainReader : public TextReader {
 public:
  PlainReader(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}
  ~PlainReader() override { close(fd_); }

  absl::StatusOr<size_t> Read(absl::Span<char> out) override {
    size_t done = 0;
    while (done < out.size()) {
      const ssize_t count = read(fd_, out.data() + done, out.size() - done);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return ErrnoStatus(errno, absl::StrCat("reading ", path_));
      if (count == 0) break;
      done += static_cast<size_t>(count);
    }
    offset_ += static_cast<int64_t>(done);
    return done;
  }

  const std::string& path() const { return path_; }
  int64_t offset() const { return offset_; }

 private:
  const std::string path_;
  const int fd_;
  int64_t offset_ = 0;
};

// What the two decompressors share: the buffer of compressed bytes and when to fill it.
class PackedReader : public TextReader {
 public:
  PackedReader(std::unique_ptr<PlainReader> file, std::string_view format)
      : file_(std::move(file)), format_(format), buffer_(kBufferBytes) {}

  absl::StatusOr<size_t> Read(absl::Span<char> out) override {
    size_t done = 0;
    while (done < out.size()) {
      if (input_.empty() && !output_pending_) {
        SHOAL_ASSIGN_OR_RETURN(const size_t count, file_->Read(absl::MakeSpan(buffer_)));
        if (count == 0) {
          if (open_) return Damage("the data end in the middle");
          break;
        }
        input_ = absl::MakeConstSpan(buffer_).first(count);
      }
      const absl::Span<char> rest = out.subspan(done);
      SHOAL_ASSIGN_OR_RETURN(const Progress progress, Decompress(input_, rest));
      input_.remove_prefix(progress.consumed);
      done += progress.produced;
      open_ = !progress.finished;
      // A full output may have left more inside the library, which comes out without further input.
      output_pending_ = open_ && progress.produced == rest.size();
    }
    return done;
  }

 protected:
  struct Progress {
    size_t consumed = 0;
    size_t produced = 0;
    bool finished = false;  // At the end of a frame or member: the file may end here.
  };
  virtual absl::StatusOr<Progress> Decompress(absl::Span<const char> in, absl::Span<char> out) = 0;

  absl::Status Damage(std::string_view why) const {
    const int64_t at = file_->offset() - static_cast<int64_t>(input_.size());
    return absl::DataLossError(absl::StrCat(file_->path(), ": damaged ", AbslSv(format_), " data near byte ",
                                            at, ": ", AbslSv(why)));
  }

 private:
  const std::unique_ptr<PlainReader> file_;
  const std::string_view format_;
  std::vector<char> buffer_;
  absl::Span<const char> input_;
  bool output_pending_ = false;
  bool open_ = true;  // An empty file holds no frame: damaged too.
};

class ZstdReader : public PackedReader {
 public:
  explicit ZstdReader(std::unique_ptr<PlainReader> file)
      : PackedReader(std::move(file), "zstd"), stream_(ZSTD_createDStream()) {}
  ~ZstdReader() override { ZSTD_freeDStream(stream_); }

 private:
  absl::StatusOr<Progress> Decompress(absl::Span<const char> in, absl::Span<char> out) override {
    ZSTD_inBuffer input = {in.data(), in.size(), 0};
    ZSTD_outBuffer output = {out.data(), out.size(), 0};
    const size_t result = ZSTD_decompressStream(stream_, &output, &input);
    if (ZSTD_isError(result)) return Damage(ZSTD_getErrorName(result));
    return Progress{input.pos, output.pos, result == 0};
  }

  ZSTD_DStream* const stream_;
};

class GzipReader : public PackedReader {
 public:
  explicit GzipReader(std::unique_ptr<PlainReader> file) : PackedReader(std::move(file), "gzip") {
    constexpr int kGzipWrapper = 16;
    SHOAL_CHECK_EQ(inflateInit2(&stream_, MAX_WBITS + kGzipWrapper), Z_OK);
  }
  ~GzipReader() override { inflateEnd(&stream_); }

 private:
  absl::StatusOr<Progress> Decompress(absl::Span<const char> in, absl::Span<char> out) override {
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(in.data()));
    stream_.avail_in = static_cast<uInt>(in.size());
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(std::min(out.size(), size_t{1} << 30));
    const size_t offered = stream_.avail_out;
    const int result = inflate(&stream_, Z_NO_FLUSH);
    // Z_BUF_ERROR: nothing to do without more input, no failure.
    if (result != Z_OK && result != Z_STREAM_END && result != Z_BUF_ERROR) {
      return Damage(stream_.msg != nullptr ? stream_.msg : zError(result));
    }
    const Progress progress = {in.size() - stream_.avail_in, offered - stream_.avail_out,
                               result == Z_STREAM_END};
    if (progress.finished) SHOAL_CHECK_EQ(inflateReset(&stream_), Z_OK);
    return progress;
  }

  z_stream stream_ = {};
};

}  // namespace

absl::StatusOr<std::unique_ptr<TextReader>> TextReader::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return ErrnoStatus(errno, absl::StrCat("opening ", path));
  auto file = std::make_unique<PlainReader>(path, fd);
  std::unique_ptr<TextReader> reader;
  if (absl::EndsWith(path, ".zst")) {
    reader = std::make_unique<ZstdReader>(std::move(file));
  } else if (absl::EndsWith(path, ".gz")) {
    reader = std::make_unique<GzipReader>(std::move(file));
  } else {
    reader = std::move(file);
  }
  return reader;
}

absl::StatusOr<std::string> ReadAll(TextReader& reader) {
  std::string text;
  size_t size = 0;
  while (true) {
    text.resize(size + std::max(kBufferBytes, size / 2));
    const size_t wanted = text.size() - size;
    SHOAL_ASSIGN_OR_RETURN(const size_t count, reader.Read(absl::MakeSpan(&text[size], wanted)));
    size += count;
    if (count < wanted) break;
  }
  text.resize(size);
  text.shrink_to_fit();
  return text;
}

LineReader::LineReader(TextReader& reader) : reader_(reader), buffer_(kBufferBytes, '\0') {}

absl::StatusOr<bool> LineReader::Next(std::string* line) {
  std::string next;
  bool found = false;
  while (true) {
    if (begin_ == end_) {
      SHOAL_ASSIGN_OR_RETURN(end_, reader_.Read(absl::MakeSpan(buffer_)));
      begin_ = 0;
      if (end_ == 0) break;
    }
    found = true;
    const char* const from = buffer_.data() + begin_;
    const auto* const stop = static_cast<const char*>(memchr(from, '\n', end_ - begin_));
    const size_t count = stop != nullptr ? static_cast<size_t>(stop - from) : end_ - begin_;
    next.append(from, count);
    begin_ += count;
    if (stop != nullptr) {
      ++begin_;
      break;
    }
  }
  if (!found) return false;
  if (!next.empty() && next.back() == '\r') next.pop_back();
  *line = std::move(next);
  ++number_;
  return true;
}

}  // namespace shoal
