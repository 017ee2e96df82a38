#include "tests/harness/http.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_format.h"
#include "runtime/base/status.h"

namespace shoal::testing {

absl::StatusOr<HttpResponse> HttpGet(const std::string& host, int port, std::string_view target,
                                     absl::Duration timeout) {
  const std::string where = absl::StrCat("GET http://", host, ":", port, AbslSv(target));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  if (inet_pton(AF_INET, host.c_str(), &address.sin_addr) != 1) return absl::InvalidArgumentError(where);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const absl::Cleanup close_socket = [fd] { close(fd); };
  const timeval limit = absl::ToTimeval(timeout);
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0)
    return ErrnoStatus(errno, where);
  const std::string request = absl::StrCat("GET ", AbslSv(target), " HTTP/1.0\r\nHost: ", host, "\r\n\r\n");
  if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(request.size())) {
    return ErrnoStatus(errno, where);
  }
  std::string answer;
  std::array<char, 65536> chunk;
  ssize_t got = 0;
  while ((got = recv(fd, chunk.data(), chunk.size(), 0)) > 0)
    answer.append(chunk.data(), static_cast<size_t>(got));
  if (got < 0) return ErrnoStatus(errno == EAGAIN ? ETIMEDOUT : errno, where);
  const size_t head = answer.find("\r\n\r\n");
  const size_t space = answer.find(' ');
  if (head == std::string::npos || space > head) {
    return absl::UnavailableError(absl::StrCat(where, ": no HTTP answer: ", answer.substr(0, 200)));
  }
  return HttpResponse{std::atoi(answer.c_str() + space), answer.substr(0, head), answer.substr(head + 4)};
}

std::string UrlEncode(std::string_view text) {
  std::string encoded;
  for (const unsigned char letter : text) {
    if (absl::ascii_isalnum(letter)) {
      encoded += static_cast<char>(letter);
    } else {
      absl::StrAppendFormat(&encoded, "%%%02X", letter);
    }
  }
  return encoded;
}

}  // namespace shoal::testing
