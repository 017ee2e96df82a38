#include "launch/trainer/session.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <numeric>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "google/protobuf/util/message_differencer.h"
#include "models/convert/huggingface.h"
#include "runtime/base/log.h"
#include "runtime/config/loader.h"
#include "runtime/device/cpu.h"
#include "runtime/kernels/elementwise.h"

namespace shoal {
namespace {

constexpr uint64_t kSampling = 2;  // The op number of sampled tokens in random keys.

// What routers keep beside parameters, the same on every rank.
struct NamedState {
  std::string name;
  Tensor value;
};

std::vector<NamedState> RouterStates(RankModel& model) {
  std::vector<NamedState> states;
  for (Router* router : model.decoder().routers()) {
    if (!router->state().empty()) states.push_back({router->state_name(), router->state()});
  }
  return states;
}

// What decides where experts are (ExpertMoves::Save); integers.
constexpr char kExpertMoves[] = "expert_moves";

// Before owned parts are read: experts go back to the owners that they had. Where that cannot be they begin anew, which changes
// where they are and not what is computed.
absl::Status RestoreExperts(const CheckpointReader& reader, RankModel& model) {
  if (model.moves() == nullptr) return absl::OkStatus();
  const auto found = reader.tensors().find(kExpertMoves);
  absl::Status restored = absl::NotFoundError("it has none");
  if (found != reader.tensors().end() && found->second.dtype == DType::kI64) {
    const Tensor saved = Empty(found->second.shape, DType::kI64);
    SHOAL_RETURN_IF_ERROR(reader.Read(kExpertMoves, 0, saved));
    restored = model.moves()->Restore(saved.span<int64_t>());
  }
  if (!absl::IsNotFound(restored) && !absl::IsFailedPrecondition(restored)) return restored;
  if (model.rank() == 0) {
    SHOAL_LOG(kWarning) << reader.path() << ": owners and loads of experts are not those of this checkpoint but begin anew: "
                        << restored.message();
  }
  return absl::OkStatus();
}

absl::Status ReadModelFolder(const std::string& path, RankModel& model) {
  SHOAL_ASSIGN_OR_RETURN(const ModelFolder folder, ModelFolder::Open(path));
  SHOAL_RETURN_IF_ERROR(folder.Check(model.model()));
  for (const OwnedPart& part : model.store().owned()) {
    SHOAL_RETURN_IF_ERROR(WriteFromHost(part.master, model.stream(), [&](const Tensor& host) {
      return folder.Read(part.name, part.row_begin, host);
    }));
  }
  for (const NamedState& state : RouterStates(model)) SHOAL_RETURN_IF_ERROR(folder.Read(state.name, 0, state.value));
  model.store().ZeroMoments(model.stream());
  return absl::OkStatus();
}

absl::Status ReadCheckpoint(const CheckpointReader& reader, RankModel& model) {
  std::map<std::string, CheckpointTensor> wanted;
  for (const ParameterSpec& spec : model.store().parameters()) {
    wanted[spec.name] = {spec.shape, DType::kF32};
    if (!model.store().training()) continue;
    wanted[spec.name + "/exp_avg"] = {spec.shape, DType::kF32};
    wanted[spec.name + "/exp_avg_sq"] = {spec.shape, DType::kF32};
  }
  const std::vector<NamedState> states = RouterStates(model);
  for (const NamedState& state : states) wanted[state.name] = {state.value.shape(), DType::kF32};
  SHOAL_RETURN_IF_ERROR(reader.Check(wanted));
  for (const NamedState& state : states) SHOAL_RETURN_IF_ERROR(reader.Read(state.name, 0, state.value));
  SHOAL_RETURN_IF_ERROR(RestoreExperts(reader, model), reader.path(), ": where experts were");
  const auto read = [&](const std::string& name, int64_t row_begin, const Tensor& tensor) {
    return WriteFromHost(tensor, model.stream(), [&](const Tensor& host) { return reader.Read(name, row_begin, host); });
  };
  for (const OwnedPart& part : model.store().owned()) {
    SHOAL_RETURN_IF_ERROR(read(part.name, part.row_begin, part.master));
    if (!model.store().training()) continue;
    SHOAL_RETURN_IF_ERROR(read(part.name + "/exp_avg", part.row_begin, part.exp_avg));
    SHOAL_RETURN_IF_ERROR(read(part.name + "/exp_avg_sq", part.row_begin, part.exp_avg_sq));
  }
  return absl::OkStatus();
}

// The token that `uniform` in [0, 1) picks.
int32_t Choose(const SampleOptions& options, absl::Span<const float> logits, double uniform) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)]; });
  if (options.temperature == 0) return order.front();
  if (options.top_k > 0) order.resize(std::min(order.size(), static_cast<size_t>(options.top_k)));
  const double highest = logits[static_cast<size_t>(order.front())];
  std::vector<double> cumulative;
  double sum = 0;
  for (int32_t id : order) {
    sum += std::exp((logits[static_cast<size_t>(id)] - highest) / options.temperature);
    cumulative.push_back(sum);
  }
  const auto chosen = std::upper_bound(cumulative.begin(), cumulative.end(), uniform * sum);
  return order[std::min(order.size() - 1, static_cast<size_t>(chosen - cumulative.begin()))];
}

}  // namespace

WorldOptions WorldOptionsFor(const RankEnvironment& environment, const Config& config) {
  WorldOptions options;
  options.rank = environment.rank;
  options.size = environment.world_size;
  options.master_host = environment.master_host;
  options.master_port = environment.master_port;
  options.job_id = environment.job_id;
  options.connect_timeout = absl::Seconds(config.comm().connect_timeout_seconds());
  options.timeout = absl::Seconds(config.comm().timeout_seconds());
  options.heartbeat_timeout = absl::Seconds(config.comm().heartbeat_timeout_seconds());
  options.transport = config.comm().transport();
  options.secret = environment.job_secret;
  options.interface = config.comm().interface();
  options.flows = config.comm().flows();
  return options;
}

int ThreadsPerRank(const Config& config, const RankEnvironment& environment) {
  if (config.train().threads() > 0) return config.train().threads();
  const int cores = UsableCores();
  // srun and mpirun bind each rank to cores of its own; the ranks of our launcher share what it may use.
  const bool bound = environment.source != "SHOAL" && cores < sysconf(_SC_NPROCESSORS_ONLN);
  return bound ? cores : std::max(1, cores / environment.local_world_size);
}

absl::Status LoadWeights(const WeightsSource& source, RankModel& model) {
  if (source.checkpoint != nullptr) {
    SHOAL_RETURN_IF_ERROR(ReadCheckpoint(*source.checkpoint, model));
  } else if (!source.init_from.empty()) {
    SHOAL_RETURN_IF_ERROR(ReadModelFolder(source.init_from, model), "run.init_from");
  } else {
    model.store().InitializeOwned(source.seed, model.model().initializer_range, model.stream());
  }
  return model.store().GatherWeights(model.stream());
}

std::vector<Shard> CheckpointShards(RankModel& model) {
  std::vector<Shard> shards;
  for (const OwnedPart& part : model.store().owned()) {
    shards.push_back({part.name, part.full_shape, part.row_begin, ToHost(part.master, model.stream())});
    shards.push_back({part.name + "/exp_avg", part.full_shape, part.row_begin, ToHost(part.exp_avg, model.stream())});
    shards.push_back({part.name + "/exp_avg_sq", part.full_shape, part.row_begin, ToHost(part.exp_avg_sq, model.stream())});
  }
  if (model.rank() != 0) return shards;
  for (const NamedState& state : RouterStates(model)) shards.push_back({state.name, state.value.shape(), 0, state.value});
  if (model.moves() == nullptr) return shards;
  const std::vector<int64_t> moves = model.moves()->Save();
  const Tensor saved = Empty({static_cast<int64_t>(moves.size())}, DType::kI64);
  std::copy(moves.begin(), moves.end(), saved.data<int64_t>());
  shards.push_back({kExpertMoves, saved.shape(), 0, saved});
  return shards;
}

absl::StatusOr<Config> CheckpointConfig(const CheckpointReader& reader) {
  Config config;
  KeyPositions positions;
  SHOAL_RETURN_IF_ERROR(LoadYaml(reader.config_yaml(), "the checkpoint's configuration", &config, &positions));
  ResolveConfig(&config);
  return config;
}

std::string ConfigChanges(const Config& before, const Config& now) {
  std::string report;
  google::protobuf::util::MessageDifferencer differencer;
  // A default that is written out is no change.
  differencer.set_message_field_comparison(google::protobuf::util::MessageDifferencer::EQUIVALENT);
  differencer.ReportDifferencesToString(&report);
  differencer.Compare(before, now);
  std::vector<std::string> changes;
  for (absl::string_view line : absl::StrSplit(report, '\n', absl::SkipEmpty())) {
    for (absl::string_view kind : {"modified: ", "added: ", "deleted: "}) absl::ConsumePrefix(&line, kind);
    if (!absl::StartsWith(line, "checkpoint.")) changes.emplace_back(line);
  }
  return absl::StrJoin(changes, "; ");
}

absl::StatusOr<std::unique_ptr<CheckpointReader>> FindCheckpoint(const std::string& path) {
  SHOAL_ASSIGN_OR_RETURN(const std::optional<std::string> newest, NewestCheckpoint(path));
  absl::StatusOr<std::unique_ptr<CheckpointReader>> reader = OpenCheckpoint(newest.value_or(path));
  if (newest.has_value() || !absl::IsNotFound(reader.status())) return reader;
  std::error_code ignored;
  return absl::NotFoundError(absl::StrCat(path, std::filesystem::exists(path, ignored)
                                                    ? ": no checkpoint, neither manifest.json nor checkpoints/step-N"
                                                    : ": no such folder"));
}

absl::StatusOr<std::string> SampleText(const SampleOptions& options, RankModel& model, Communicator& world) {
  std::vector<int32_t> ids;
  for (char c : options.prompt.empty() ? std::string("\n") : options.prompt) ids.push_back(static_cast<unsigned char>(c));
  std::string text;
  for (int64_t i = 0; i < options.length; ++i) {
    const int64_t used = std::min<int64_t>(static_cast<int64_t>(ids.size()), options.context);
    const Tensor context(ids.data() + (static_cast<int64_t>(ids.size()) - used), {used}, DType::kI32);
    SHOAL_ASSIGN_OR_RETURN(const Tensor logits, model.NextLogits(context), "sampling");
    const kernels::RandomKey key{options.seed, kernels::MakeStream(0, 0, 0, kSampling)};
    const double uniform = static_cast<double>(kernels::RandomBits(key, static_cast<uint64_t>(i)) >> 11) * 0x1p-53;
    const Tensor next = Empty({1}, DType::kI32);
    next.data<int32_t>()[0] = Choose(options, logits.span<float>(), uniform);
    if (world.size() > 1) {
      SHOAL_RETURN_IF_ERROR(world.Broadcast(next, 0, {.label = "sampled token"}).Await(), "sampling");
    }
    ids.push_back(next.data<int32_t>()[0]);
    text.push_back(static_cast<char>(next.data<int32_t>()[0]));
  }
  return text;
}

}  // namespace shoal
