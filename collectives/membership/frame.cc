#include "collectives/membership/frame.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr uint32_t kMagic = 0x4c4f4853;  // "SHOL"
constexpr size_t kHeaderBytes = 16;
constexpr uint32_t kFirstBodyMax = 1 << 20;  // Of the first frame after the proof.
constexpr uint32_t kBodyMax = 16 << 20;
constexpr size_t kGuestsMax = 1024;
constexpr int64_t kPatienceNs = 5'000'000'000;  // For a proof and a frame.
constexpr int64_t kClosedNs = 50'000'000;
constexpr double kLogBurst = 20, kLogsPerSecond = 1;

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

size_t FrameReader::Wanted() const {
  if (bytes_.size() < kHeaderBytes) return kHeaderBytes - bytes_.size();
  Header header;
  std::memcpy(&header, bytes_.data(), sizeof header);
  return kHeaderBytes + header.length - bytes_.size();
}

absl::Status FrameReader::Take(std::string_view bytes) {
  SHOAL_CHECK(bytes.size() <= Wanted()) << bytes.size() << " bytes";
  bytes_.append(bytes);
  bool sane = std::memcmp(bytes_.data(), &kMagic, std::min(bytes_.size(), sizeof kMagic)) == 0;
  if (sane && bytes_.size() >= kHeaderBytes) {
    Header header;
    std::memcpy(&header, bytes_.data(), sizeof header);
    sane = header.length <= body_bytes_max_;
  }
  return sane ? absl::OkStatus() : absl::DataLossError("it does not speak Shoal's protocol");
}

Frame FrameReader::TakeFrame() {
  Header header;
  std::memcpy(&header, bytes_.data(), sizeof header);
  return {header.version, static_cast<FrameType>(header.type), bytes_.substr(kHeaderBytes)};
}

// ---- The door.

void Greeter::Refused(const Guest& guest, std::string_view reason) {
  Log(absl::StrCat("refused ", guest.address.ToString(), ": ", AbslSv(reason)));
}

void Greeter::Log(const std::string& line) {
  const int64_t now_ns = NowNs();
  log_budget_ = std::min(kLogBurst, log_budget_ + (now_ns - logged_ns_) * 1e-9 * kLogsPerSecond);
  logged_ns_ = now_ns;
  if (log_budget_ < 1) {
    ++unlogged_;
    return;
  }
  log_budget_ -= 1;
  const std::string more =
      unlogged_ == 0 ? "" : absl::StrCat(" (and ", unlogged_, " others since the last such line)");
  unlogged_ = 0;
  SHOAL_LOG(kWarning) << line << more;
}

void Greeter::Admit(Fd socket) {
  if (guests_.size() == kGuestsMax) {
    Refused(*guests_.front(), "too many strangers at the door");
    guests_.pop_front();
  }
  auto guest = std::make_unique<Guest>(Guest{.handshake = Handshake::Acceptor(credentials_, FreshNonce()),
                                             .frame = FrameReader(kFirstBodyMax)});
  guest->address = PeerAddressOf(socket.get());
  guest->socket = std::move(socket);
  guest->deadline_ns = NowNs() + kPatienceNs;
  guests_.push_back(std::move(guest));
}

bool Greeter::closed() const { return NowNs() < closed_until_ns_; }

absl::Status Greeter::AcceptAll() {
  for (int listener : listeners_) {
    while (true) {
      absl::StatusOr<Fd> socket = Accept(listener);
      if (!socket.ok() && absl::IsResourceExhausted(socket.status()) && !guests_.empty()) {
        trouble_ = std::string(socket.status().message());
        Refused(*guests_.front(), "no descriptors left, and it came first");
        guests_.pop_front();
        continue;
      }
      if (absl::IsResourceExhausted(socket.status())) {
        trouble_ = std::string(socket.status().message());
        Log(absl::StrCat("nobody is let in for now: ", trouble_));
        closed_until_ns_ = NowNs() + kClosedNs;
        return absl::OkStatus();
      }
      SHOAL_RETURN_IF_ERROR(socket.status());
      if (!socket->valid()) break;
      Admit(*std::move(socket));
    }
  }
  return absl::OkStatus();
}

absl::Status Greeter::Take(Guest* guest, std::string_view bytes) {
  guest->spoke = true;
  if (guest->handshake.Done()) return guest->frame.Take(bytes);
  const absl::Status status = guest->handshake.Take(bytes);
  // An empty socket takes so little at once, or its peer is none of ours.
  const std::string output = guest->handshake.TakeOutput();
  const ssize_t sent = send(guest->socket.get(), output.data(), output.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  if (status.ok() && sent != static_cast<ssize_t>(output.size()))
    return absl::UnavailableError("does not read");
  return status;
}

Greeter::Progress Greeter::ReadSome(Guest* guest) {
  while (true) {
    const bool proving = !guest->handshake.Done();
    const size_t wanted = proving ? guest->handshake.Wanted() : guest->frame.Wanted();
    if (wanted == 0) return Progress::kFrame;
    char bytes[4096];
    const ssize_t got = recv(guest->socket.get(), bytes, std::min(wanted, sizeof bytes), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Progress::kMore;
    if (got <= 0) {
      // Ranks look in that way whether a neighbour's unix socket can be reached; on a network port it is a
      // scanner.
      if (guest->spoke || guest->address.family() != AF_UNIX) {
        Refused(*guest, guest->spoke ? "it left in the middle of a greeting" : "it left without a word");
      }
      return Progress::kGone;
    }
    const absl::Status status = Take(guest, std::string_view(bytes, got));
    if (!status.ok()) {
      Refused(*guest, StdSv(status.message()));
      return Progress::kGone;
    }
  }
}

void Greeter::DropLate() {
  const int64_t now_ns = NowNs();
  // All have the same patience: who came first is late first.
  while (!guests_.empty() && guests_.front()->deadline_ns <= now_ns) {
    Refused(*guests_.front(),
            guests_.front()->spoke ? "it stopped in the middle of a greeting" : "it says nothing");
    guests_.pop_front();
  }
}

absl::StatusOr<Greeter::Event> Greeter::Next(const std::vector<int>& watched, int64_t deadline_ns) {
  while (true) {
    std::vector<pollfd> entries;
    for (int fd : watched) entries.push_back({fd, POLLIN, 0});
    const bool closed = NowNs() < closed_until_ns_;
    for (int fd : listeners_) entries.push_back({closed ? -1 : fd, POLLIN, 0});
    for (const auto& guest : guests_) entries.push_back({guest->socket.get(), POLLIN, 0});
    int64_t late_ns = guests_.empty() ? kNeverNs : guests_.front()->deadline_ns;
    if (closed) late_ns = std::min(late_ns, closed_until_ns_);
    const int ready = poll(entries.data(), entries.size(), PollTimeoutMs(std::min(deadline_ns, late_ns)));
    DropLate();
    if (ready <= 0) {
      if (NowNs() >= deadline_ns) return absl::DeadlineExceededError("nobody came");
      continue;
    }
    for (size_t i = 0; i < watched.size(); ++i) {
      if (entries[i].revents != 0) return Event{.readable = watched[i]};
    }
    for (size_t i = 0; i < guests_.size(); ++i) {
      const Progress progress = ReadSome(guests_[i].get());
      if (progress == Progress::kMore) continue;
      const std::unique_ptr<Guest> guest = std::move(guests_[i]);
      guests_.erase(guests_.begin() + i--);
      if (progress == Progress::kGone) continue;
      Event event;
      event.socket = std::move(guest->socket);
      event.purpose = guest->handshake.purpose();
      event.frame = guest->frame.TakeFrame();
      return event;
    }
    if (!closed) SHOAL_RETURN_IF_ERROR(AcceptAll());
  }
}

}  // namespace shoal
