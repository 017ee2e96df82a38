// Bodies of small messages: little-endian integers and length-prefixed strings. The reader is for bytes that
// anybody may have sent: it never reads past the end, and once something did not fit, ok() is false and every
// later value is empty.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace shoal {

class WireWriter {
 public:
  WireWriter& U64(uint64_t value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  WireWriter& String(std::string_view text) {
    U64(text.size());
    bytes_.append(text);
    return *this;
  }
  std::string Take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

class WireReader {
 public:
  explicit WireReader(std::string_view bytes) : left_(bytes) {}

  uint64_t U64() {
    uint64_t value = 0;
    if (left_.size() < sizeof value) return Fail();
    std::memcpy(&value, left_.data(), sizeof value);
    left_.remove_prefix(sizeof value);
    return value;
  }
  std::string String() {
    const uint64_t size = U64();
    if (size > left_.size()) {
      Fail();
      return "";
    }
    std::string text(left_.substr(0, size));
    left_.remove_prefix(size);
    return text;
  }
  bool ok() const { return ok_; }
  bool AtEnd() const { return ok_ && left_.empty(); }

 private:
  uint64_t Fail() {
    ok_ = false;
    left_ = {};
    return 0;
  }

  std::string_view left_;
  bool ok_ = true;
};

}  // namespace shoal
