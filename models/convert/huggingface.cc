#include "models/convert/huggingface.h"

#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "models/parameters.h"
#include "runtime/base/status.h"
#include "runtime/files/file.h"
#include "runtime/files/json.h"

namespace shoal {
namespace {

constexpr char kEmbedding[] = "model.embed_tokens.weight";
constexpr char kHead[] = "lm_head.weight";

// Takes typed values out of a config.json. The first mistake sticks; later calls then do nothing.
class KeyReader {
 public:
  explicit KeyReader(const nlohmann::json& config) : config_(config) {}

  bool Has(const char* key) const { return config_.contains(key) && !config_[key].is_null(); }
  bool IsNull(const char* key) const { return config_.contains(key) && config_[key].is_null(); }

  template <class T>
  void Required(const char* key, T& out) {
    if (!Has(key)) {
      Fail(absl::InvalidArgumentError(absl::StrCat("key ", key, " is missing")));
    } else {
      Optional(key, out);
    }
  }

  void Optional(const char* key, int& out) {
    int64_t value = out;
    Optional(key, value);
    if (value < INT32_MIN || value > INT32_MAX) return WrongType(key, "a number below 2^31");
    out = static_cast<int>(value);
  }
  void Optional(const char* key, int64_t& out) {
    if (!Has(key)) return;
    const nlohmann::json& value = config_[key];
    if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX)) {
      return WrongType(key, "an integer");
    }
    out = value.get<int64_t>();
  }
  void Optional(const char* key, double& out) {
    if (!Has(key)) return;
    if (!config_[key].is_number()) return WrongType(key, "a number");
    out = config_[key].get<double>();
  }
  void Optional(const char* key, bool& out) {
    if (!Has(key)) return;
    if (!config_[key].is_boolean()) return WrongType(key, "true or false");
    out = config_[key].get<bool>();
  }
  void Optional(const char* key, std::string& out) {
    if (!Has(key)) return;
    if (!config_[key].is_string()) return WrongType(key, "a string");
    out = config_[key].get<std::string>();
  }

  // The setting changes what a model computes, and only this value is what Shoal computes. Missing and null
  // are fine.
  void MustBe(const char* key, const nlohmann::json& only) {
    if (Has(key) && config_[key] != only) {
      Fail(absl::UnimplementedError(
          absl::StrCat("key ", key, " is ", config_[key].dump(), "; supported: ", only.dump())));
    }
  }
  void MustBeAbsent(const char* key) {
    if (Has(key)) {
      Fail(absl::UnimplementedError(
          absl::StrCat("key ", key, " is ", config_[key].dump(), "; supported: null")));
    }
  }

  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }
  const absl::Status& status() const { return status_; }
  const nlohmann::json& json(const char* key) const { return config_[key]; }

 private:
  void WrongType(const char* key, const char* wanted) {
    Fail(
        absl::InvalidArgumentError(absl::StrCat("key ", key, " is ", config_[key].dump(), ", not ", wanted)));
  }

  const nlohmann::json& config_;
  absl::Status status_;
};

void ReadRope(KeyReader& keys, ModelConfig& config) {
  keys.Optional("rope_theta", config.rope_theta);
  keys.MustBeAbsent("rope_scaling");
  if (!keys.Has("rope_parameters")) return;
  const nlohmann::json& parameters = keys.json("rope_parameters");
  if (!parameters.is_object()) {
    return keys.Fail(absl::InvalidArgumentError("key rope_parameters is not an object"));
  }
  KeyReader rope(parameters);
  rope.Optional("rope_theta", config.rope_theta);
  rope.MustBe("rope_type", "default");
  rope.MustBe("partial_rotary_factor", 1.0);
  keys.Fail(Annotate(rope.status(), "key rope_parameters"));
}

void ReadDenseLayers(KeyReader& keys, ModelConfig& config) {
  // As launch/config resolves it. Sizes that are out of range keep the default, so that Validate names them
  // and not this one.
  if (config.num_experts_per_tok > 0 && config.intermediate_size > 0 &&
      config.intermediate_size < INT32_MAX) {
    config.dense_intermediate_size = config.num_experts_per_tok * config.intermediate_size;
  }
  keys.Optional("shoal_dense_intermediate_size", config.dense_intermediate_size);
  if (!keys.Has("shoal_dense_layers")) return;
  const auto fail = [&] {
    keys.Fail(absl::InvalidArgumentError(absl::StrCat(
        "key shoal_dense_layers is ", keys.json("shoal_dense_layers").dump(), ", not a list of layers")));
  };
  if (!keys.json("shoal_dense_layers").is_array() || config.num_hidden_layers < 1) return fail();
  config.dense_layers.assign(static_cast<size_t>(config.num_hidden_layers), false);
  for (const nlohmann::json& layer : keys.json("shoal_dense_layers")) {
    if (!layer.is_number_unsigned() || layer.get<uint64_t>() >= config.dense_layers.size()) return fail();
    config.dense_layers[layer.get<size_t>()] = true;
  }
}

void ReadAuxLoss(KeyReader& keys, ModelConfig& config) {
  std::string name = "hf";
  keys.Optional("aux_loss", name);
  if (name == "hf") {
    config.aux_loss = AuxLoss::kHf;
  } else if (name == "switch") {
    config.aux_loss = AuxLoss::kSwitch;
  } else if (name == "none") {
    config.aux_loss = AuxLoss::kNone;
  } else {
    keys.Fail(
        absl::InvalidArgumentError(absl::StrCat("key aux_loss is \"", name, "\", not hf, switch or none")));
  }
  config.router_aux_loss_coef = 0.001;  // Hugging Face's default.
  keys.Optional("router_aux_loss_coef", config.router_aux_loss_coef);
  keys.Optional("router_z_loss_coef", config.router_z_loss_coef);
}

void ReadRouter(KeyReader& keys, ModelConfig& config) {
  std::string name = "topk";
  keys.Optional("router", name);
  if (const auto kind = RouterKindOf(name); kind.has_value()) {
    config.router = *kind;
  } else {
    keys.Fail(absl::UnimplementedError(absl::StrCat(
        "key router is \"", name, "\"; supported: topk, switch, gshard, sigmoid_bias, xmoe, expert_choice")));
  }
  keys.Optional("norm_topk_prob", config.norm_topk_prob);
  keys.Optional("capacity_factor", config.capacity_factor);
  keys.Optional("routed_scaling_factor", config.routed_scaling_factor);
  keys.Optional("bias_update_rate", config.bias_update_rate);
  keys.Optional("seq_aux_loss_coef", config.seq_aux_loss_coef);
  keys.Optional("router_dim", config.router_dim);
  keys.Optional("router_temperature_init", config.router_temperature_init);
  keys.Optional("shared_intermediate_size", config.shared_intermediate_size);
}

// Settings that other members of the family have and Shoal does not compute.
void RefuseWhatIsNotComputed(KeyReader& keys) {
  std::string model_type = "mixtral";
  keys.Optional("model_type", model_type);
  if (model_type != "mixtral" && model_type != "shoal") {
    keys.Fail(absl::UnimplementedError(
        absl::StrCat("model_type is \"", model_type, "\"; supported: \"mixtral\" (MixtralForCausalLM)")));
  }
  keys.MustBe("hidden_act", "silu");
  keys.MustBe("attention_bias", false);
  keys.MustBe("attention_dropout", 0.0);
  keys.MustBe("router_jitter_noise", 0.0);
  keys.MustBeAbsent("sliding_window");
  keys.MustBeAbsent("quantization_config");
}

void ReadSizes(KeyReader& keys, ModelConfig& config) {
  keys.Required("vocab_size", config.vocab_size);
  keys.Required("hidden_size", config.hidden_size);
  keys.Required("intermediate_size", config.intermediate_size);
  keys.Required("num_hidden_layers", config.num_hidden_layers);
  keys.Required("num_attention_heads", config.num_attention_heads);
  keys.Required("num_local_experts", config.num_local_experts);
  keys.Required("num_experts_per_tok", config.num_experts_per_tok);
  config.num_key_value_heads = config.num_attention_heads;
  if (!keys.IsNull("num_key_value_heads")) keys.Required("num_key_value_heads", config.num_key_value_heads);
  if (keys.Has("head_dim")) {
    keys.Optional("head_dim", config.head_dim);
  } else if (config.num_attention_heads > 0 && config.hidden_size % config.num_attention_heads == 0) {
    config.head_dim = config.hidden_size / config.num_attention_heads;
  } else {
    keys.Fail(absl::InvalidArgumentError(
        "key head_dim is missing, and num_attention_heads does not divide hidden_size"));
  }
}

// Settings that change what equal weights compute. Shapes do not show them all.
std::vector<std::string> Differences(const ModelConfig& have, const ModelConfig& want) {
  std::vector<std::string> lines;
  const auto compare = [&](const char* key, auto in_file, auto wanted) {
    if (in_file == wanted) return;
    const nlohmann::json texts[] = {in_file, wanted};  // Prints every digit.
    lines.push_back(
        absl::StrCat("config.json: ", key, " is ", texts[0].dump(), ", wanted is ", texts[1].dump()));
  };
  compare("vocab_size", have.vocab_size, want.vocab_size);
  compare("hidden_size", have.hidden_size, want.hidden_size);
  compare("intermediate_size", have.intermediate_size, want.intermediate_size);
  compare("num_hidden_layers", have.num_hidden_layers, want.num_hidden_layers);
  compare("num_attention_heads", have.num_attention_heads, want.num_attention_heads);
  compare("num_key_value_heads", have.num_key_value_heads, want.num_key_value_heads);
  compare("head_dim", have.head_dim, want.head_dim);
  compare("num_local_experts", have.num_local_experts, want.num_local_experts);
  compare("num_experts_per_tok", have.num_experts_per_tok, want.num_experts_per_tok);
  compare("router", Name(have.router), Name(want.router));
  compare("norm_topk_prob", have.norm_topk_prob, want.norm_topk_prob);
  compare("capacity_factor", have.capacity_factor, want.capacity_factor);
  compare("routed_scaling_factor", have.routed_scaling_factor, want.routed_scaling_factor);
  compare("router_dim", have.router_dim, want.router_dim);
  compare("shared_intermediate_size", have.shared_intermediate_size, want.shared_intermediate_size);
  compare("rms_norm_eps", have.rms_norm_eps, want.rms_norm_eps);
  compare("rope_theta", have.rope_theta, want.rope_theta);
  compare("tie_word_embeddings", have.tie_word_embeddings, want.tie_word_embeddings);
  return lines;
}

bool HoldsWeights(const SafetensorsEntry& entry) {
  return entry.dtype == DType::kF32 || entry.dtype == DType::kBF16 || entry.dtype == DType::kF16 ||
         entry.dtype == DType::kF64;
}

bool EqualBytes(const SafetensorsSet::Item& a, const SafetensorsSet::Item& b) {
  if (a.entry->dtype != b.entry->dtype || a.entry->shape != b.entry->shape) return false;
  const absl::Span<const std::byte> bytes = a.file->Bytes(*a.entry);
  return bytes.empty() || std::memcmp(bytes.data(), b.file->Bytes(*b.entry).data(), bytes.size()) == 0;
}

bool FitsMixtral(const ModelConfig& config) {
  return config.router == RouterKind::kTopK && config.norm_topk_prob && config.shared_intermediate_size == 0 &&
         NumMoeLayers(config) == config.num_hidden_layers;
}

std::string ConfigJson(const ModelConfig& config, const ExportOptions& options) {
  const bool mixtral = FitsMixtral(config);
  nlohmann::ordered_json json;
  json["architectures"] = {mixtral ? "MixtralForCausalLM" : "ShoalForCausalLM"};
  json["model_type"] = mixtral ? "mixtral" : "shoal";
  json["vocab_size"] = config.vocab_size;
  json["hidden_size"] = config.hidden_size;
  json["intermediate_size"] = config.intermediate_size;
  json["num_hidden_layers"] = config.num_hidden_layers;
  json["num_attention_heads"] = config.num_attention_heads;
  json["num_key_value_heads"] = config.num_key_value_heads;
  json["head_dim"] = config.head_dim;
  json["num_local_experts"] = config.num_local_experts;
  json["num_experts_per_tok"] = config.num_experts_per_tok;
  json["hidden_act"] = "silu";
  json["max_position_embeddings"] = options.max_position_embeddings;
  json["rms_norm_eps"] = config.rms_norm_eps;
  json["rope_theta"] = config.rope_theta;
  json["sliding_window"] = nullptr;
  json["attention_dropout"] = 0.0;
  json["tie_word_embeddings"] = config.tie_word_embeddings;
  json["initializer_range"] = config.initializer_range;
  json["output_router_logits"] = false;
  json["router_jitter_noise"] = 0.0;
  json["router_aux_loss_coef"] = config.router_aux_loss_coef;
  json["router_z_loss_coef"] = config.router_z_loss_coef;
  json["aux_loss"] = config.aux_loss == AuxLoss::kHf       ? "hf"
                     : config.aux_loss == AuxLoss::kSwitch ? "switch"
                                                           : "none";
  json["use_cache"] = true;
  // Not Mixtral's defaults 1 and 2: with a byte vocabulary these are ordinary bytes.
  json["bos_token_id"] = nullptr;
  json["eos_token_id"] = nullptr;
  json["pad_token_id"] = nullptr;
  json["torch_dtype"] = options.dtype == DType::kBF16 ? "bfloat16" : "float32";
  if (!mixtral) {
    json["router"] = Name(config.router);
    json["norm_topk_prob"] = config.norm_topk_prob;
    json["capacity_factor"] = config.capacity_factor;
    json["routed_scaling_factor"] = config.routed_scaling_factor;
    json["bias_update_rate"] = config.bias_update_rate;
    json["seq_aux_loss_coef"] = config.seq_aux_loss_coef;
    json["router_dim"] = config.router_dim;
    json["router_temperature_init"] = config.router_temperature_init;
    json["shared_intermediate_size"] = config.shared_intermediate_size;
    json["shoal_dense_layers"] = nlohmann::ordered_json::array();
    for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
      if (config.is_dense(layer)) json["shoal_dense_layers"].push_back(layer);
    }
    json["shoal_dense_intermediate_size"] = config.dense_intermediate_size;
  }
  return json.dump(2) + "\n";
}

}  // namespace

absl::StatusOr<ModelConfig> ReadHuggingFaceConfig(const std::string& path) {
  SHOAL_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  SHOAL_ASSIGN_OR_RETURN(const nlohmann::json json, ParseJson(text, path));
  if (!json.is_object()) return absl::InvalidArgumentError(absl::StrCat(path, ": not an object"));
  ModelConfig config;
  KeyReader keys(json);
  RefuseWhatIsNotComputed(keys);
  ReadSizes(keys, config);
  keys.Optional("rms_norm_eps", config.rms_norm_eps);
  keys.Optional("tie_word_embeddings", config.tie_word_embeddings);
  keys.Optional("initializer_range", config.initializer_range);
  ReadRouter(keys, config);
  ReadRope(keys, config);
  ReadAuxLoss(keys, config);
  ReadDenseLayers(keys, config);
  SHOAL_RETURN_IF_ERROR(keys.status(), path);
  SHOAL_RETURN_IF_ERROR(Validate(config), path);
  return config;
}

absl::StatusOr<ModelFolder> ModelFolder::Open(const std::string& path) {
  if (!IsFolder(path)) {
    SHOAL_ASSIGN_OR_RETURN(SafetensorsSet tensors, SafetensorsSet::Open(path));
    return ModelFolder(path, std::nullopt, std::move(tensors));
  }
  SHOAL_ASSIGN_OR_RETURN(ModelConfig config, ReadHuggingFaceConfig(JoinPath(path, "config.json")));
  const std::string single = JoinPath(path, "model.safetensors");
  const std::string index = JoinPath(path, "model.safetensors.index.json");
  // As transformers: the single file first.
  if (FileBytes(single).ok()) {
    SHOAL_ASSIGN_OR_RETURN(SafetensorsSet tensors, SafetensorsSet::Open(single));
    return ModelFolder(path, std::move(config), std::move(tensors));
  }
  if (!FileBytes(index).ok()) {
    return absl::NotFoundError(
        absl::StrCat(path, ": neither model.safetensors nor model.safetensors.index.json is there"));
  }
  SHOAL_ASSIGN_OR_RETURN(SafetensorsSet tensors, SafetensorsSet::Open(index));
  return ModelFolder(path, std::move(config), std::move(tensors));
}

absl::Status ModelFolder::Check(const ModelConfig& config) const {
  std::vector<std::string> problems;
  if (config_.has_value()) problems = Differences(*config_, config);
  const auto& items = tensors_.items();
  std::map<std::string, Shape> wanted;
  for (ParameterSpec& spec : ParameterSpecs(config)) wanted[std::move(spec.name)] = std::move(spec.shape);
  for (ParameterSpec& spec : RouterStateSpecs(config)) {
    if (items.contains(spec.name)) wanted[std::move(spec.name)] = std::move(spec.shape);
  }
  for (const auto& [name, shape] : wanted) {
    const auto item = items.find(name);
    if (item == items.end()) {
      problems.push_back(absl::StrCat("missing tensor ", name, " ", ShapeString(shape)));
      continue;
    }
    const SafetensorsEntry& entry = *item->second.entry;
    if (entry.shape != shape) {
      problems.push_back(absl::StrCat("misshapen tensor ", name, ": ", ShapeString(entry.shape),
                                      ", wanted is ", ShapeString(shape)));
    }
    if (!HoldsWeights(entry)) {
      problems.push_back(absl::StrCat("tensor ", name, " is ", entry.dtype_name, ", which holds no weights"));
    }
  }
  for (const auto& [name, item] : items) {
    if (wanted.contains(name)) continue;
    if (name != kHead || !config.tie_word_embeddings) {
      problems.push_back(absl::StrCat("extra tensor ", name, " ", ShapeString(item.entry->shape)));
    } else if (items.contains(kEmbedding) && !EqualBytes(item, items.at(kEmbedding))) {
      problems.push_back(
          absl::StrCat("tensor ", kHead, " differs from ", kEmbedding, ", but the head is tied"));
    }
  }
  if (problems.empty()) return absl::OkStatus();
  std::string message = absl::StrCat(path_, " does not hold this model (", problems.size(), " differences):");
  for (const std::string& problem : problems) absl::StrAppend(&message, "\n  ", problem);
  return absl::InvalidArgumentError(message);
}

absl::Status ModelFolder::Read(const std::string& name, int64_t row_begin, const Tensor& out) const {
  return tensors_.Read(name, row_begin, out);
}

absl::Status WriteModelFolder(const std::string& folder, const ModelConfig& config,
                              const std::function<absl::Status(const std::string&, const Tensor&)>& source,
                              const ExportOptions& options) {
  if (options.dtype != DType::kF32 && options.dtype != DType::kBF16) {
    return absl::InvalidArgumentError(absl::StrCat("cannot export as ", AbslSv(Name(options.dtype))));
  }
  SHOAL_RETURN_IF_ERROR(Validate(config), "exporting to ", folder);
  SHOAL_RETURN_IF_ERROR(MakeFolders(folder, options.faults));
  std::vector<SafetensorsSpec> specs;
  for (ParameterSpec& spec : ParameterSpecs(config)) {
    specs.push_back({std::move(spec.name), options.dtype, std::move(spec.shape)});
  }
  // Small, and added up in steps that bf16 would swallow.
  for (ParameterSpec& spec : RouterStateSpecs(config)) {
    specs.push_back({std::move(spec.name), DType::kF32, std::move(spec.shape)});
  }
  const auto read = [&](size_t index) -> absl::StatusOr<Tensor> {
    const SafetensorsSpec& spec = specs[index];
    Tensor master = Empty(spec.shape, DType::kF32);
    SHOAL_RETURN_IF_ERROR(source(spec.name, master));
    if (spec.dtype == DType::kF32) return master;
    Tensor rounded = Empty(spec.shape, spec.dtype);
    SHOAL_RETURN_IF_ERROR(ConvertElements(static_cast<const std::byte*>(master.raw()), DType::kF32,
                                          rounded.raw(), spec.dtype, master.elements()));
    return rounded;
  };
  // `format: pt` is what transformers asks of every file.
  const absl::StatusOr<int64_t> written = WriteSafetensors(JoinPath(folder, "model.safetensors"), specs,
                                                           {{"format", "pt"}}, read, options.faults);
  SHOAL_RETURN_IF_ERROR(written.status());
  return WriteFileAtomic(JoinPath(folder, "config.json"), ConfigJson(config, options), options.faults);
}

}  // namespace shoal
