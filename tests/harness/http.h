// One HTTP/1.0 GET over a plain socket, for tests of what a process serves.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace shoal::testing {

struct HttpResponse {
  int status = 0;  // 200, 404, ...
  std::string headers;
  std::string body;
};

// GET http://`host`:`port``target`; `host` is an IPv4 address. UNAVAILABLE: nobody answers;
// DEADLINE_EXCEEDED: not within `timeout`.
absl::StatusOr<HttpResponse> HttpGet(const std::string& host, int port, std::string_view target,
                                     absl::Duration timeout = absl::Seconds(20));

// `text` as a part of a URL's query.
std::string UrlEncode(std::string_view text);

}  // namespace shoal::testing
