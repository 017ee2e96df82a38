#include "models/data/token_source.h"

#include <algorithm>
#include <utility>

#include "models/data/megatron.h"
#include "models/data/random.h"
#include "models/data/text_reader.h"
#include "models/tokenizer/byte_tokenizer.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

void CheckRange(const TokenSource& source, int64_t offset, size_t count) {
  SHOAL_CHECK(offset >= 0 && static_cast<int64_t>(count) <= source.size() - offset)
      << "tokens " << offset << "+" << count << " of " << source.size();
}

class TextTokens : public TokenSource {
 public:
  explicit TextTokens(std::string text) : text_(std::move(text)) {}
  int64_t size() const override { return static_cast<int64_t>(text_.size()); }
  int64_t vocabulary_bound() const override { return kByteVocabulary; }
  absl::Status Read(int64_t offset, absl::Span<int32_t> out) const override {
    CheckRange(*this, offset, out.size());
    const auto* const bytes = reinterpret_cast<const unsigned char*>(text_.data()) + offset;
    std::copy(bytes, bytes + out.size(), out.begin());
    return absl::OkStatus();
  }

 private:
  const std::string text_;
};

class UniformTokens : public TokenSource {
 public:
  UniformTokens(uint64_t seed, int64_t vocab_size, int64_t size)
      : seed_(seed), vocab_size_(vocab_size), size_(size) {}
  int64_t size() const override { return size_; }
  int64_t vocabulary_bound() const override { return vocab_size_; }
  absl::Status Read(int64_t offset, absl::Span<int32_t> out) const override {
    CheckRange(*this, offset, out.size());
    for (size_t i = 0; i < out.size(); ++i) {
      // The upper 32 bits, scaled into the range: no division.
      const uint64_t bits = SplitMix64(seed_, static_cast<uint64_t>(offset) + i) >> 32;
      out[i] = static_cast<int32_t>(bits * static_cast<uint64_t>(vocab_size_) >> 32);
    }
    return absl::OkStatus();
  }

 private:
  const uint64_t seed_;
  const int64_t vocab_size_;
  const int64_t size_;
};

class SliceTokens : public TokenSource {
 public:
  SliceTokens(TokenSourcePtr source, int64_t begin, int64_t size)
      : source_(std::move(source)), begin_(begin), size_(size) {}
  int64_t size() const override { return size_; }
  int64_t vocabulary_bound() const override { return source_->vocabulary_bound(); }
  absl::Status Read(int64_t offset, absl::Span<int32_t> out) const override {
    CheckRange(*this, offset, out.size());
    return source_->Read(begin_ + offset, out);
  }

 private:
  const TokenSourcePtr source_;
  const int64_t begin_;
  const int64_t size_;
};

class CheckedTokens : public TokenSource {
 public:
  CheckedTokens(TokenSourcePtr source, int64_t vocab_size, std::string name)
      : source_(std::move(source)), vocab_size_(vocab_size), name_(std::move(name)) {}
  int64_t size() const override { return source_->size(); }
  int64_t vocabulary_bound() const override { return vocab_size_; }
  absl::Status Read(int64_t offset, absl::Span<int32_t> out) const override {
    SHOAL_RETURN_IF_ERROR(source_->Read(offset, out));
    const auto bad = std::find_if(out.begin(), out.end(), [this](int32_t id) { return id >= vocab_size_; });
    if (bad == out.end()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(name_, ": token ", *bad, " at ",
                                                   offset + (bad - out.begin()),
                                                   " does not fit a vocabulary of ", vocab_size_));
  }

 private:
  const TokenSourcePtr source_;
  const int64_t vocab_size_;
  const std::string name_;
};

}  // namespace

absl::StatusOr<TokenSourcePtr> OpenText(const std::string& path) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<TextReader> reader, TextReader::Open(path));
  SHOAL_ASSIGN_OR_RETURN(std::string text, ReadAll(*reader));
  return TokenSourcePtr(std::make_shared<TextTokens>(std::move(text)));
}

TokenSourcePtr RandomTokens(uint64_t seed, int64_t vocab_size, int64_t size) {
  SHOAL_CHECK(vocab_size >= 1 && vocab_size <= int64_t{1} << 31) << vocab_size;
  SHOAL_CHECK_GE(size, 0);
  return std::make_shared<UniformTokens>(seed, vocab_size, size);
}

TokenSourcePtr Slice(TokenSourcePtr source, int64_t begin, int64_t size) {
  SHOAL_CHECK(begin >= 0 && size >= 0 && size <= source->size() - begin)
      << "tokens " << begin << "+" << size << " of " << source->size();
  return std::make_shared<SliceTokens>(std::move(source), begin, size);
}

TokenSourcePtr CheckVocabulary(TokenSourcePtr source, int64_t vocab_size, std::string name) {
  if (source->vocabulary_bound() <= vocab_size) return source;
  return std::make_shared<CheckedTokens>(std::move(source), vocab_size, std::move(name));
}

}  // namespace shoal
