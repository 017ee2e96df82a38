// What the tests of this folder share.
#pragma once

#include <zlib.h>
#include <zstd.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/data/batches.h"
#include "models/data/token_source.h"
#include "runtime/base/check.h"

namespace shoal::testing {

inline std::string Zstd(std::string_view text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  // Through the advanced interface, for the checksum that the command-line tool writes too.
  ZSTD_CCtx* const context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
  const size_t size = ZSTD_compress2(context, out.data(), out.size(), text.data(), text.size());
  ZSTD_freeCCtx(context);
  SHOAL_CHECK(!ZSTD_isError(size));
  out.resize(size);
  return out;
}

inline std::string Gzip(std::string_view text) {
  z_stream stream = {};
  SHOAL_CHECK_EQ(deflateInit2(&stream, 6, Z_DEFLATED, MAX_WBITS + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  SHOAL_CHECK_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(out.size() - stream.avail_out);
  deflateEnd(&stream);
  return out;
}

// The ids 0, 1, 2, ...: a window's first id is where it starts.
class CountingTokens : public TokenSource {
 public:
  explicit CountingTokens(int64_t size) : size_(size) {}
  int64_t size() const override { return size_; }
  int64_t vocabulary_bound() const override { return size_; }
  absl::Status Read(int64_t offset, absl::Span<int32_t> out) const override {
    SHOAL_CHECK(offset >= 0 && offset + static_cast<int64_t>(out.size()) <= size_) << offset;
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<int32_t>(offset + static_cast<int64_t>(i));
    return absl::OkStatus();
  }

 private:
  const int64_t size_;
};

// [rows * (seq + 1)] ids.
inline std::vector<int32_t> Rows(const BatchSource& source, int64_t step, int64_t begin, int64_t rows) {
  const Tensor out = Empty({rows, source.seq() + 1}, DType::kI32);
  SHOAL_CHECK_OK(source.ReadRows(step, begin, out));
  const absl::Span<int32_t> ids = out.span<int32_t>();
  return {ids.begin(), ids.end()};
}

}  // namespace shoal::testing
