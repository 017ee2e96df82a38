// The messages of two ranks (processes) over loopback TCP: DataMesh against plain sockets with the same
// bytes, in alternation. Usage: bench_tcp_channel [flows].
//
//   ping   one message there and back, half the round trip
//   both   both send and receive at the same time, as the steps of a ring do
//
// Plain sockets: `ping` spins on recv and send; `both` polls one socket for reading and writing.
#include "collectives/engine/tcp/tcp_channel.h"

#include <poll.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "collectives/transport/clock.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

class Life final : public GroupLife {
 public:
  explicit Life(int index) : GroupLife(1, {0, 1}, index) {}
  absl::Status status() const override { return absl::OkStatus(); }
  absl::Status End(const std::string&) override { return absl::OkStatus(); }
};

struct Rank {
  int index;
  TcpChannel* channel;
  int plain;  // A socket to the other rank.
  std::vector<std::byte> out, in;
  uint64_t op = 0;
};

void AwaitBoth(Rank& rank, size_t count) {
  std::vector<Channel::Event> events;
  while (true) {
    SHOAL_CHECK_OK(rank.channel->Poll(&events));
    if (events.size() >= count) return;
    SHOAL_CHECK_OK(rank.channel->Wait(NowNs() + 10'000'000'000));
  }
}

void MeshPing(Rank& rank, int64_t bytes) {
  const int other = 1 - rank.index;
  const MessageId there = {++rank.op, 0, 1}, back = {++rank.op, 0, 1};
  rank.channel->Receive(other, rank.index == 0 ? back : there, rank.in.data(), bytes, 1);
  if (rank.index == 0) rank.channel->Send(other, there, rank.out.data(), bytes, 2);
  AwaitBoth(rank, 1 + (rank.index == 0 ? 1 : 0));
  if (rank.index == 1) {
    rank.channel->Send(other, back, rank.out.data(), bytes, 2);
    AwaitBoth(rank, 1);
  }
  rank.channel->Finish(there);
  rank.channel->Finish(back);
}

void MeshBoth(Rank& rank, int64_t bytes) {
  const int other = 1 - rank.index;
  const MessageId id = {++rank.op, 0, 1};
  rank.channel->Receive(other, id, rank.in.data(), bytes, 1);
  rank.channel->Send(other, id, rank.out.data(), bytes, 2);
  AwaitBoth(rank, 2);
  rank.channel->Finish(id);
}

// Moves both directions at once, one of them may be empty. Spins.
void PlainMove(Rank& rank, int64_t to_send, int64_t to_receive) {
  const std::byte* out = rank.out.data();
  std::byte* in = rank.in.data();
  while (to_send > 0 || to_receive > 0) {
    bool moved = false;
    if (to_send > 0) {
      const ssize_t sent = send(rank.plain, out, to_send, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent > 0) out += sent, to_send -= sent, moved = true;
    }
    if (to_receive > 0) {
      const ssize_t got = recv(rank.plain, in, to_receive, MSG_DONTWAIT);
      SHOAL_CHECK(got != 0);
      if (got > 0) in += got, to_receive -= got, moved = true;
    }
    if (!moved) (void)sched_yield();
  }
}

void PlainPing(Rank& rank, int64_t bytes) {
  if (rank.index == 0) PlainMove(rank, bytes, 0);
  PlainMove(rank, 0, bytes);
  if (rank.index == 1) PlainMove(rank, bytes, 0);
}

void PlainBoth(Rank& rank, int64_t bytes) { PlainMove(rank, bytes, bytes); }

using Way = void (*)(Rank&, int64_t);

// Median of some rounds, in us per call. Ways take turns, round by round; a barrier (a plain byte) lies
// between.
std::vector<double> Measure(Rank& rank, const std::vector<Way>& ways, int64_t bytes) {
  const int calls = std::clamp<int64_t>((8 << 20) / std::max<int64_t>(bytes, 1), 1, 300);
  constexpr int kRounds = 15;
  std::vector<std::vector<double>> us(ways.size());
  for (int round = 0; round < kRounds; ++round) {
    for (size_t way = 0; way < ways.size(); ++way) {
      PlainMove(rank, 1, 1);
      const int64_t begin_ns = NowNs();
      for (int call = 0; call < calls; ++call) ways[way](rank, bytes);
      us[way].push_back((NowNs() - begin_ns) * 1e-3 / calls);
    }
  }
  std::vector<double> medians;
  for (auto& values : us) {
    std::sort(values.begin(), values.end());
    medians.push_back(values[values.size() / 2]);
  }
  return medians;
}

void RunRank(int index, std::vector<Fd> flows, Fd plain) {
  std::vector<DataPeer> peers(2);
  peers[1 - index] = {absl::StrCat("rank ", 1 - index), std::move(flows)};
  const auto mesh = *DataMesh::Create(1, std::move(peers));
  Life life(index);
  TcpChannel channel(mesh.get(), &life);
  constexpr int64_t kMostBytes = 64 << 20;
  Rank rank = {index, &channel, plain.get(), {}, {}};
  rank.out.assign(kMostBytes, std::byte{static_cast<unsigned char>(index + 1)});
  rank.in.assign(kMostBytes, std::byte{0});
  MeshBoth(rank, kMostBytes);
  SHOAL_CHECK(rank.in[kMostBytes - 1] == std::byte{static_cast<unsigned char>(2 - index)});
  if (index == 0)
    std::printf("%12s %6s %12s %12s %10s %8s\n", "bytes", "", "mesh us", "sockets us", "mesh GB/s", "share");
  for (int64_t bytes = 8; bytes <= kMostBytes; bytes *= bytes < 8192 ? 16 : 8) {
    for (const bool both : {false, true}) {
      const std::vector<double> us =
          both ? Measure(rank, {MeshBoth, PlainBoth}, bytes) : Measure(rank, {MeshPing, PlainPing}, bytes);
      if (index != 0) continue;
      const double part = both ? 1 : 0.5;
      std::printf("%12lld %6s %12.2f %12.2f %10.2f %7.0f%%\n", static_cast<long long>(bytes),
                  both ? "both" : "ping", us[0] * part, us[1] * part,
                  bytes * (both ? 2 : 1) / (us[0] * part) * 1e-3, 100 * us[1] / us[0]);
    }
  }
}

int Main(int flow_count) {
  Fd listener = *Listen(AnyAddress(AF_INET, /*loopback_only=*/true));
  std::vector<Fd> dialled, accepted;
  for (int i = 0; i < flow_count + 1; ++i) {
    dialled.push_back(*Dial(LocalAddressOf(listener.get()), NowNs() + 1'000'000'000));
    SHOAL_CHECK(PollOne(listener.get(), POLLIN, NowNs() + 1'000'000'000));
    accepted.push_back(*Accept(listener.get()));
  }
  const pid_t child = fork();
  std::vector<Fd>& mine = child == 0 ? dialled : accepted;
  (child == 0 ? accepted : dialled).clear();
  Fd plain = std::move(mine.back());
  mine.pop_back();
  RunRank(child == 0 ? 1 : 0, std::move(mine), std::move(plain));
  if (child == 0) _exit(0);
  int status = 0;
  (void)waitpid(child, &status, 0);
  return status;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) { return shoal::Main(argc > 1 ? std::atoi(argv[1]) : 1); }
