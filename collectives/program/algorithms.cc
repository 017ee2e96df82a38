#include "collectives/program/algorithms.h"

#include "absl/strings/str_cat.h"
#include "collectives/program/families.h"
#include "runtime/base/status.h"

namespace shoal {

absl::Span<const Algorithm> Algorithms() {
  static const auto* const all = [] {
    auto* const algorithms = new std::vector<Algorithm>;
    for (absl::Span<const Algorithm> family : 
         {DirectAlgorithms(), RingAlgorithms(), RecursiveAlgorithms(), TreeAlgorithms(), AllToAllAlgorithms(),
          TwoLevelAlgorithms(), SparseAlgorithms()}) {
      algorithms->insert(algorithms->end(), family.begin(), family.end());
    }
    return algorithms;
  }();
  return *all;
}

absl::StatusOr<const Algorithm*> FindAlgorithm(std::string_view name, const Problem& problem) {
  bool known = false;
  for (const Algorithm& algorithm : Algorithms()) {
    if (algorithm.name != name) continue;
    if (algorithm.applies(problem)) return &algorithm;
    known = true;
  }
  if (known) {
    return absl::InvalidArgumentError(absl::StrCat("algorithm ", AbslSv(name), " cannot do ", AbslSv(OpKindName(problem.kind)),
                                                   " of ", problem.size, " ranks like this"));
  }
  return absl::InvalidArgumentError(absl::StrCat("no algorithm is called ", AbslSv(name)));
}

}  // namespace shoal
