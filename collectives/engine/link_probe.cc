#include "collectives/engine/link_probe.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr uint32_t kProbeTag = 0xfffffffe;
constexpr int64_t kSmallBytes = 8, kLargeBytes = 64 << 10, kLargestBytes = 512 << 10;
// Of kLargeBytes. What takes no longer may not have met the rate of its link: cards and switches let so much through at once.
constexpr int64_t kBurstNs = 150'000;
constexpr int kRepeats = 3;
constexpr int64_t kTotalNs = 1'000'000'000;  // For all pairs, unless a link takes longer for one message of each size.

class Prober {
 public:
  Prober(Communicator& group, absl::Time deadline)
      : group_(group),
        options_{.deadline = deadline, .label = "link probe"},
        buffer_(Zeros({kLargestBytes}, DType::kU8)),
        next_(Zeros({1}, DType::kI64)) {}

  absl::Status Send(const Tensor& data, int to) { return group_.Send(data, to, kProbeTag, options_).Await(); }
  absl::Status Receive(const Tensor& data, int from) { return group_.Receive(data, from, kProbeTag, options_).Await(); }

  // The lower rank of a pair says how many bytes go to and fro next, until it knows enough.
  absl::StatusOr<Link> Lead(int peer) {
    const int64_t until_ns = NowNs() + kTotalNs / ProbeRounds(group_.size());
    SHOAL_ASSIGN_OR_RETURN(const int64_t small_ns, RoundTrip(peer, kSmallBytes, until_ns));
    SHOAL_ASSIGN_OR_RETURN(const int64_t less_ns, RoundTrip(peer, kLargeBytes, until_ns));
    int64_t bytes = kLargeBytes, transfer_ns = (less_ns - small_ns) / 2;
    if (transfer_ns < kBurstNs) {
      SHOAL_ASSIGN_OR_RETURN(const int64_t more_ns, RoundTrip(peer, kLargestBytes, until_ns));
      bytes = kLargestBytes - kLargeBytes;
      transfer_ns = (more_ns - less_ns) / 2;
    }
    SHOAL_RETURN_IF_ERROR(Announce(peer, 0));
    return Link{small_ns / 2, bytes * 1'000'000 / std::max<int64_t>(1'000, transfer_ns)};
  }

  absl::Status Follow(int peer) {
    while (true) {
      SHOAL_RETURN_IF_ERROR(Receive(next_, peer));
      const int64_t bytes = *next_.data<int64_t>();
      if (bytes == 0) return absl::OkStatus();
      const Tensor data = buffer_.Elements(0, {std::clamp(bytes, kSmallBytes, kLargestBytes)});
      SHOAL_RETURN_IF_ERROR(Receive(data, peer));
      SHOAL_RETURN_IF_ERROR(Send(data, peer));
    }
  }

  // Everybody's rows, by way of rank 0: these messages stand outside of the order of collectives.
  absl::Status Gather(const Tensor& all, int64_t row) {
    const int me = group_.index();
    if (me != 0) {
      SHOAL_RETURN_IF_ERROR(Send(all.Elements(me * row, {row}), 0));
      return Receive(all, 0);
    }
    for (int rank = 1; rank < group_.size(); ++rank) {
      SHOAL_RETURN_IF_ERROR(Receive(all.Elements(rank * row, {row}), rank));
    }
    for (int rank = 1; rank < group_.size(); ++rank) SHOAL_RETURN_IF_ERROR(Send(all, rank));
    return absl::OkStatus();
  }

 private:
  absl::Status Announce(int peer, int64_t bytes) {
    *next_.data<int64_t>() = bytes;
    return Send(next_, peer);
  }

  // The shortest of some; of one when there is no time for more.
  absl::StatusOr<int64_t> RoundTrip(int peer, int64_t bytes, int64_t until_ns) {
    const Tensor data = buffer_.Elements(0, {bytes});
    int64_t best_ns = std::numeric_limits<int64_t>::max();
    for (int i = 0; i == 0 || (i < kRepeats && NowNs() < until_ns); ++i) {
      SHOAL_RETURN_IF_ERROR(Announce(peer, bytes));
      const int64_t begin_ns = NowNs();
      SHOAL_RETURN_IF_ERROR(Send(data, peer));
      SHOAL_RETURN_IF_ERROR(Receive(data, peer));
      best_ns = std::min(best_ns, NowNs() - begin_ns);
    }
    return best_ns;
  }

  Communicator& group_;
  const OpOptions options_;
  const Tensor buffer_, next_;
};

}  // namespace

// All but the last rank sit round a table; who would meet himself meets the last one, if there is one.
int PartnerIn(int round, int rank, int size) {
  const int table = ProbeRounds(size);  // Odd.
  if (rank == table) {
    for (int other = 0; other < table; ++other) {
      if (2 * other % table == round % table) return other;
    }
  }
  const int partner = ((round - rank) % table + table) % table;
  if (partner != rank) return partner;
  return table < size ? table : -1;
}

absl::StatusOr<CostModel> ProbeLinks(Communicator& group, CostModel model, absl::Time deadline) {
  const int size = group.size(), me = group.index();
  const std::vector<int>& host = model.topology.host;
  Prober prober(group, deadline);
  const Tensor all = Zeros({size * size * 2}, DType::kI64);
  int64_t* const values = all.data<int64_t>();
  for (int round = 0; round < ProbeRounds(size); ++round) {
    const int peer = PartnerIn(round, me, size);
    if (peer < 0 || host[peer] == host[me]) continue;
    if (me > peer) {
      SHOAL_RETURN_IF_ERROR(prober.Follow(peer));
      continue;
    }
    SHOAL_ASSIGN_OR_RETURN(const Link link, prober.Lead(peer));
    values[(me * size + peer) * 2] = link.latency_ns;
    values[(me * size + peer) * 2 + 1] = link.bytes_per_ms;
  }
  SHOAL_RETURN_IF_ERROR(prober.Gather(all, size * 2));
  for (int a = 0; a < size; ++a) {
    for (int b = a + 1; b < size; ++b) {
      if (host[a] == host[b]) continue;
      const int64_t* const measured = values + (a * size + b) * 2;
      // Times vary; who differs little is taken to be alike, so that noise makes no order.
      const Link link = {std::max<int64_t>(1'000, measured[0] / 1'000 * 1'000), std::max<int64_t>(1, measured[1])};
      model.links[a * size + b] = model.links[b * size + a] = link;
    }
  }
  model.topology.order = RingOrder(model.links, size);
  return model;
}

}  // namespace shoal
