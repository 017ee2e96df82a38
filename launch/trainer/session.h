// What every command that runs a model on this process's rank needs first: threads, the other ranks, the model with its
// weights.
#pragma once

#include <memory>
#include <string>

#include "collectives/communicator.h"
#include "launch/agent/environment.h"
#include "launch/checkpoint/checkpoint.h"
#include "launch/config/config.h"
#include "launch/trainer/step.h"

namespace shoal {

// How a job's ranks find each other, from the environment that launched this one.
WorldOptions WorldOptionsFor(const RankEnvironment& environment, const Config& config);

// Threads of one rank: train.threads, or the cores that the launcher bound it to, or this host's usable cores divided by its
// ranks, at least 1.
int ThreadsPerRank(const Config& config, const RankEnvironment& environment);

// Where weights come from, in this order of preference.
struct WeightsSource {
  const CheckpointReader* checkpoint = nullptr;  // Borrowed.
  std::string init_from;                         // A model in Hugging Face layout.
  uint64_t seed = 0;                             // Else random.
};

// Collective. Fills the model's weights (and, when training, optimizer state from a checkpoint; otherwise zero moments). Experts that
// move are where they were when the checkpoint was written, if it is of as many ranks.
// Errors name the tensors that are missing, extra or misshapen, or the damaged file.
absl::Status LoadWeights(const WeightsSource& source, RankModel& model);

// What this rank has to save: what it owns; on rank 0 also the state of routers and of experts that move.
std::vector<Shard> CheckpointShards(RankModel& model);

// The resolved configuration of the run that wrote a checkpoint.
absl::StatusOr<Config> CheckpointConfig(const CheckpointReader& reader);

// "train.steps: 12 -> 14; run.seed: 0 -> 1": what a resumed run changes; empty: nothing.
std::string ConfigChanges(const Config& before, const Config& now);

// `path` itself if it is a checkpoint, or the newest checkpoint of a run's folder. NOT_FOUND: neither. Else as OpenCheckpoint.
absl::StatusOr<std::unique_ptr<CheckpointReader>> FindCheckpoint(const std::string& path);

// Collective. Continues `prompt` by `length` tokens of a byte vocabulary, sampled at `temperature` (0: the likeliest) among the
// `top_k` likeliest (0: all). The same text on every rank, a function of (weights, arguments) alone. Each token is computed from
// the last `context` ones.
struct SampleOptions {
  std::string prompt;
  int64_t length = 300;
  int64_t context = 256;
  double temperature = 0.8;
  int64_t top_k = 0;
  uint64_t seed = 0;
};
absl::StatusOr<std::string> SampleText(const SampleOptions& options, RankModel& model, Communicator& world);

}  // namespace shoal
