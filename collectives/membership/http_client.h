// A small HTTP/1.1 client for talking JSON with a server near by: POST alone, one request at a time, the connection is
// kept. Belongs to one thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/transport/socket.h"

namespace shoal {

class HttpClient {
 public:
  // HOST:PORT each; a request goes to the first one that answers, from the last one on that did.
  explicit HttpClient(std::vector<std::string> endpoints) : endpoints_(std::move(endpoints)) {}

  // The body of the answer. Blocks until `deadline_ns` (NowNs()). UNAVAILABLE: no server answers; otherwise the server's
  // own refusal (NOT_FOUND for 404, INTERNAL else), with what it said; DATA_LOSS: what answers does not speak HTTP.
  // The request may have been carried out when an error is returned.
  absl::StatusOr<std::string> Post(const std::string& path, std::string_view body, int64_t deadline_ns);

 private:
  struct Reply {
    int code = 0;
    std::string body;
    bool keep = true;  // The connection.
  };

  absl::StatusOr<Reply> Exchange(const std::string& request, int64_t deadline_ns);
  absl::Status Fill(int64_t deadline_ns);
  absl::StatusOr<std::string> Line(int64_t deadline_ns);
  absl::StatusOr<std::string> Take(size_t bytes, int64_t deadline_ns);
  absl::Status ReadHeaders(Reply* reply, size_t* length, bool* chunked, int64_t deadline_ns);

  const std::vector<std::string> endpoints_;
  size_t endpoint_ = 0;
  Fd socket_;
  std::string received_;  // Bytes that nobody has taken yet.
};

}  // namespace shoal
