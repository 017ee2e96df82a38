#include "tests/sim/referee.h"

#include <cstring>

#include "runtime/base/status.h"

namespace shoal::sim {

std::string Referee::Name(const View& view) {
  return absl::StrCat("epoch ", static_cast<uint64_t>(view.epoch), " of lineage ", view.lineage);
}

void Referee::Fail(std::string violation) {
  if (violations_.size() < 10) violations_.push_back(std::move(violation));
}

void Referee::OnView(const View& view, uint64_t member) {
  const Key key = {view.lineage, static_cast<uint64_t>(view.epoch)};
  const std::string bytes = Encode(view);
  if (views_.emplace(key, bytes).first->second != bytes) Fail(absl::StrCat("two views in ", Name(view)));
  if (member == 0) return;
  if (view.RankOf(member) < 0)
    Fail(absl::StrCat("member ", member, " is in ", Name(view), " without being in its view"));
  const auto [newest, first] = newest_.emplace(member, key);
  if (first) return;
  if (newest->second.first != key.first)
    Fail(absl::StrCat("member ", member, " changes from lineage ", newest->second.first, " into ",
                      Name(view)));
  if (newest->second.second >= key.second)
    Fail(
        absl::StrCat("member ", member, " goes back from epoch ", newest->second.second, " to ", Name(view)));
  newest->second = key;
}

void Referee::OnSum(const View& view, uint64_t member, uint64_t op, const std::vector<float>& result,
                    const std::vector<float>& expected) {
  ++sums_;
  const std::string what = absl::StrCat("all_reduce ", op, " of ", Name(view), " on member ", member);
  const Key key = {view.lineage, static_cast<uint64_t>(view.epoch)};
  const auto newest = newest_.find(member);
  if (newest == newest_.end() || newest->second != key) Fail(absl::StrCat(what, ": not the member's epoch"));
  if (view.RankOf(member) < 0) Fail(absl::StrCat(what, ": not a member"));
  if (result != expected) Fail(absl::StrCat(what, ": not the sum over the view"));
  const std::vector<float>& others = results_.emplace(std::pair(key, op), result).first->second;
  if (others.size() != result.size() ||
      std::memcmp(others.data(), result.data(), result.size() * sizeof(float)) != 0)
    Fail(absl::StrCat(what, ": other bits than on other ranks"));
}

}  // namespace shoal::sim
