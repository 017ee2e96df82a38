// Models in Hugging Face's layout: config.json beside model.safetensors, or beside the files of a sharded
// index, with Mixtral's names. Errors name the file and the key or tensor.
//
// A model that Mixtral can express is written as MixtralForCausalLM (keys of transformers 4). One that it
// cannot, because of dense layers, a shared expert or another router, is written with model_type "shoal", the keys
// shoal_dense_layers, shoal_dense_intermediate_size, shared_intermediate_size and those of the router (as in
// configurations), and the names of ParameterSpecs and RouterStateSpecs: Shoal reads it, and other readers refuse it instead
// of computing something else.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/model_config.h"
#include "runtime/files/safetensors.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

// Reads the keys of transformers 4 and 5 (rope_theta, or rope_parameters). Keys of no bearing on the
// computation are ignored. Beyond Hugging Face's keys it knows aux_loss (hf, switch, none), router_z_loss_coef and the router's
// keys. INVALID_ARGUMENT: a key is missing or wrong. UNIMPLEMENTED: another
// model family, or a setting that Shoal does not compute.
absl::StatusOr<ModelConfig> ReadHuggingFaceConfig(const std::string& path);

// Parameters to start from. Immutable and thread-safe.
class ModelFolder {
 public:
  // `path`: a folder in the layout above, or a single .safetensors file (then there is no config).
  static absl::StatusOr<ModelFolder> Open(const std::string& path);

  const std::optional<ModelConfig>& config() const { return config_; }
  // Whether there is a tensor of this name.
  bool Has(const std::string& name) const { return tensors_.items().contains(name); }

  // Whether this is exactly a model of `config`: INVALID_ARGUMENT lists every tensor that is missing, extra,
  // misshapen or of a type that holds no weights, and every setting of config.json that changes what the
  // model computes. A tied model may hold lm_head.weight if it equals the embedding; state of routers may be missing.
  absl::Status Check(const ModelConfig& config) const;

  // Rows [row_begin, row_begin + out.dim(0)) of a parameter, converted to out's type (F32). After a
  // successful Check every read of a parameter succeeds.
  absl::Status Read(const std::string& name, int64_t row_begin, const Tensor& out) const;

 private:
  ModelFolder(std::string path, std::optional<ModelConfig> config, SafetensorsSet tensors)
      : path_(std::move(path)), config_(std::move(config)), tensors_(std::move(tensors)) {}

  std::string path_;
  std::optional<ModelConfig> config_;
  SafetensorsSet tensors_;
};

struct ExportOptions {
  DType dtype = DType::kF32;  // Or kBF16.
  int64_t max_position_embeddings = 4096;
  DiskFaults* faults = nullptr;
};

// Makes `folder` and writes model.safetensors, then config.json, each atomically; files of an earlier model
// are replaced. `source` fills its second argument, F32 and of the parameter's full shape; it is called once
// for every parameter of ParameterSpecs(config) and every state of RouterStateSpecs(config), in any order, so one parameter is
// in memory at a time. States are written as F32.
absl::Status WriteModelFolder(const std::string& folder, const ModelConfig& config,
                              const std::function<absl::Status(const std::string&, const Tensor&)>& source,
                              const ExportOptions& options);

}  // namespace shoal
