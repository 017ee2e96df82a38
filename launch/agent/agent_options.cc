#include "launch/agent/agent_options.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <string_view>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "launch/agent/environment.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int kProcessesMax = 1 << 16;
constexpr int kDefaultPort = 29500;         // torchrun's static backend.
constexpr int kDefaultElasticPort = 29400;  // torchrun's c10d backend; `shoal coordinate`.

// Flags that change something. launch/cli takes more of them for torchrun's sake.
constexpr std::string_view kMeaningful[] = {"nproc-per-node", "nnodes",  "node-rank",   "rdzv-endpoint",
                                            "rdzv-backend",   "rdzv-id", "master-addr", "master-port",
                                            "standalone",     "log-dir"};

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
    return BadFlag(
        "nproc-per-node", value,
        absl::StrCat("want a number of ranks in 1 to ", kProcessesMax, ", or auto (usable cores)"));
  }
  return number;
}

absl::Status SetNnodes(const std::string& value, AgentOptions* options) {
  const size_t colon = value.find(':');
  SHOAL_ASSIGN_OR_RETURN(options->nnodes, ParseNumber("nnodes", value.substr(0, colon), 1, kProcessesMax));
  options->nnodes_max = options->nnodes;
  if (colon == std::string::npos) return absl::OkStatus();
  SHOAL_ASSIGN_OR_RETURN(options->nnodes_max,
                         ParseNumber("nnodes", value.substr(colon + 1), options->nnodes, kProcessesMax));
  return absl::OkStatus();
}

absl::Status SetElastic(const RawLaunchFlags& flags, const std::string& backend, AgentOptions* options) {
  options->elastic = true;
  SHOAL_ASSIGN_OR_RETURN(
      options->max_restarts,
      ParseNumber("max-restarts", Value(flags, "max-restarts").value_or("0"), 0, kProcessesMax));
  if (backend != "etcd") return absl::OkStatus();
  const std::string text = Value(flags, "rdzv-endpoint").value_or("");
  for (const auto endpoint : absl::StrSplit(text, ',')) {
    SHOAL_RETURN_IF_ERROR(ParseHostPort(StdSv(endpoint), 2379).status(),
                          "--rdzv-endpoint (where etcd is reached)");
    options->etcd.emplace_back(endpoint);
    if (!absl::StrContains(endpoint, ":")) absl::StrAppend(&options->etcd.back(), ":2379");
  }
  if (Value(flags, "rdzv-id").value_or("none") != "none") return absl::OkStatus();
  return absl::InvalidArgumentError("--rdzv-backend=etcd needs --rdzv-id: jobs that use one etcd must differ in it");
}

absl::Status SetBackend(const RawLaunchFlags& flags, AgentOptions* options) {
  const std::string backend = Value(flags, "rdzv-backend").value_or("static");
  const bool elastic = backend == "shoal" || backend == "c10d" || backend == "etcd";
  if (elastic && flags.may_be_elastic) return SetElastic(flags, backend, options);
  if (options->nnodes != options->nnodes_max) {
    return absl::UnimplementedError(absl::StrCat(
        "--nnodes=", options->nnodes, ":", options->nnodes_max,
        flags.may_be_elastic ? ": a number of hosts that changes needs --rdzv-backend=shoal or etcd"
                             : ": this program has a fixed number of ranks; give one number of hosts (shoal launch "
                               "starts programs whose ranks come and go)"));
  }
  if (backend == "static") return absl::OkStatus();
  if (backend == "shoal") {
    return absl::UnimplementedError(
        "--rdzv-backend=shoal: this program has a fixed number of ranks, which end together when one dies; leave the "
        "flag out, or give static (shoal launch starts programs whose ranks come and go)");
  }
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
  if (standalone && options->nnodes_max > 1) {
    return BadFlag("standalone", "true", absl::StrCat("means one host, but --nnodes=", options->nnodes_max));
  }
  if (!options->etcd.empty()) return absl::OkStatus();
  int port = options->elastic ? kDefaultElasticPort : kDefaultPort;
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
    if (options->nnodes_max == 1 && !asked) return absl::OkStatus();
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

absl::StatusOr<AgentOptions> MakeAgentOptions(const RawLaunchFlags& flags) {
  AgentOptions options;
  SHOAL_ASSIGN_OR_RETURN(options.nproc_per_node,
                         ParseNproc(flags, Value(flags, "nproc-per-node").value_or("1")));
  SHOAL_RETURN_IF_ERROR(SetNnodes(Value(flags, "nnodes").value_or("1"), &options));
  SHOAL_ASSIGN_OR_RETURN(options.node_rank,
                         ParseNumber("node-rank", Value(flags, "node-rank").value_or("0"), 0, kProcessesMax));
  if (options.node_rank >= options.nnodes_max) {
    return BadFlag("node-rank", absl::StrCat(options.node_rank),
                   absl::StrCat("must be below --nnodes=", options.nnodes_max, "; hosts are numbered from 0"));
  }
  if (int64_t{options.nnodes_max} * options.nproc_per_node > kProcessesMax) {
    return BadFlag(
        "nnodes", absl::StrCat(options.nnodes_max),
        absl::StrCat("times --nproc-per-node=", options.nproc_per_node, " is more than ", kProcessesMax));
  }
  SHOAL_RETURN_IF_ERROR(SetBackend(flags, &options));
  SHOAL_RETURN_IF_ERROR(SetEndpoint(flags, &options));
  options.rdzv_id = Value(flags, "rdzv-id").value_or("none");
  if (options.rdzv_id == "none" && options.rdzv_endpoint.empty()) options.rdzv_id.clear();
  options.log_dir = Value(flags, "log-dir").value_or("");
  for (const auto& [name, value] : flags.values) {
    const bool meaningful =
        std::find(std::begin(kMeaningful), std::end(kMeaningful), name) != std::end(kMeaningful);
    if (meaningful || (name == "max-restarts" && (options.elastic || value == "0"))) continue;
    options.warnings.push_back(absl::StrCat("--", name, " means nothing here and is ignored"));
  }
  return options;
}

}  // namespace shoal
