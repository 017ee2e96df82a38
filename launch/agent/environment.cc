#include "launch/agent/environment.h"

#include <cstdlib>

#include "absl/strings/numbers.h"
#include "launch/agent/slurm.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Below the ephemeral ports of Linux (32768 and up) and below torchrun's defaults (29400, 29500).
constexpr int64_t kSlurmPortFirst = 20000;
constexpr int64_t kSlurmPorts = 9000;

std::string Print(const GetEnv& getenv, std::string_view name) {
  return absl::StrCat(AbslSv(name), "=", getenv(name).value_or("(unset)"));
}

absl::StatusOr<std::optional<int>> ReadInt(const GetEnv& getenv, std::string_view name) {
  const std::optional<std::string> text = getenv(name);
  if (!text.has_value()) return std::optional<int>();
  int value = 0;
  if (!absl::SimpleAtoi(*text, &value) || value < 0) {
    return absl::InvalidArgumentError(absl::StrCat(AbslSv(name), "=\"", *text, "\": want a number >= 0"));
  }
  return std::optional<int>(value);
}

struct Variable {
  std::string_view name;
  int* value;
};

// All of `variables`, or an error that names those which are missing beside one that is there.
absl::Status ReadAll(const GetEnv& getenv, std::string_view source, const std::vector<Variable>& variables) {
  std::string present;
  std::string missing;
  for (const Variable& variable : variables) {
    SHOAL_ASSIGN_OR_RETURN(const std::optional<int> value, ReadInt(getenv, variable.name));
    if (value.has_value()) {
      *variable.value = *value;
      present = Print(getenv, variable.name);
    } else {
      absl::StrAppend(&missing, missing.empty() ? "" : ", ", AbslSv(variable.name));
    }
  }
  if (missing.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(present, " looks like a launch by ", AbslSv(source),
                                                 ", but ", missing, " is not set: set all of them, or none"));
}

// Leaves `value` alone when the variable is not set.
absl::Status ReadOptional(const GetEnv& getenv, std::string_view name, int* value) {
  SHOAL_ASSIGN_OR_RETURN(const std::optional<int> found, ReadInt(getenv, name));
  if (found.has_value()) *value = *found;
  return absl::OkStatus();
}

absl::Status CheckRanges(const RankEnvironment& env) {
  const auto fail = [&env](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat("the environment of ", env.source, ": ", what));
  };
  if (env.world_size < 1) return fail("the world size is 0");
  if (env.rank >= env.world_size) {
    return fail(absl::StrCat("rank ", env.rank, " of a world of ", env.world_size));
  }
  if (env.local_world_size > env.world_size || env.local_rank >= env.local_world_size) {
    return fail(absl::StrCat("local rank ", env.local_rank, " of ", env.local_world_size,
                             " local ranks in a world of ", env.world_size));
  }
  if (env.node_rank >= env.nodes) return fail(absl::StrCat("node ", env.node_rank, " of ", env.nodes));
  if ((env.nodes == 1) != (env.local_world_size == env.world_size)) {
    return fail(absl::StrCat(env.local_world_size, " of ", env.world_size, " ranks on this host, but ",
                             env.nodes, " host(s)"));
  }
  return absl::OkStatus();
}

// As if every host before this one had as many ranks.
void GuessNodes(RankEnvironment* env) {
  if (env->local_world_size < 1) return;  // CheckRanges reports it.
  env->nodes = (env->world_size + env->local_world_size - 1) / env->local_world_size;
  env->node_rank = std::min(env->rank / env->local_world_size, env->nodes - 1);
}

absl::StatusOr<std::optional<RankEnvironment>> ReadShoal(const GetEnv& getenv) {
  if (!getenv("SHOAL_RANK").has_value() && !getenv("SHOAL_WORLD_SIZE").has_value()) {
    return std::optional<RankEnvironment>();
  }
  RankEnvironment env;
  env.source = "SHOAL";
  SHOAL_RETURN_IF_ERROR(
      ReadAll(getenv, "SHOAL", {{"SHOAL_RANK", &env.rank}, {"SHOAL_WORLD_SIZE", &env.world_size}}));
  if (getenv("SHOAL_LOCAL_RANK").has_value() || getenv("SHOAL_LOCAL_WORLD_SIZE").has_value()) {
    SHOAL_RETURN_IF_ERROR(
        ReadAll(getenv, "SHOAL",
                {{"SHOAL_LOCAL_RANK", &env.local_rank}, {"SHOAL_LOCAL_WORLD_SIZE", &env.local_world_size}}));
  } else {
    env.local_rank = env.rank;
    env.local_world_size = env.world_size;
  }
  GuessNodes(&env);
  SHOAL_RETURN_IF_ERROR(ReadOptional(getenv, "SHOAL_NODE_RANK", &env.node_rank));
  SHOAL_RETURN_IF_ERROR(ReadOptional(getenv, "SHOAL_NODES", &env.nodes));
  return std::optional<RankEnvironment>(env);
}

absl::StatusOr<std::optional<RankEnvironment>> ReadTorchrun(const GetEnv& getenv) {
  if (!getenv("RANK").has_value() && !getenv("WORLD_SIZE").has_value() && !getenv("LOCAL_RANK").has_value()) {
    return std::optional<RankEnvironment>();
  }
  RankEnvironment env;
  env.source = "torchrun";
  SHOAL_RETURN_IF_ERROR(
      ReadAll(getenv, "torchrun",
              {{"RANK", &env.rank}, {"WORLD_SIZE", &env.world_size}, {"LOCAL_RANK", &env.local_rank}}));
  if (!getenv("LOCAL_WORLD_SIZE").has_value()) {
    // Set by hand for one host, as many scripts do. On a second host this guess would be wrong, and shows.
    if (env.local_rank != env.rank) {
      return absl::InvalidArgumentError(absl::StrCat(Print(getenv, "LOCAL_RANK"), " with ",
                                                     Print(getenv, "RANK"),
                                                     " means several hosts: set LOCAL_WORLD_SIZE too"));
    }
    env.local_world_size = env.world_size;
  }
  SHOAL_RETURN_IF_ERROR(ReadOptional(getenv, "LOCAL_WORLD_SIZE", &env.local_world_size));
  GuessNodes(&env);
  SHOAL_RETURN_IF_ERROR(ReadOptional(getenv, "GROUP_RANK", &env.node_rank));
  SHOAL_RETURN_IF_ERROR(ReadOptional(getenv, "GROUP_WORLD_SIZE", &env.nodes));
  env.job_id = getenv("TORCHELASTIC_RUN_ID").value_or("none");
  return std::optional<RankEnvironment>(env);
}

absl::StatusOr<std::optional<RankEnvironment>> ReadOpenMpi(const GetEnv& getenv) {
  if (!getenv("OMPI_COMM_WORLD_RANK").has_value() && !getenv("OMPI_COMM_WORLD_SIZE").has_value()) {
    return std::optional<RankEnvironment>();
  }
  RankEnvironment env;
  env.source = "Open MPI";
  SHOAL_RETURN_IF_ERROR(ReadAll(getenv, "Open MPI",
                                {{"OMPI_COMM_WORLD_RANK", &env.rank},
                                 {"OMPI_COMM_WORLD_SIZE", &env.world_size},
                                 {"OMPI_COMM_WORLD_LOCAL_RANK", &env.local_rank},
                                 {"OMPI_COMM_WORLD_LOCAL_SIZE", &env.local_world_size}}));
  GuessNodes(&env);
  env.job_id = getenv("PMIX_NAMESPACE").value_or("none");
  return std::optional<RankEnvironment>(env);
}

// PMIx alone sets no size in the environment, and srun's PMI plug-ins no local rank: nothing to read then,
// and under srun the Slurm variables say the same.
absl::StatusOr<std::optional<RankEnvironment>> ReadPmi(const GetEnv& getenv) {
  if (!getenv("PMI_SIZE").has_value() && !getenv("PMI_RANK").has_value())
    return std::optional<RankEnvironment>();
  if (!getenv("MPI_LOCALRANKID").has_value() && getenv("SLURM_STEP_NUM_TASKS").has_value()) {
    return std::optional<RankEnvironment>();
  }
  RankEnvironment env;
  env.source = "PMI";
  const std::string_view rank = getenv("PMI_RANK").has_value() ? "PMI_RANK" : "PMIX_RANK";
  SHOAL_RETURN_IF_ERROR(ReadAll(getenv, "PMI",
                                {{rank, &env.rank},
                                 {"PMI_SIZE", &env.world_size},
                                 {"MPI_LOCALRANKID", &env.local_rank},
                                 {"MPI_LOCALNRANKS", &env.local_world_size}}));
  GuessNodes(&env);
  env.job_id = getenv("PMIX_NAMESPACE").value_or(getenv("PMI_JOBID").value_or("none"));
  return std::optional<RankEnvironment>(env);
}

absl::StatusOr<std::optional<RankEnvironment>> ReadSlurm(const GetEnv& getenv) {
  SHOAL_ASSIGN_OR_RETURN(const std::optional<int> tasks, ReadInt(getenv, "SLURM_STEP_NUM_TASKS"));
  if (tasks.value_or(1) <= 1) return std::optional<RankEnvironment>();
  RankEnvironment env;
  env.source = "Slurm";
  env.world_size = *tasks;
  SHOAL_RETURN_IF_ERROR(ReadAll(getenv, "srun",
                                {{"SLURM_STEP_NUM_TASKS", &env.world_size},
                                 {"SLURM_PROCID", &env.rank},
                                 {"SLURM_LOCALID", &env.local_rank},
                                 {"SLURM_NODEID", &env.node_rank}}));
  const std::string per_node = getenv("SLURM_STEP_TASKS_PER_NODE").value_or("");
  SHOAL_ASSIGN_OR_RETURN(const std::vector<int> counts, ExpandTasksPerNode(per_node),
                         "SLURM_STEP_TASKS_PER_NODE");
  int64_t sum = 0;
  for (const int count : counts) sum += count;
  if (sum != env.world_size || static_cast<size_t>(env.node_rank) >= counts.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        Print(getenv, "SLURM_STEP_TASKS_PER_NODE"), " has ", counts.size(), " hosts with ", sum,
        " tasks, against ", Print(getenv, "SLURM_STEP_NUM_TASKS"), " and ", Print(getenv, "SLURM_NODEID")));
  }
  env.nodes = static_cast<int>(counts.size());
  env.local_world_size = counts[env.node_rank];
  env.job_id =
      absl::StrCat(getenv("SLURM_JOB_ID").value_or("none"), ".", getenv("SLURM_STEP_ID").value_or("0"));
  return std::optional<RankEnvironment>(env);
}

// `inner` won over `outer`. They may differ when the outer launcher started one process per host, which then
// started the ranks: torchrun under srun or mpirun, the daemons of mpirun under Slurm.
absl::Status CheckAgreement(const RankEnvironment& inner, const RankEnvironment& outer) {
  if (inner.world_size == outer.world_size) return absl::OkStatus();
  if (outer.local_world_size == 1 && (inner.source == "Open MPI" || inner.source == "PMI"))
    return absl::OkStatus();
  if (outer.world_size == inner.nodes) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      inner.source, " says that the world size is ", inner.world_size, ", ", outer.source, " says ",
      outer.world_size, ": start the ranks with one launcher, or unset the variables of the other"));
}

absl::Status UseMasterText(std::string_view name, const std::string& text, RankEnvironment* env) {
  if (text.rfind("unix:", 0) == 0) {
    env->master_host = text;
    return absl::OkStatus();
  }
  SHOAL_ASSIGN_OR_RETURN(const HostPort master, ParseHostPort(text, 0), AbslSv(name));
  if (master.port == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(AbslSv(name), "=\"", text, "\": want HOST:PORT or unix:NAME"));
  }
  env->master_host = master.host;
  env->master_port = master.port;
  return absl::OkStatus();
}

absl::Status UseMasterAddr(const GetEnv& getenv, const std::string& address, RankEnvironment* env) {
  const std::string text = getenv("MASTER_PORT").value_or("");
  // torchrun's own store listens on the port that it exports.
  const bool taken = getenv("TORCHELASTIC_USE_AGENT_STORE").value_or("") == "True";
  int port = 0;
  if (!absl::SimpleAtoi(text, &port) || port < 1 || port + (taken ? 1 : 0) > 65535) {
    return absl::InvalidArgumentError(absl::StrCat("MASTER_ADDR=", address, " needs a MASTER_PORT in 1 to ",
                                                   taken ? 65534 : 65535, ", not \"", text, "\""));
  }
  env->master_host = address;
  env->master_port = port + (taken ? 1 : 0);
  return absl::OkStatus();
}

absl::Status UseSlurmMaster(const GetEnv& getenv, RankEnvironment* env) {
  const std::string list = getenv("SLURM_STEP_NODELIST").value_or("");
  SHOAL_ASSIGN_OR_RETURN(const std::vector<std::string> hosts, ExpandNodeList(list), "SLURM_STEP_NODELIST");
  SHOAL_ASSIGN_OR_RETURN(const std::optional<int> job, ReadInt(getenv, "SLURM_JOB_ID"));
  SHOAL_ASSIGN_OR_RETURN(const std::optional<int> step, ReadInt(getenv, "SLURM_STEP_ID"));
  env->master_host = hosts.front();
  // 31: consecutive steps of one job and consecutive jobs must not meet.
  env->master_port =
      static_cast<int>(kSlurmPortFirst + (int64_t{job.value_or(0)} * 31 + step.value_or(0)) % kSlurmPorts);
  return absl::OkStatus();
}

std::string SocketName(const RankEnvironment& env) {
  std::string name = absl::StrCat("unix:shoal-", env.source, "-", env.job_id);
  for (char& c : name) {
    if (c == ' ') c = '-';
  }
  return name;
}

absl::Status FindMaster(const GetEnv& getenv, RankEnvironment* env) {
  if (const auto master = getenv("SHOAL_MASTER"); master.has_value()) {
    return UseMasterText("SHOAL_MASTER", *master, env);
  }
  if (const auto address = getenv("MASTER_ADDR"); address.has_value() && !address->empty()) {
    return UseMasterAddr(getenv, *address, env);
  }
  if (env->world_size == 1) return absl::OkStatus();
  if (env->nodes == 1) {
    env->master_host = SocketName(*env);
    return absl::OkStatus();
  }
  if (env->source == "Slurm") return UseSlurmMaster(getenv, env);
  const std::string_view advice = env->source == "Open MPI"
                                      ? "give mpirun -x MASTER_ADDR=FIRST_HOST -x MASTER_PORT=29500"
                                      : "set MASTER_ADDR and MASTER_PORT";
  return absl::FailedPreconditionError(
      absl::StrCat(env->source, " started ranks on ", env->nodes,
                   " hosts and nothing says where they meet: ", AbslSv(advice)));
}

}  // namespace

absl::StatusOr<std::optional<RankEnvironment>> DetectEnvironment(const GetEnv& getenv) {
  if (const auto coordinator = getenv("SHOAL_COORDINATOR");
      coordinator.has_value() && !getenv("SHOAL_RANK").has_value()) {
    return absl::FailedPreconditionError(
        absl::StrCat("SHOAL_COORDINATOR=", *coordinator,
                     ": ranks of an elastic job have no number before they have joined, and this program cannot join "
                     "one: launch it without --rdzv-backend"));
  }
  std::optional<RankEnvironment> chosen;
  for (const auto& read : {ReadShoal, ReadTorchrun, ReadOpenMpi, ReadPmi, ReadSlurm}) {
    SHOAL_ASSIGN_OR_RETURN(const std::optional<RankEnvironment> found, read(getenv));
    if (!found.has_value()) continue;
    SHOAL_RETURN_IF_ERROR(CheckRanges(*found));
    if (!chosen.has_value()) {
      chosen = found;
    } else {
      SHOAL_RETURN_IF_ERROR(CheckAgreement(*chosen, *found));
    }
  }
  if (!chosen.has_value()) return chosen;
  if (const auto id = getenv("SHOAL_RUN_ID"); id.has_value()) chosen->job_id = *id;
  chosen->job_secret = getenv("SHOAL_JOB_SECRET").value_or("");
  SHOAL_RETURN_IF_ERROR(FindMaster(getenv, &*chosen));
  return chosen;
}

std::optional<std::string> ProcessEnv(std::string_view name) {
  const char* value = std::getenv(std::string(name).c_str());
  if (value == nullptr) return std::nullopt;
  return value;
}

std::vector<std::pair<std::string, std::string>> RankVariables(const RankEnvironment& rank) {
  const bool over_unix = rank.master_host.rfind("unix:", 0) == 0;
  const bool v6 = rank.master_host.find(':') != std::string::npos;
  const auto text = [](int value) { return absl::StrCat(value); };
  return {
      {"SHOAL_RANK", text(rank.rank)},
      {"SHOAL_WORLD_SIZE", text(rank.world_size)},
      {"SHOAL_LOCAL_RANK", text(rank.local_rank)},
      {"SHOAL_LOCAL_WORLD_SIZE", text(rank.local_world_size)},
      {"SHOAL_NODE_RANK", text(rank.node_rank)},
      {"SHOAL_NODES", text(rank.nodes)},
      {"SHOAL_RUN_ID", rank.job_id},
      {"SHOAL_JOB_SECRET", rank.job_secret},
      {"SHOAL_EPOCH", "1"},
      {"SHOAL_MASTER",
       over_unix ? rank.master_host
                 : absl::StrCat(v6 ? "[" : "", rank.master_host, v6 ? "]:" : ":", rank.master_port)},
      {"RANK", text(rank.rank)},
      {"WORLD_SIZE", text(rank.world_size)},
      {"LOCAL_RANK", text(rank.local_rank)},
      {"LOCAL_WORLD_SIZE", text(rank.local_world_size)},
      {"GROUP_RANK", text(rank.node_rank)},
      {"GROUP_WORLD_SIZE", text(rank.nodes)},
      {"ROLE_NAME", "default"},
      {"ROLE_RANK", text(rank.rank)},
      {"ROLE_WORLD_SIZE", text(rank.world_size)},
      {"MASTER_ADDR", over_unix ? "127.0.0.1" : rank.master_host},
      {"MASTER_PORT", over_unix ? "29500" : text(rank.master_port)},
      {"TORCHELASTIC_RESTART_COUNT", "0"},
      {"TORCHELASTIC_MAX_RESTARTS", "0"},
      {"TORCHELASTIC_RUN_ID", rank.job_id},
      {"TORCHELASTIC_USE_AGENT_STORE", "False"},
  };
}

std::vector<std::pair<std::string, std::string>> ElasticRankVariables(const RankEnvironment& rank,
                                                                      const std::string& coordinator, int restarts,
                                                                      int restarts_max) {
  const auto text = [](int value) { return absl::StrCat(value); };
  return {
      {"SHOAL_COORDINATOR", coordinator},
      {"SHOAL_RUN_ID", rank.job_id},
      {"SHOAL_JOB_SECRET", rank.job_secret},
      {"SHOAL_LOCAL_RANK", text(rank.local_rank)},
      {"SHOAL_LOCAL_WORLD_SIZE", text(rank.local_world_size)},
      {"TORCHELASTIC_RESTART_COUNT", text(restarts)},
      {"TORCHELASTIC_MAX_RESTARTS", text(restarts_max)},
      {"TORCHELASTIC_RUN_ID", rank.job_id},
  };
}

absl::StatusOr<HostPort> ParseHostPort(std::string_view text, int port_default) {
  const auto fail = [text](std::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("\"", AbslSv(text), "\": ", AbslSv(what)));
  };
  HostPort result;
  result.port = port_default;
  std::string_view rest;
  if (!text.empty() && text.front() == '[') {
    const size_t close = text.find(']');
    if (close == std::string_view::npos) return fail("'[' without ']'");
    result.host = std::string(text.substr(1, close - 1));
    rest = text.substr(close + 1);
  } else {
    const size_t colon = text.find(':');
    if (colon != std::string_view::npos && text.find(':', colon + 1) != std::string_view::npos) {
      return fail("write an IPv6 address as [ADDRESS]:PORT");
    }
    result.host = std::string(text.substr(0, colon));
    rest = colon == std::string_view::npos ? std::string_view() : text.substr(colon);
  }
  if (result.host.empty()) return fail("the host is missing");
  if (rest.empty()) return result;
  if (rest.front() != ':' || !absl::SimpleAtoi(AbslSv(rest.substr(1)), &result.port) || result.port < 1 ||
      result.port > 65535) {
    return fail("want HOST:PORT with a port in 1 to 65535");
  }
  return result;
}

}  // namespace shoal
