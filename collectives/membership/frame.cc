#include "collectives/membership/frame.h"

#include <poll.h>

#include <cerrno>
#include <cstring>

#include "collectives/transport/clock.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr uint32_t kMagic = 0x4c4f4853;  // "SHOL"
constexpr size_t kHeaderBytes = 16;
constexpr uint32_t kStrangerBodyMax = 4096;
constexpr uint32_t kBodyMax = 16 << 20;
constexpr size_t kGuestsMax = 1024;

struct Header {
  uint32_t magic, version, type, length;
};
static_assert(sizeof(Header) == kHeaderBytes);

}  // namespace

absl::Status SendFrame(int fd, FrameType type, std::string_view body, int64_t deadline_ns) {
  const Header header = {kMagic, kProtocolVersion, static_cast<uint32_t>(type),
                         static_cast<uint32_t>(body.size())};
  std::string bytes(reinterpret_cast<const char*>(&header), sizeof header);
  bytes.append(body);
  return SendAll(fd, bytes.data(), bytes.size(), deadline_ns);
}

absl::StatusOr<Frame> ReceiveFrame(int fd, int64_t deadline_ns) {
  Header header;
  SHOAL_RETURN_IF_ERROR(ReceiveAll(fd, &header, sizeof header, deadline_ns));
  if (header.magic != kMagic || header.length > kBodyMax)
    return absl::DataLossError("no Shoal answers there");
  Frame frame = {header.version, static_cast<FrameType>(header.type), std::string(header.length, '\0')};
  SHOAL_RETURN_IF_ERROR(ReceiveAll(fd, frame.body.data(), frame.body.size(), deadline_ns));
  return frame;
}

absl::Status Greeter::AcceptAll() {
  for (int listener : listeners_) {
    while (true) {
      absl::StatusOr<Fd> socket = Accept(listener);
      if (!socket.ok() && absl::IsResourceExhausted(socket.status()) && !guests_.empty()) {
        guests_.pop_front();  // Out of descriptors: the stranger who has been silent longest goes.
        continue;
      }
      SHOAL_RETURN_IF_ERROR(socket.status());
      if (!socket->valid()) break;
      if (guests_.size() == kGuestsMax) guests_.pop_front();
      guests_.push_back({*std::move(socket), ""});
    }
  }
  return absl::OkStatus();
}

Greeter::Progress Greeter::ReadSome(Guest* guest, Frame* frame) {
  const std::string from = PeerAddressOf(guest->socket.get()).ToString();
  while (true) {
    size_t wanted = kHeaderBytes - guest->bytes.size();
    Header header = {};
    if (guest->bytes.size() >= kHeaderBytes) {
      std::memcpy(&header, guest->bytes.data(), sizeof header);
      wanted = kHeaderBytes + header.length - guest->bytes.size();
      if (wanted == 0) {
        *frame = {header.version, static_cast<FrameType>(header.type), guest->bytes.substr(kHeaderBytes)};
        return Progress::kFrame;
      }
    }
    char bytes[kStrangerBodyMax];
    const ssize_t got = recv(guest->socket.get(), bytes, std::min(wanted, sizeof bytes), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Progress::kMore;
    if (got <= 0) {
      // A connection that said nothing is somebody's look whether the port is open.
      if (!guest->bytes.empty())
        SHOAL_LOG(kWarning) << "refused " << from << ": it left in the middle of a greeting";
      return Progress::kGone;
    }
    guest->bytes.append(bytes, got);
    const size_t known = std::min(guest->bytes.size(), sizeof header.magic);
    bool sane = std::memcmp(guest->bytes.data(), &kMagic, known) == 0;
    if (sane && guest->bytes.size() >= kHeaderBytes) {
      std::memcpy(&header, guest->bytes.data(), sizeof header);
      sane = header.length <= kStrangerBodyMax;
    }
    if (!sane) {
      SHOAL_LOG(kWarning) << "refused " << from << ": it does not speak Shoal's protocol";
      return Progress::kGone;
    }
  }
}

absl::StatusOr<Greeter::Event> Greeter::Next(const std::vector<int>& watched, int64_t deadline_ns) {
  while (true) {
    std::vector<pollfd> entries;
    for (int fd : watched) entries.push_back({fd, POLLIN, 0});
    for (int fd : listeners_) entries.push_back({fd, POLLIN, 0});
    for (const Guest& guest : guests_) entries.push_back({guest.socket.get(), POLLIN, 0});
    const int ready = poll(entries.data(), entries.size(), PollTimeoutMs(deadline_ns));
    if (ready <= 0) {
      if (NowNs() >= deadline_ns) return absl::DeadlineExceededError("nobody came");
      continue;
    }
    for (size_t i = 0; i < watched.size(); ++i) {
      if (entries[i].revents != 0) return Event{Fd(), {}, watched[i]};
    }
    const size_t first_guest = watched.size() + listeners_.size();
    for (size_t i = 0; i < guests_.size(); ++i) {
      if (entries[first_guest + i].revents == 0) continue;
      Event event;
      const Progress progress = ReadSome(&guests_[i], &event.frame);
      if (progress == Progress::kMore) continue;
      if (progress == Progress::kFrame) event.socket = std::move(guests_[i].socket);
      guests_.erase(guests_.begin() + i);
      if (progress == Progress::kFrame) return event;
      break;  // Indices have moved: poll again.
    }
    SHOAL_RETURN_IF_ERROR(AcceptAll());
  }
}

}  // namespace shoal
