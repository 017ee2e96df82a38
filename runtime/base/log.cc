#include "runtime/base/log.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "runtime/base/check.h"

namespace shoal {
namespace {

std::string& Identity() {
  static std::string* identity = new std::string();
  return *identity;
}

LogLevel Threshold() {
  static const LogLevel level = [] {
    const char* text = std::getenv("SHOAL_LOG_LEVEL");
    if (text != nullptr && std::strcmp(text, "warning") == 0) return LogLevel::kWarning;
    if (text != nullptr && std::strcmp(text, "error") == 0) return LogLevel::kError;
    return LogLevel::kInfo;
  }();
  return level;
}

std::string Prefix(char letter, const char* file, int line) {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  tm parts{};
  localtime_r(&now.tv_sec, &parts);
  const char* base = std::strrchr(file, '/');
  char text[192];
  std::snprintf(text, sizeof(text), "%c %02d:%02d:%02d.%03ld %s%s%s:%d] ", letter, parts.tm_hour, parts.tm_min,
                parts.tm_sec, now.tv_nsec / 1000000, Identity().c_str(), Identity().empty() ? "" : " ",
                base != nullptr ? base + 1 : file, line);
  return text;
}

void WriteLine(std::string line) {
  line += '\n';
  if (write(STDERR_FILENO, line.data(), line.size()) < 0) {
    // Nowhere left to report to.
  }
}

}  // namespace

void SetLogIdentity(std::string_view identity) { Identity() = std::string(identity); }

namespace internal {

LogLine::LogLine(LogLevel level, const char* file, int line) : level_(level) {
  stream_ << Prefix("IWE"[static_cast<int>(level)], file, line);
}

LogLine::~LogLine() {
  if (level_ >= Threshold()) WriteLine(stream_.str());
}

CheckFailure::CheckFailure(const char* file, int line, const char* condition) {
  stream_ << Prefix('F', file, line) << "check failed: " << condition << " ";
}

CheckFailure::~CheckFailure() {
  WriteLine(stream_.str());
  std::abort();
}

}  // namespace internal
}  // namespace shoal
