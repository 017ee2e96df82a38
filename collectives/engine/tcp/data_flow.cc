#include "collectives/engine/tcp/data_flow.h"

#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <limits>

#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr size_t kBufferBytes = 64 << 10;
// What is read without knowing whose it is; more where many small messages come. What large ones have in it
// is copied twice.
constexpr size_t kAheadBytes = 4 << 10;
constexpr size_t kDirectBytes = 4 << 10;  // From here on, payload is read straight to where it belongs.
// What the kernel takes beyond what it can send at once: enough to go on with until this process is awake again.
// Megabytes, as it would take by itself, are tens of milliseconds on a slow link, and nothing overtakes them.
constexpr int kUnsentBytes = 128 << 10;
constexpr int64_t kDeliveryPauseMinNs = 250'000, kDeliveryPauseMaxNs = 10'000'000;

absl::Status Gone(const char* what) {
  return absl::UnavailableError(absl::StrCat("data connection: ", what, ": ", std::strerror(errno)));
}

}  // namespace

DataFlow::DataFlow(Fd socket, uint64_t epoch)
    : socket_(std::move(socket)), epoch_(epoch), buffer_(kBufferBytes), ahead_(kAheadBytes) {
  (void)setsockopt(socket_.get(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &kUnsentBytes, sizeof kUnsentBytes);
}

int64_t DataFlow::Undelivered() {
  if (!socket_.valid()) return 0;
  while (recv(socket_.get(), buffer_.data(), buffer_.size(), 0) > 0) {
  }
  EndWrites();
  tcp_info info = {};
  socklen_t length = sizeof info;
  if (getsockopt(socket_.get(), IPPROTO_TCP, TCP_INFO, &info, &length) != 0 || info.tcpi_state == TCP_CLOSE) return 0;
  int unacknowledged = 0;
  return ioctl(socket_.get(), SIOCOUTQ, &unacknowledged) == 0 ? unacknowledged : 0;
}

void AwaitDelivery(const std::vector<DataFlow*>& flows, int64_t patience_ns) {
  int64_t least = std::numeric_limits<int64_t>::max();
  int64_t pause_ns = kDeliveryPauseMinNs;
  for (int64_t taken_ns = NowNs(); NowNs() - taken_ns < patience_ns;) {
    int64_t left = 0;
    for (DataFlow* flow : flows) left += flow->Undelivered();
    if (left == 0) return;
    if (left < least) taken_ns = NowNs();
    least = std::min(least, left);
    const timespec pause = {0, pause_ns};
    (void)nanosleep(&pause, nullptr);
    pause_ns = std::min(2 * pause_ns, kDeliveryPauseMaxNs);
  }
}

void DataFlow::Close() {
  // Closing with unread bytes resets the connection, and what the peer has not got yet would be lost.
  (void)Undelivered();
  socket_.Reset();
}

void DataFlow::Add(Frame frame) {
  queued_bytes_ += frame.header.bytes;
  frames_.push_back(std::move(frame));
}

absl::Status DataFlow::Write(Sink* sink, int64_t* moved) {
  blocked_ = false;
  while (!frames_.empty()) {
    iovec parts[2 * kFramesMax];
    int count = 0;
    size_t skip = first_sent_, wanted = 0;
    for (Frame& frame : frames_) {
      const size_t header_skip = std::min(skip, sizeof frame.header);
      if (header_skip < sizeof frame.header) {
        parts[count++] = {reinterpret_cast<char*>(&frame.header) + header_skip,
                          sizeof frame.header - header_skip};
        wanted += sizeof frame.header - header_skip;
      }
      skip -= header_skip;
      if (frame.header.bytes > skip) {
        parts[count++] = {const_cast<std::byte*>(frame.payload) + skip, frame.header.bytes - skip};
        wanted += frame.header.bytes - skip;
      }
      skip = 0;
    }
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    const ssize_t sent = sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    // Out of kernel memory: it may be there next time, and the peer's reading frees some.
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS || errno == ENOMEM)) {
      blocked_ = true;
      return absl::OkStatus();
    }
    if (sent < 0) return Gone("send");
    *moved += sent;
    EndFrames(sink, sent);
    if (static_cast<size_t>(sent) < wanted) {
      blocked_ = true;
      return absl::OkStatus();
    }
  }
  return absl::OkStatus();
}

void DataFlow::EndFrames(Sink* sink, size_t sent) {
  first_sent_ += sent;
  while (!frames_.empty()) {
    const size_t whole = sizeof(DataHeader) + frames_.front().header.bytes;
    if (first_sent_ < whole) return;
    first_sent_ -= whole;
    const Frame frame = std::move(frames_.front());
    frames_.pop_front();
    queued_bytes_ -= frame.header.bytes;
    if (frame.owner != nullptr) sink->OnSent(frame.owner, frame.header);
  }
}

void DataFlow::Detach(uint64_t group) {
  for (Frame& frame : frames_) {
    if (frame.header.group != group || frame.owner == nullptr) continue;
    frame.kept = std::make_unique<std::byte[]>(frame.header.bytes);
    if (frame.header.bytes > 0) std::memcpy(frame.kept.get(), frame.payload, frame.header.bytes);
    frame.payload = frame.kept.get();
    frame.owner = nullptr;
  }
  if (in_payload_ && in_.group == group) target_ = nullptr;
}

void DataFlow::TakePayload(Sink* sink, size_t bytes) {
  if (target_ != nullptr) target_ += bytes;
  payload_left_ -= bytes;
  if (payload_left_ > 0) return;
  in_payload_ = false;
  sink->OnPayload(in_);
}

absl::Status DataFlow::Consume(Sink* sink) {
  while (begin_ < end_) {
    if (in_payload_) {
      const size_t take = std::min(end_ - begin_, payload_left_);
      if (target_ != nullptr) std::memcpy(target_, buffer_.data() + begin_, take);
      begin_ += take;
      TakePayload(sink, take);
      continue;
    }
    if (end_ - begin_ < sizeof(DataHeader)) break;
    SHOAL_RETURN_IF_ERROR(ParseDataHeader(buffer_.data() + begin_, epoch_, &in_));
    begin_ += sizeof(DataHeader);
    SHOAL_ASSIGN_OR_RETURN(target_, sink->OnHeader(in_));
    payload_left_ = in_.bytes;
    in_payload_ = payload_left_ > 0;
  }
  // The beginning of a header stays.
  std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
  end_ -= begin_;
  begin_ = 0;
  return absl::OkStatus();
}

absl::StatusOr<DataFlow::Progress> DataFlow::Read(Sink* sink, int64_t budget, int64_t* moved) {
  while (budget > 0) {
    const bool direct = in_payload_ && target_ != nullptr && payload_left_ >= kDirectBytes;
    // Behind a large payload only the next header is read ahead: what follows it is large as well, and is not
    // copied twice.
    iovec parts[2] = {{target_, payload_left_}, {buffer_.data() + end_, sizeof(DataHeader)}};
    if (!direct) parts[1].iov_len = std::min(ahead_, buffer_.size()) - end_;
    msghdr message = {};
    message.msg_iov = direct ? parts : parts + 1;
    message.msg_iovlen = direct ? 2 : 1;
    const size_t room = direct ? parts[0].iov_len + parts[1].iov_len : parts[1].iov_len;
    const ssize_t got = recvmsg(socket_.get(), &message, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Progress::kNothingMore;
    if (got < 0) return Gone("receive");
    if (got == 0) return Progress::kEnd;
    *moved += got;
    budget -= got;
    const size_t straight = direct ? std::min<size_t>(got, payload_left_) : 0;
    if (straight > 0) TakePayload(sink, straight);
    end_ += got - straight;
    SHOAL_RETURN_IF_ERROR(Consume(sink));
    const bool large = in_payload_ && payload_left_ >= kDirectBytes;
    if (large) ahead_ = kAheadBytes;
    if (!direct && !large && static_cast<size_t>(got) == room) ahead_ = std::min(2 * ahead_, kBufferBytes);
    // A short read has emptied the socket: what comes now announces itself.
    if (static_cast<size_t>(got) < room) return Progress::kNothingMore;
  }
  return Progress::kMore;
}

}  // namespace shoal
