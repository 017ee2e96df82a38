// SHOAL_CHECK*: for our own mistakes, never for the world's. On in release builds too. A failed check prints file,
// line, condition and message to stderr and aborts the process.
#pragma once

#include <sstream>

#include "runtime/base/status.h"

namespace shoal::internal {

class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition);
  [[noreturn]] ~CheckFailure();
  std::ostream& stream() { return stream_; }

 private:
  std::ostringstream stream_;
};

struct Voidify {
  void operator&(std::ostream&) {}
};

}  // namespace shoal::internal

#define SHOAL_CHECK(condition)                       \
  (condition) ? (void)0                              \
              : ::shoal::internal::Voidify() &       \
                    ::shoal::internal::CheckFailure(__FILE__, __LINE__, #condition).stream()
#define SHOAL_CHECK_OP(a, op, b) SHOAL_CHECK((a)op(b)) << (a) << " against " << (b) << " "
#define SHOAL_CHECK_EQ(a, b) SHOAL_CHECK_OP(a, ==, b)
#define SHOAL_CHECK_NE(a, b) SHOAL_CHECK_OP(a, !=, b)
#define SHOAL_CHECK_LE(a, b) SHOAL_CHECK_OP(a, <=, b)
#define SHOAL_CHECK_LT(a, b) SHOAL_CHECK_OP(a, <, b)
#define SHOAL_CHECK_GE(a, b) SHOAL_CHECK_OP(a, >=, b)
#define SHOAL_CHECK_GT(a, b) SHOAL_CHECK_OP(a, >, b)
#define SHOAL_CHECK_OK(expr)                                              \
  do {                                                                    \
    const absl::Status shoal_check_status = (expr);                       \
    SHOAL_CHECK(shoal_check_status.ok()) << shoal_check_status.ToString(); \
  } while (false)
