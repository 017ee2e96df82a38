#include "launch/config/config.h"

#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "runtime/config/loader.h"
#include "runtime/config/nearest.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

absl::StatusOr<std::string> ReadConfigFile(const std::string& path) {
  std::error_code ignored;
  if (path.empty()) return absl::InvalidArgumentError("the name of the configuration file is empty");
  if (!fs::exists(path, ignored)) {
    std::vector<std::string> neighbours;
    const fs::path folder = fs::path(path).parent_path();
    for (const auto& entry : fs::directory_iterator(folder.empty() ? "." : folder, ignored)) {
      if (entry.path().extension() == ".yaml")
        neighbours.push_back((folder / entry.path().filename()).string());
    }
    std::sort(neighbours.begin(), neighbours.end());
    const std::string place =
        fs::path(path).is_absolute() ? "" : absl::StrCat(" in ", fs::current_path(ignored).string());
    return absl::NotFoundError(absl::StrCat(path, ": no such file", place, DidYouMean(path, neighbours)));
  }
  if (fs::is_directory(path, ignored)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": a folder; expected a configuration file"));
  }
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (file) text << file.rdbuf();
  // An empty file makes << fail without an error number.
  if (!file || (errno != 0 && text.str().empty())) return ErrnoStatus(errno, path);
  return text.str();
}

// `path` as it is found from here: as written, or else beside the configuration file. Unchanged when found in
// neither place.
std::string FindFrom(const std::string& path, const std::string& suffix, const fs::path& config_folder) {
  std::error_code ignored;
  if (path.empty() || fs::path(path).is_absolute() || fs::exists(path + suffix, ignored)) return path;
  const fs::path beside = (config_folder / path).lexically_normal();
  return fs::exists(beside.string() + suffix, ignored) ? beside.string() : path;
}

// Empty when `path` can be read; otherwise why not.
std::string WhyUnreadable(const std::string& path, const fs::path& config_folder) {
  if (access(path.c_str(), R_OK) == 0) return "";
  if (errno != ENOENT) return std::string(ErrnoStatus(errno, path).message());
  std::error_code ignored;
  std::string places = absl::StrCat(" in ", fs::current_path(ignored).string());
  if (!config_folder.empty() && !fs::path(path).is_absolute()) {
    absl::StrAppend(&places, " or beside the configuration, in ", config_folder.string());
  }
  return absl::StrCat(path, ": no such file", fs::path(path).is_absolute() ? "" : places);
}

// Rewrites the paths of `config` and reports those that cannot be read.
absl::Status FindFiles(const std::string& config_path, Files files, Config* config,
                       const KeyPositions& positions) {
  const fs::path folder = fs::path(config_path).parent_path();
  const bool megatron = config->data().kind() == "megatron";
  ConfigErrors errors;
  const auto check = [&](const char* key, const std::string& path) {
    const std::string why = files == Files::kMustExist ? WhyUnreadable(path, folder) : "";
    if (!why.empty()) errors.Add(positions.Where(key), key, why);
    return why.empty();
  };
  if (config->data().kind() != "random") {
    const std::string path = FindFrom(config->data().path(), megatron ? ".idx" : "", folder);
    config->mutable_data()->set_path(path);
    std::error_code ignored;
    if (megatron) {
      if (check("data.path", path + ".idx")) check("data.path", path + ".bin");
    } else if (check("data.path", path) && fs::is_directory(path, ignored)) {
      errors.Add(positions.Where("data.path"), "data.path",
                 absl::StrCat(path, ": a folder; expected a file"));
    }
  }
  if (!config->run().init_from().empty()) {
    config->mutable_run()->set_init_from(FindFrom(config->run().init_from(), "", folder));
    std::error_code ignored;
    // A single .safetensors file has no configuration beside it.
    if (check("run.init_from", config->run().init_from()) && fs::is_directory(config->run().init_from(), ignored)) {
      check("run.init_from", config->run().init_from() + "/config.json");
    }
  }
  const std::string& resume = config->checkpoint().resume();
  if (resume != "auto" && resume != "none") check("checkpoint.resume", resume);
  return errors.ToStatus();
}

}  // namespace

absl::StatusOr<LoadedConfig> LoadConfig(const std::string& path, absl::Span<const std::string> overrides,
                                        Files files) {
  SHOAL_ASSIGN_OR_RETURN(const std::string text, ReadConfigFile(path));
  LoadedConfig loaded;
  SHOAL_RETURN_IF_ERROR(LoadYaml(text, path, &loaded.config, &loaded.positions));
  for (const std::string& override_text : overrides) {
    SHOAL_RETURN_IF_ERROR(ApplyOverride(override_text, &loaded.config, &loaded.positions));
  }
  SHOAL_RETURN_IF_ERROR(CheckRequired(loaded.config, path));
  if (!loaded.config.run().has_name()) loaded.config.mutable_run()->set_name(fs::path(path).stem().string());
  SHOAL_RETURN_IF_ERROR(CheckConfig(loaded.config, loaded.positions));
  SHOAL_RETURN_IF_ERROR(FindFiles(path, files, &loaded.config, loaded.positions));
  ResolveConfig(&loaded.config);
  return loaded;
}

void ResolveConfig(Config* config) {
  Model& model = *config->mutable_model();
  if (model.head_dim() == 0) model.set_head_dim(model.hidden_size() / model.num_attention_heads());
  if (model.num_key_value_heads() == 0) model.set_num_key_value_heads(model.num_attention_heads());
  if (model.dense_intermediate_size() == 0) {
    model.set_dense_intermediate_size(model.num_experts_per_tok() * model.intermediate_size());
  }
  if (!model.has_aux_loss() && (model.router() == "sigmoid_bias" || model.router() == "expert_choice")) model.set_aux_loss("none");
  if (config->train().numerics() == "pinned") {  // Pieces change which rows are in one sum.
    StepSchedule& schedule = *config->mutable_schedule();
    schedule.set_chunks_forward(1);
    schedule.set_chunks_backward(1);
    schedule.set_waves(1);
  }
  config->mutable_data()->set_validation_fraction(ValidationFraction(config->data()));
  Scheduler& scheduler = *config->mutable_scheduler();
  if (scheduler.decay_steps() == 0) scheduler.set_decay_steps(config->train().steps());
  if (scheduler.wsd_decay_steps() == 0 && scheduler.kind() == "wsd") {
    scheduler.set_wsd_decay_steps(std::max<int64_t>(1, scheduler.decay_steps() / 10));
  }
}

double ValidationFraction(const Data& data) {
  const bool whole = data.kind() == "random" || data.kind() == "safetensors" || data.order() == "sequential";
  return whole && !data.has_validation_fraction() ? 0 : data.validation_fraction();
}

std::string ConfigYaml(const Config& config) { return ToYaml(config); }

uint64_t ConfigHash(const Config& config) {
  const std::string text = ToYaml(config);
  return XXH3_64bits(text.data(), text.size());
}

}  // namespace shoal
