// The configuration of a run: one YAML file and overrides, merged, checked as a whole and resolved, so that
// whoever reads a Config finds no zero that means "choose for me" except where the choice needs the machine
// (train.threads, telemetry.metrics_port, parallel.expert = -1). Called by the commands, before any process
// or thread is started.
//
// Errors are INVALID_ARGUMENT (NOT_FOUND for the configuration file itself) and name every key with the file,
// line and column, or the --set, that set it:
//   configs/a.yaml:12:3: model.num_key_value_heads: 3 does not divide model.num_attention_heads = 8
//   (default); 1, 2, 4 or 8 would fit
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "launch/config/config.pb.h"
#include "runtime/config/errors.h"

namespace shoal {

// Whether what the configuration names (data.path, run.init_from, checkpoint.resume) must exist and be
// readable.
enum class Files : uint8_t { kMustExist, kMayBeMissing };

struct LoadedConfig {
  Config config;  // Resolved.
  KeyPositions positions;
};

// Reads the file, applies the overrides ("key.path=value") in order, checks and resolves. Paths in
// `data.path` and `run.init_from` that exist only beside the configuration file are rewritten so that they
// are found from here.
absl::StatusOr<LoadedConfig> LoadConfig(const std::string& path, absl::Span<const std::string> overrides,
                                        Files files);

// Combinations that cannot be, of a configuration as written or resolved. Pure.
absl::Status CheckConfig(const Config& config, const KeyPositions& positions);

// What depends on the number of ranks. Pure.
absl::Status CheckParallel(const Config& config, const KeyPositions& positions, int world_size);

// Puts the derived values in place of the zeros that ask for them. Needs a configuration that CheckConfig
// accepts. Changes nothing the second time.
void ResolveConfig(Config* config);

// Share of the tokens that is held out: data.validation_fraction, or, where it is not set and nothing can be
// held out (data.kind random or safetensors, data.order sequential), 0.
double ValidationFraction(const Data& data);

// Complete YAML, defaults included; LoadConfig of it gives an equal configuration.
std::string ConfigYaml(const Config& config);

// Equal for equal configurations, whatever the layout and order of their files. Stable between builds.
uint64_t ConfigHash(const Config& config);

// docs/configuration.md.
std::string ConfigReference();

}  // namespace shoal
