#include "collectives/engine/link_probe.h"

#include <algorithm>
#include <utility>

#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr uint32_t kProbeTag = 0xfffffffe;
constexpr int64_t kLargeBytes = 64 << 10;
constexpr int kRepeats = 3;

class Prober {
 public:
  Prober(Communicator& group, absl::Time deadline)
      : group_(group), options_{.deadline = deadline, .label = "link probe"}, buffer_(Zeros({kLargeBytes}, DType::kU8)) {}

  absl::Status Send(const Tensor& data, int to) { return group_.Send(data, to, kProbeTag, options_).Await(); }
  absl::Status Receive(const Tensor& data, int from) { return group_.Receive(data, from, kProbeTag, options_).Await(); }

  // The shortest of some round trips. The lower rank begins and measures; the other one gets 0.
  absl::StatusOr<int64_t> RoundTrip(int peer, int64_t bytes) {
    const Tensor data = buffer_.Elements(0, {bytes});
    int64_t best_ns = 0;
    for (int i = 0; i < kRepeats; ++i) {
      if (group_.index() > peer) {
        SHOAL_RETURN_IF_ERROR(Receive(data, peer));
        SHOAL_RETURN_IF_ERROR(Send(data, peer));
        continue;
      }
      const int64_t begin_ns = NowNs();
      SHOAL_RETURN_IF_ERROR(Send(data, peer));
      SHOAL_RETURN_IF_ERROR(Receive(data, peer));
      const int64_t ns = std::max<int64_t>(1, NowNs() - begin_ns);
      best_ns = best_ns == 0 ? ns : std::min(best_ns, ns);
    }
    return best_ns;
  }

  absl::StatusOr<Link> Measure(int peer) {
    SHOAL_ASSIGN_OR_RETURN(const int64_t short_ns, RoundTrip(peer, 8));
    SHOAL_ASSIGN_OR_RETURN(const int64_t long_ns, RoundTrip(peer, kLargeBytes));
    const int64_t transfer_ns = std::max<int64_t>(1'000, (long_ns - short_ns) / 2);
    return Link{short_ns / 2, kLargeBytes * 1'000'000 / transfer_ns};
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
  Communicator& group_;
  const OpOptions options_;
  const Tensor buffer_;
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
    SHOAL_ASSIGN_OR_RETURN(const Link link, prober.Measure(peer));
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
