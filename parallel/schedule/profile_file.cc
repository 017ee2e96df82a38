#include "parallel/schedule/profile_file.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using Json = nlohmann::json;

enum class Unit : uint8_t { kNone, kBytes, kTokens, kRows, kElements };

Unit UnitOf(Op op) {
  switch (op) {
    case Op::kEmbed:
    case Op::kAttention:
    case Op::kDense:
    case Op::kRoute:
    case Op::kArrange:
    case Op::kShared:
    case Op::kHead: return Unit::kTokens;
    case Op::kPack:
    case Op::kExperts:
    case Op::kExpertsWeight:
    case Op::kCombine: return Unit::kRows;
    case Op::kNorm:
    case Op::kUpdate: return Unit::kElements;
    case Op::kBalance:
    case Op::kRelease: return Unit::kNone;
    default: return Unit::kBytes;
  }
}

std::string UnitsText(Op op, double low, double high) {
  const auto range = [&](const char* unit, double scale) {
    if (high - low < 0.01 * high) return absl::StrFormat("%.4g %s", high / scale, unit);
    return absl::StrFormat("%.3g-%.4g %s", low / scale, high / scale, unit);
  };
  switch (UnitOf(op)) {
    case Unit::kNone: return "";
    case Unit::kBytes: return high < 1e5 ? range("kB", 1e3) : range("MB", 1e6);
    case Unit::kTokens: return range("tokens", 1);
    case Unit::kRows: return range("rows", 1);
    case Unit::kElements: return range("M elements", 1e6);
  }
  return "";
}

std::string RateText(Op op, const CostModel& model) {
  if (model.ns_per_unit <= 0) return "";
  switch (UnitOf(op)) {
    case Unit::kNone: return "";
    case Unit::kBytes: return absl::StrFormat("%.3g GB/s", 1 / model.ns_per_unit);
    case Unit::kTokens: return absl::StrFormat("%.4g ns/token", model.ns_per_unit);
    case Unit::kRows: return absl::StrFormat("%.4g ns/row", model.ns_per_unit);
    case Unit::kElements: return absl::StrFormat("%.4g ns/element", model.ns_per_unit);
  }
  return "";
}

// The value of the enumerator with that name; `limit` of none.
template <class Enum> int Parse(const std::string& name, int limit) {
  for (int i = 0; i < limit; ++i) {
    if (Name(static_cast<Enum>(i)) == name) return i;
  }
  return limit;
}

absl::StatusOr<double> Number(const Json& object, const char* field) {
  const auto found = object.find(field);
  if (found == object.end() || !found->is_number() || !std::isfinite(found->get<double>()) || found->get<double>() < 0) {
    return absl::InvalidArgumentError(absl::StrCat("`", field, "` must be a number of at least 0"));
  }
  return found->get<double>();
}

absl::StatusOr<int> Enumerator(const Json& object, const char* field, int (*parse)(const std::string&, int), int limit) {
  const auto found = object.find(field);
  const std::string name = found != object.end() && found->is_string() ? found->get<std::string>() : "";
  const int value = parse(name, limit);
  if (value == limit) return absl::InvalidArgumentError(absl::StrCat("`", field, "`: there is no \"", name, "\""));
  return value;
}

absl::StatusOr<CostEstimate> ParseCost(const Json& json) {
  if (!json.is_object()) return absl::InvalidArgumentError("not an object");
  CostEstimate cost;
  SHOAL_ASSIGN_OR_RETURN(const int op, Enumerator(json, "op", Parse<Op>, kOps));
  SHOAL_ASSIGN_OR_RETURN(const int phase, Enumerator(json, "phase", Parse<Phase>, static_cast<int>(Phase::kUpdate) + 1));
  SHOAL_ASSIGN_OR_RETURN(const int lane, Enumerator(json, "lane", Parse<Lane>, kLanes));
  cost.key = {static_cast<Op>(op), static_cast<Phase>(phase), static_cast<Lane>(lane)};
  SHOAL_ASSIGN_OR_RETURN(cost.model.fixed_ns, Number(json, "fixed_ns"));
  SHOAL_ASSIGN_OR_RETURN(cost.model.ns_per_unit, Number(json, "ns_per_unit"));
  SHOAL_ASSIGN_OR_RETURN(cost.residual, Number(json, "residual"));
  SHOAL_ASSIGN_OR_RETURN(const double samples, Number(json, "samples"));
  cost.samples = std::llround(std::min(samples, 1e15));
  SHOAL_ASSIGN_OR_RETURN(cost.units_low, Number(json, "units_low"));
  SHOAL_ASSIGN_OR_RETURN(cost.units_high, Number(json, "units_high"));
  SHOAL_ASSIGN_OR_RETURN(cost.step_ns, Number(json, "step_ns"));
  return cost;
}

}  // namespace

std::string ToJson(const ProfileFile& file) {
  Json costs = Json::array();
  for (const CostEstimate& cost : file.profile.costs) {
    costs.push_back({{"op", Name(cost.key.op)},
                     {"phase", Name(cost.key.phase)},
                     {"lane", Name(cost.key.lane)},
                     {"fixed_ns", cost.model.fixed_ns},
                     {"ns_per_unit", cost.model.ns_per_unit},
                     {"residual", cost.residual},
                     {"samples", cost.samples},
                     {"units_low", cost.units_low},
                     {"units_high", cost.units_high},
                     {"step_ns", cost.step_ns}});
  }
  const Json json = {
      {"version", 1}, {"about", file.about}, {"interference", file.profile.interference}, {"costs", std::move(costs)}};
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

absl::StatusOr<ProfileFile> ProfileFromJson(std::string_view text) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InvalidArgumentError("not a JSON object");
  const auto about = json.find("about"), costs = json.find("costs"), version = json.find("version");
  if (version == json.end() || *version != 1) return absl::InvalidArgumentError("`version` is not 1");
  if (about == json.end() || !about->is_string()) return absl::InvalidArgumentError("`about` must be a text");
  if (costs == json.end() || !costs->is_array()) return absl::InvalidArgumentError("`costs` must be a list");
  ProfileFile file;
  file.about = about->get<std::string>();
  SHOAL_ASSIGN_OR_RETURN(file.profile.interference, Number(json, "interference"));
  for (size_t i = 0; i < costs->size(); ++i) {
    SHOAL_ASSIGN_OR_RETURN(CostEstimate cost, ParseCost((*costs)[i]), "costs[", i, "]");
    file.profile.costs.push_back(cost);
  }
  return file;
}

std::string ProfileText(const ProfileFile& file) {
  std::vector<CostEstimate> costs = file.profile.costs;
  std::stable_sort(costs.begin(), costs.end(), [](const CostEstimate& a, const CostEstimate& b) { return a.step_ns > b.step_ns; });
  std::string text = absl::StrCat(file.about, "\n");
  absl::StrAppendFormat(&text, "communication is %.2f times slower while the other lane communicates\n\n",
                        file.profile.interference);
  absl::StrAppendFormat(&text, "%-15s %-9s %-8s %10s %11s %16s  %-24s %9s %8s\n", "op", "phase", "lane", "ms a step", "fixed us",
                        "rate", "measured at", "residual", "samples");
  for (const CostEstimate& cost : costs) {
    absl::StrAppendFormat(&text, "%-15s %-9s %-8s %10.3f %11.1f %16s  %-24s %8.1f%% %8d\n", AbslSv(Name(cost.key.op)),
                          AbslSv(Name(cost.key.phase)), AbslSv(Name(cost.key.lane)), cost.step_ns / 1e6,
                          cost.model.fixed_ns / 1e3, RateText(cost.key.op, cost.model),
                          UnitsText(cost.key.op, cost.units_low, cost.units_high), 100 * cost.residual, cost.samples);
  }
  return text;
}

}  // namespace shoal
