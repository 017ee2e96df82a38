// Status plumbing: what Debian's Abseil release lacks. Errors travel as absl::Status; each boundary adds context once,
// so that a message reads as a path to the cause: "resuming runs/a: step 4200: tensor x: crc 1f2e, want 9a01".
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace shoal {

// Debian's absl::string_view is not std::string_view; this is the one place where they meet.
inline absl::string_view AbslSv(std::string_view text) { return {text.data(), text.size()}; }
inline std::string_view StdSv(absl::string_view text) { return {text.data(), text.size()}; }

// The same code with "context: " put before the message. OK stays OK.
absl::Status Annotate(const absl::Status& status, std::string_view context);

// A status for a failed system call: the code that fits `error_number` and "what: strerror".
absl::Status ErrnoStatus(int error_number, std::string_view what);

}  // namespace shoal

#define SHOAL_STATUS_CONCAT_INNER(a, b) a##b
#define SHOAL_STATUS_CONCAT(a, b) SHOAL_STATUS_CONCAT_INNER(a, b)

// SHOAL_RETURN_IF_ERROR(expr) or SHOAL_RETURN_IF_ERROR(expr, "context ", value, ...)
#define SHOAL_RETURN_IF_ERROR(expr, ...)                                                                    \
  do {                                                                                                      \
    if (absl::Status shoal_status = (expr); !shoal_status.ok())                                             \
      return ::shoal::Annotate(shoal_status, std::string(absl::StrCat(__VA_ARGS__)));                       \
  } while (false)

// SHOAL_ASSIGN_OR_RETURN(auto x, expr) or SHOAL_ASSIGN_OR_RETURN(auto x, expr, "context ", value, ...)
#define SHOAL_ASSIGN_OR_RETURN(target, expr, ...)                                                           \
  SHOAL_ASSIGN_OR_RETURN_IMPL(SHOAL_STATUS_CONCAT(shoal_or_, __LINE__), target, expr, __VA_ARGS__)
#define SHOAL_ASSIGN_OR_RETURN_IMPL(result, target, expr, ...)                                              \
  auto result = (expr);                                                                                     \
  if (!result.ok())                                                                                         \
    return ::shoal::Annotate(result.status(), std::string(absl::StrCat(__VA_ARGS__)));                      \
  target = std::move(result).value()
