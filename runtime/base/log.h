// One line to stderr per message: "I 12:34:56.789 rank 1 file.cc:42] text". Thread-safe; a line is written by one
// write(2), so lines of several processes do not mix. SHOAL_LOG_LEVEL (info, warning, error) sets what is printed.
#pragma once

#include <sstream>
#include <string>
#include <string_view>

namespace shoal {

enum class LogLevel : int { kInfo = 0, kWarning = 1, kError = 2 };

// Put into every later line of this process, for example "rank 3". Call before threads start.
void SetLogIdentity(std::string_view identity);

namespace internal {
class LogLine {
 public:
  LogLine(LogLevel level, const char* file, int line);
  ~LogLine();
  std::ostream& stream() { return stream_; }

 private:
  LogLevel level_;
  std::ostringstream stream_;
};
}  // namespace internal
}  // namespace shoal

#define SHOAL_LOG(level) ::shoal::internal::LogLine(::shoal::LogLevel::level, __FILE__, __LINE__).stream()
