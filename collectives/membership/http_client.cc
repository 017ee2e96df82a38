#include "collectives/membership/http_client.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "collectives/membership/endpoint.h"
#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr size_t kBodyBytesMax = 1 << 20;
constexpr size_t kLineBytesMax = 16 * 1024;
constexpr int64_t kDialNs = 1'000'000'000;  // Then the next endpoint gets its chance.

}  // namespace

absl::StatusOr<std::string> HttpClient::Post(const std::string& path, std::string_view body,
                                             int64_t deadline_ns) {
  absl::Status last = absl::UnavailableError("no endpoints");
  // A kept connection that the server has closed meanwhile costs one attempt.
  const size_t attempts = endpoints_.size() + (socket_.valid() ? 1 : 0);
  for (size_t attempt = 0; attempt < attempts; ++attempt) {
    const std::string& endpoint = endpoints_[endpoint_];
    const bool fresh = !socket_.valid();
    if (fresh) {
      received_.clear();
      absl::StatusOr<SocketAddress> address = ResolveEndpoint(endpoint);
      absl::StatusOr<Fd> socket = address.ok()
                                      ? Dial(*address, std::min(deadline_ns, NowNs() + kDialNs))
                                      : absl::StatusOr<Fd>(address.status());
      if (!socket.ok()) {
        last = Annotate(socket.status(), endpoint);
        endpoint_ = (endpoint_ + 1) % endpoints_.size();
        continue;
      }
      socket_ = *std::move(socket);
    }
    const std::string request = absl::StrCat("POST ", path, " HTTP/1.1\r\nHost: ", endpoint,
                                             "\r\nContent-Type: application/json\r\nContent-Length: ",
                                             body.size(), "\r\n\r\n", AbslSv(body));
    absl::StatusOr<Reply> reply = Exchange(request, deadline_ns);
    if (!reply.ok() || !reply->keep) socket_.Reset();
    if (!reply.ok()) {
      last = Annotate(reply.status(), endpoint);
      if (fresh) endpoint_ = (endpoint_ + 1) % endpoints_.size();
      continue;
    }
    if (reply->code == 200) return std::move(reply->body);
    const std::string text =
        absl::StrCat(endpoint, " answers ", reply->code, ": ", reply->body.substr(0, 500));
    return reply->code == 404 ? absl::NotFoundError(text) : absl::InternalError(text);
  }
  return last;
}

// Reads what there is, at least one byte.
absl::Status HttpClient::Fill(int64_t deadline_ns) {
  while (true) {
    char bytes[4096];
    const ssize_t got = recv(socket_.get(), bytes, sizeof bytes, 0);
    if (got > 0) {
      received_.append(bytes, got);
      return absl::OkStatus();
    }
    if (got == 0) return absl::UnavailableError("connection closed");
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK) return absl::UnavailableError(std::strerror(errno));
    if (!PollOne(socket_.get(), POLLIN, deadline_ns)) return absl::UnavailableError("no answer");
  }
}

absl::StatusOr<std::string> HttpClient::Line(int64_t deadline_ns) {
  while (true) {
    const size_t end = received_.find("\r\n");
    if (end != std::string::npos) {
      std::string line = received_.substr(0, end);
      received_.erase(0, end + 2);
      return line;
    }
    if (received_.size() > kLineBytesMax) return absl::DataLossError("it does not speak HTTP");
    SHOAL_RETURN_IF_ERROR(Fill(deadline_ns));
  }
}

absl::StatusOr<std::string> HttpClient::Take(size_t bytes, int64_t deadline_ns) {
  while (received_.size() < bytes) SHOAL_RETURN_IF_ERROR(Fill(deadline_ns));
  std::string taken = received_.substr(0, bytes);
  received_.erase(0, bytes);
  return taken;
}

absl::Status HttpClient::ReadHeaders(Reply* reply, size_t* length, bool* chunked, int64_t deadline_ns) {
  SHOAL_ASSIGN_OR_RETURN(const std::string status, Line(deadline_ns));
  // HTTP/1.1 200 OK
  if (!absl::StartsWith(status, "HTTP/1.") || status.size() < 12 ||
      !absl::SimpleAtoi(status.substr(9, 3), &reply->code)) {
    return absl::DataLossError("it does not speak HTTP");
  }
  while (true) {
    SHOAL_ASSIGN_OR_RETURN(const std::string line, Line(deadline_ns));
    if (line.empty()) return absl::OkStatus();
    const std::string lower = absl::AsciiStrToLower(line);
    const std::string value(absl::StripAsciiWhitespace(lower.substr(std::min(lower.find(':'), lower.size() - 1) + 1)));
    if (absl::StartsWith(lower, "content-length:")) {
      uint64_t number = 0;
      if (!absl::SimpleAtoi(value, &number) || number > kBodyBytesMax) {
        return absl::DataLossError(absl::StrCat("an answer of ", value, " bytes"));
      }
      *length = number;
    }
    if (absl::StartsWith(lower, "transfer-encoding:")) *chunked = value == "chunked";
    if (absl::StartsWith(lower, "connection:") && value == "close") reply->keep = false;
  }
}

absl::StatusOr<HttpClient::Reply> HttpClient::Exchange(const std::string& request, int64_t deadline_ns) {
  SHOAL_RETURN_IF_ERROR(SendAll(socket_.get(), request.data(), request.size(), deadline_ns));
  Reply reply;
  size_t length = 0;
  bool chunked = false;
  SHOAL_RETURN_IF_ERROR(ReadHeaders(&reply, &length, &chunked, deadline_ns));
  if (!chunked) {
    SHOAL_ASSIGN_OR_RETURN(reply.body, Take(length, deadline_ns));
    return reply;
  }
  while (true) {
    SHOAL_ASSIGN_OR_RETURN(const std::string size, Line(deadline_ns));
    uint64_t bytes = 0;
    if (!absl::SimpleHexAtoi(size.substr(0, size.find(';')), &bytes) ||
        reply.body.size() + bytes > kBodyBytesMax) {
      return absl::DataLossError("it does not speak HTTP");
    }
    SHOAL_ASSIGN_OR_RETURN(const std::string chunk, Take(bytes + 2, deadline_ns));  // And its line end.
    if (bytes == 0) return reply;
    reply.body.append(chunk, 0, bytes);
  }
}

}  // namespace shoal
