#include "launch/agent/agent_options.h"

#include <algorithm>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int kProcessesMax = 1 << 16;
constexpr int kDefaultPort = 29500;  // torchrun's static backend.

enum class Use : uint8_t { kTaken, kIgnored };
enum class Takes : uint8_t { kValue, kNothing };

struct FlagInfo {
  std::string_view name;
  Use use;
  Takes takes;
  std::string_view value;
  std::string_view help;
};

constexpr FlagInfo kFlags[] = {
    {"nproc-per-node", Use::kTaken, Takes::kValue, "N",
     "ranks on this host: a number, or auto (usable cores)"},
    {"nnodes", Use::kTaken, Takes::kValue, "N", "hosts of the job; run the same command on each (default 1)"},
    {"node-rank", Use::kTaken, Takes::kValue, "R", "which of them this is, from 0 (default 0)"},
    {"rdzv-endpoint", Use::kTaken, Takes::kValue, "HOST[:PORT]",
     "where host 0 is reached (default 127.0.0.1:29500 with several hosts, no port at all with one)"},
    {"rdzv-backend", Use::kTaken, Takes::kValue, "static", "static is what there is"},
    {"rdzv-id", Use::kTaken, Takes::kValue, "ID", "name of the job; ranks of another job are refused"},
    {"master-addr", Use::kTaken, Takes::kValue, "HOST",
     "the host of --rdzv-endpoint, where that is not given"},
    {"master-port", Use::kTaken, Takes::kValue, "PORT",
     "the port of --rdzv-endpoint, where that is not given"},
    {"standalone", Use::kTaken, Takes::kNothing, "", "one host, no port"},
    {"log-dir", Use::kTaken, Takes::kValue, "DIR", "rank-N.log of every rank of this host"},
    {"max-restarts", Use::kIgnored, Takes::kValue, "", ""},
    {"monitor-interval", Use::kIgnored, Takes::kValue, "", ""},
    {"rdzv-conf", Use::kIgnored, Takes::kValue, "", ""},
    {"start-method", Use::kIgnored, Takes::kValue, "", ""},
    {"role", Use::kIgnored, Takes::kValue, "", ""},
    {"redirects", Use::kIgnored, Takes::kValue, "", ""},
    {"tee", Use::kIgnored, Takes::kValue, "", ""},
    {"local-ranks-filter", Use::kIgnored, Takes::kValue, "", ""},
    {"local-addr", Use::kIgnored, Takes::kValue, "", ""},
    {"logs-specs", Use::kIgnored, Takes::kValue, "", ""},
    {"event-log-handler", Use::kIgnored, Takes::kValue, "", ""},
    {"numa-binding", Use::kIgnored, Takes::kValue, "", ""},
    {"signals-to-handle", Use::kIgnored, Takes::kValue, "", ""},
    {"no-python", Use::kIgnored, Takes::kNothing, "", ""},
};

const FlagInfo* FindFlag(std::string_view name) {
  for (const FlagInfo& flag : kFlags) {
    if (flag.name == name) return &flag;
  }
  return nullptr;
}

std::optional<std::string> Value(const RawLaunchFlags& flags, const std::string& name) {
  const auto found = flags.values.find(name);
  if (found == flags.values.end()) return std::nullopt;
  return found->second;
}

absl::Status BadFlag(std::string_view name, std::string_view value, std::string_view want) {
  return absl::InvalidArgumentError(absl::StrCat("--", AbslSv(name), "=", AbslSv(value), ": ", AbslSv(want)));
}

absl::StatusOr<int> ParseNumber(std::string_view name, const std::string& value, int low, int high) {
  int number = 0;
  if (!absl::SimpleAtoi(value, &number) || number < low || number > high) {
    return BadFlag(name, value, absl::StrFormat("want a number in %d to %d", low, high));
  }
  return number;
}

absl::StatusOr<int> ParseNproc(const RawLaunchFlags& flags, const std::string& value) {
  if (value == "auto" || value == "cpu") return std::max(1, flags.usable_cores);
  if (value == "gpu" || value == "cuda" || value == "xpu") {
    return absl::UnimplementedError(
        absl::StrCat("--nproc-per-node=", value, ": this build computes on CPUs; give a number, or auto"));
  }
  int number = 0;
  if (!absl::SimpleAtoi(value, &number) || number < 1 || number > kProcessesMax) {
    return BadFlag("nproc-per-node", value, "want a number of ranks, or auto (usable cores)");
  }
  return number;
}

absl::StatusOr<int> ParseNnodes(const std::string& value) {
  const size_t colon = value.find(':');
  SHOAL_ASSIGN_OR_RETURN(const int low, ParseNumber("nnodes", value.substr(0, colon), 1, kProcessesMax));
  if (colon == std::string::npos) return low;
  SHOAL_ASSIGN_OR_RETURN(const int high, ParseNumber("nnodes", value.substr(colon + 1), low, kProcessesMax));
  if (low == high) return low;
  return absl::UnimplementedError(
      absl::StrCat("--nnodes=", value, ": elastic jobs are not supported yet; give one number of hosts"));
}

absl::Status CheckBackend(const RawLaunchFlags& flags, AgentOptions* options) {
  const std::string backend = Value(flags, "rdzv-backend").value_or("static");
  if (backend == "static") return absl::OkStatus();
  if (backend == "c10d" && (options->nnodes == 1 || Value(flags, "node-rank").has_value())) {
    options->warnings.push_back(
        "--rdzv-backend=c10d: used as static; --node-rank says which host is the first");
    return absl::OkStatus();
  }
  return absl::UnimplementedError(
      absl::StrCat("--rdzv-backend=", backend,
                   ": static is supported: give every host --node-rank, and all the same "
                   "--rdzv-endpoint of host 0"));
}

absl::Status SetEndpoint(const RawLaunchFlags& flags, AgentOptions* options) {
  const bool standalone = flags.values.count("standalone") > 0;
  if (standalone && options->nnodes > 1) {
    return BadFlag("standalone", "true", absl::StrCat("means one host, but --nnodes=", options->nnodes));
  }
  int port = kDefaultPort;
  if (const auto value = Value(flags, "master-port"); value.has_value()) {
    SHOAL_ASSIGN_OR_RETURN(port, ParseNumber("master-port", *value, 1, 65535));
  }
  std::string text = Value(flags, "rdzv-endpoint").value_or("");
  std::string_view name = "--rdzv-endpoint";
  if (text.empty()) {
    const auto address = Value(flags, "master-addr");
    name = "--master-addr";
    text = address.value_or("127.0.0.1");
    if (text.find(':') != std::string::npos && text.front() != '[') text = absl::StrCat("[", text, "]");
    const bool asked = address.has_value() || flags.values.count("master-port") > 0;
    if (options->nnodes == 1 && !asked) return absl::OkStatus();
  }
  if (standalone) {
    options->warnings.push_back("--standalone: the rendezvous endpoint is ignored");
    return absl::OkStatus();
  }
  SHOAL_ASSIGN_OR_RETURN(const HostPort endpoint, ParseHostPort(text, port), AbslSv(name));
  const bool v6 = endpoint.host.find(':') != std::string::npos;
  options->rdzv_endpoint = absl::StrCat(v6 ? "[" : "", endpoint.host, v6 ? "]:" : ":", endpoint.port);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<bool> TakeLaunchFlag(absl::Span<const std::string> args, size_t* index,
                                    RawLaunchFlags* flags) {
  const std::string& arg = args[*index];
  if (arg.rfind("--", 0) != 0) return false;
  const size_t equals = arg.find('=');
  std::string name = arg.substr(2, equals == std::string::npos ? equals : equals - 2);
  std::replace(name.begin(), name.end(), '_', '-');
  const FlagInfo* flag = FindFlag(name);
  if (flag == nullptr) return false;
  std::string value = "true";
  if (equals != std::string::npos) {
    value = arg.substr(equals + 1);
  } else if (flag->takes == Takes::kValue) {
    if (*index + 1 >= args.size())
      return absl::InvalidArgumentError(absl::StrCat("--", name, ": the value is missing"));
    value = args[++*index];
  }
  ++*index;
  flags->values[name] = value;
  return true;
}

void AddPetVariables(const GetEnv& getenv, RawLaunchFlags* flags) {
  for (const FlagInfo& flag : kFlags) {
    std::string name(flag.name);
    std::replace(name.begin(), name.end(), '-', '_');
    const auto value = getenv(absl::StrCat("PET_", absl::AsciiStrToUpper(name)));
    if (!value.has_value()) continue;
    if (flag.takes == Takes::kNothing && *value != "1" && *value != "true") continue;
    flags->values.emplace(flag.name, *value);
  }
}

std::string LaunchFlagsHelp() {
  std::string text;
  for (const FlagInfo& flag : kFlags) {
    if (flag.use == Use::kIgnored) continue;
    const std::string left =
        absl::StrCat("--", AbslSv(flag.name), flag.value.empty() ? "" : " ", AbslSv(flag.value));
    absl::StrAppend(&text, absl::StrFormat("  %-28s %s\n", left, flag.help));
  }
  return text;
}

absl::StatusOr<AgentOptions> MakeAgentOptions(const RawLaunchFlags& flags) {
  AgentOptions options;
  SHOAL_ASSIGN_OR_RETURN(options.nproc_per_node,
                         ParseNproc(flags, Value(flags, "nproc-per-node").value_or("1")));
  SHOAL_ASSIGN_OR_RETURN(options.nnodes, ParseNnodes(Value(flags, "nnodes").value_or("1")));
  SHOAL_ASSIGN_OR_RETURN(options.node_rank,
                         ParseNumber("node-rank", Value(flags, "node-rank").value_or("0"), 0, kProcessesMax));
  if (options.node_rank >= options.nnodes) {
    return BadFlag("node-rank", absl::StrCat(options.node_rank),
                   absl::StrCat("must be below --nnodes=", options.nnodes, "; hosts are numbered from 0"));
  }
  if (int64_t{options.nnodes} * options.nproc_per_node > kProcessesMax) {
    return BadFlag(
        "nnodes", absl::StrCat(options.nnodes),
        absl::StrCat("times --nproc-per-node=", options.nproc_per_node, " is more than ", kProcessesMax));
  }
  SHOAL_RETURN_IF_ERROR(CheckBackend(flags, &options));
  SHOAL_RETURN_IF_ERROR(SetEndpoint(flags, &options));
  options.rdzv_id = Value(flags, "rdzv-id").value_or("none");
  if (options.rdzv_id == "none" && options.rdzv_endpoint.empty()) options.rdzv_id.clear();
  options.log_dir = Value(flags, "log-dir").value_or("");
  for (const auto& [name, value] : flags.values) {
    const FlagInfo* flag = FindFlag(name);
    if (flag == nullptr)
      return absl::InvalidArgumentError(absl::StrCat("--", name, ": no such launcher flag"));
    if (flag->use == Use::kIgnored && !(name == "max-restarts" && value == "0")) {
      options.warnings.push_back(absl::StrCat("--", name, " means nothing here and is ignored"));
    }
  }
  return options;
}

}  // namespace shoal
