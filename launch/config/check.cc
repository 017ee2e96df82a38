// Combinations of keys that cannot be.
#include <netdb.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "launch/config/config.h"
#include "runtime/base/status.h"
#include "runtime/config/schema.h"

namespace shoal {
namespace {

std::vector<int64_t> Divisors(int64_t value) {
  std::vector<int64_t> divisors;
  for (int64_t i = 1; i * i <= value; ++i) {
    if (value % i != 0) continue;
    divisors.push_back(i);
    if (i != value / i) divisors.push_back(value / i);
  }
  std::sort(divisors.begin(), divisors.end());
  return divisors;
}

// "1, 2 or 4 would fit": those nearest to what was asked for.
std::string WouldFit(std::vector<int64_t> values, int64_t wanted) {
  constexpr size_t kShownMax = 6;
  std::stable_sort(values.begin(), values.end(),
                   [&](int64_t a, int64_t b) { return std::abs(a - wanted) < std::abs(b - wanted); });
  values.resize(std::min(values.size(), kShownMax));
  std::sort(values.begin(), values.end());
  std::string text;
  for (size_t i = 0; i < values.size(); ++i) {
    absl::StrAppend(&text, i == 0 ? "" : i + 1 == values.size() ? " or " : ", ", values[i]);
  }
  return text + " would fit";
}

// Collects errors about the keys of one configuration.
class Checker {
 public:
  Checker(const Config& config, const KeyPositions& positions) : config_(config), positions_(positions) {}

  void CheckRun() {
    const std::string& name = config_.run().name();
    if (name == "." || name == ".." || name.find('/') != std::string::npos ||
        (config_.run().has_name() && name.empty())) {
      Fail("run.name", absl::StrCat("\"", name, "\" is no name of a folder"));
    }
  }

  void CheckModel() {
    const Model& model = config_.model();
    const int64_t heads = model.num_attention_heads();
    const int64_t kv_heads = model.num_key_value_heads();
    if (kv_heads > 0 && heads % kv_heads != 0) {
      Fail("model.num_key_value_heads",
           absl::StrCat(kv_heads, " does not divide ", Mention("model.num_attention_heads", heads), "; ",
                        WouldFit(Divisors(heads), kv_heads)));
    }
    if (model.head_dim() % 2 != 0) {
      Fail("model.head_dim", absl::StrCat(model.head_dim(), " is odd, and rotary positions turn pairs; ",
                                          WouldFit({model.head_dim() - 1, model.head_dim() + 1}, 0)));
    }
    if (model.head_dim() == 0) CheckDerivedHeadDim(model.hidden_size(), heads);
    if (model.num_experts_per_tok() > model.num_local_experts()) {
      Fail("model.num_experts_per_tok",
           absl::StrCat(model.num_experts_per_tok(), " is more than ",
                        Mention("model.num_local_experts", model.num_local_experts()), "; at most ",
                        model.num_local_experts(), " would fit"));
    }
    CheckDenseLayers(model);
    CheckRouter(model);
  }

  void CheckData() {
    const Data& data = config_.data();
    if (data.kind() != "random" && data.path().empty()) {
      Fail("data.path", absl::StrCat("must be set with ", Mention("data.kind", data.kind())));
    }
    if (data.kind() == "text" && config_.model().vocab_size() < 256) {
      Fail("model.vocab_size", absl::StrCat(config_.model().vocab_size(), " is less than the 256 bytes of ",
                                            Mention("data.kind", data.kind()), "; at least 256 would fit"));
    }
    const int32_t end = data.end_of_document_token();
    if (data.document_mask() && end < 0) {
      Fail("data.document_mask", absl::StrCat("needs the token that documents end with, and ",
                                              Mention("data.end_of_document_token", end), " is none"));
    } else if (end >= config_.model().vocab_size()) {
      Fail("data.end_of_document_token",
           absl::StrCat(end, " is no token of ", Mention("model.vocab_size", config_.model().vocab_size()),
                        "; at most ", config_.model().vocab_size() - 1, " would fit"));
    }
    const bool held_out = data.has_validation_fraction() && data.validation_fraction() > 0;
    const std::string fraction = FormatNumber(data.validation_fraction());
    if (held_out && (data.kind() == "random" || data.kind() == "safetensors")) {
      Fail("data.validation_fraction",
           absl::StrCat(fraction, " cannot be held out with ", Mention("data.kind", data.kind()),
                        ", which has no text to hold out; 0 would fit"));
    } else if (held_out && data.order() == "sequential") {
      Fail("data.validation_fraction",
           absl::StrCat(fraction, " cannot be held out with ", Mention("data.order", data.order()),
                        ", which reads the whole text; 0, or data.order = shuffled, would fit"));
    }
  }

  void CheckTrain() {
    const Train& train = config_.train();
    if (train.global_batch_size() % train.gradient_accumulation_steps() != 0) {
      Fail("train.gradient_accumulation_steps",
           absl::StrCat(train.gradient_accumulation_steps(), " does not divide ",
                        Mention("train.global_batch_size", train.global_batch_size()), "; ",
                        WouldFit(Divisors(train.global_batch_size()), train.gradient_accumulation_steps())));
    }
    if (train.matmul() == "fp8" && train.precision() != "bf16") {
      Fail("train.matmul", absl::StrCat("fp8 does not go with ", Mention("train.precision", train.precision()),
                                        "; same, or train.precision = bf16, would fit"));
    }
    if (train.eval_interval() > 0 && ValidationFraction(config_.data()) == 0) {
      Fail("train.eval_interval", absl::StrCat(train.eval_interval(), " has nothing to validate on with ",
                                               Mention("data.validation_fraction", 0), "; 0 would fit"));
    }
  }

  void CheckScheduler() {
    const Scheduler& scheduler = config_.scheduler();
    const bool decays = scheduler.kind() != "constant";
    const bool own_end = scheduler.decay_steps() > 0;
    const int64_t end = own_end && decays ? scheduler.decay_steps() : config_.train().steps();
    const char* end_key = own_end && decays ? "scheduler.decay_steps" : "train.steps";
    if (scheduler.warmup_steps() > end) {
      Fail("scheduler.warmup_steps", absl::StrCat(scheduler.warmup_steps(), " is more than ",
                                                  Mention(end_key, end), "; at most ", end, " would fit"));
    } else if (scheduler.kind() == "wsd" && scheduler.warmup_steps() + scheduler.wsd_decay_steps() > end) {
      Fail("scheduler.wsd_decay_steps",
           absl::StrCat(scheduler.wsd_decay_steps(), " and ",
                        Mention("scheduler.warmup_steps", scheduler.warmup_steps()),
                        " are together more than ", Mention(end_key, end), "; at most ",
                        end - scheduler.warmup_steps(), " would fit"));
    }
    if (decays && scheduler.min_lr() > config_.optimizer().lr()) {
      const std::string lr = FormatNumber(config_.optimizer().lr());
      Fail("scheduler.min_lr",
           absl::StrCat(FormatNumber(scheduler.min_lr()), " is more than ",
                        positions_.Mention("optimizer.lr", lr), "; at most ", lr, " would fit"));
    }
  }

  void CheckTelemetry() {
    std::string address = config_.telemetry().metrics_address();
    if (address.size() > 2 && address.front() == '[' && address.back() == ']') {
      address = address.substr(1, address.size() - 2);
    }
    addrinfo hints{};
    hints.ai_flags = AI_NUMERICHOST;
    addrinfo* found = nullptr;
    if (getaddrinfo(address.c_str(), nullptr, &hints, &found) == 0) {
      freeaddrinfo(found);
    } else {
      Fail("telemetry.metrics_address",
           absl::StrCat("\"", address,
                        "\" is no IP address; 127.0.0.1 (this host alone) or 0.0.0.0 would fit"));
    }
  }

  void CheckExperts() {
    const Parallel& parallel = config_.parallel();
    if (parallel.experts() == "sparse") {
      CheckSparseExperts(parallel);
      return;
    }
    NeedForExperts(parallel.expert_copies() == -1, "parallel.expert_copies", absl::StrCat(parallel.expert_copies()), "-1");
    NeedForExperts(parallel.expert_overlap() == -1, "parallel.expert_overlap", absl::StrCat(parallel.expert_overlap()), "-1");
    const int64_t unset = Parallel::default_instance().reshard_interval();
    NeedForExperts(parallel.reshard_interval() == 0 || parallel.reshard_interval() == unset, "parallel.reshard_interval",
                   absl::StrCat(parallel.reshard_interval()), "0");
    NeedForExperts(parallel.owners() == Parallel::default_instance().owners(), "parallel.owners", parallel.owners(),
                   Parallel::default_instance().owners());
    NeedForExperts(!parallel.calibrate(), "parallel.calibrate", "true", "false");
  }

  void CheckSchedule() {
    const int64_t waves = config_.schedule().waves();
    const int64_t rows = config_.train().global_batch_size() / config_.train().gradient_accumulation_steps();
    const double capacity = config_.model().capacity_factor();
    if (waves > 1 && capacity > 0) {
      Fail("schedule.waves", absl::StrCat(waves, " does not go with ", Mention("model.capacity_factor", FormatNumber(capacity)),
                                          ", with which choices depend on all tokens; 0 or 1 would fit"));
    } else if (rows > 0 && waves > rows) {
      Fail("schedule.waves", absl::StrCat(waves, " is more than the ", rows, " sequences of a part of the batch (",
                                          Mention("train.global_batch_size", config_.train().global_batch_size()),
                                          "); at most ", rows, " would fit"));
    }
  }

  void CheckNumerics() {
    const std::string& numerics = config_.train().numerics();
    if (numerics == "fast") return;
    const StepSchedule& schedule = config_.schedule();
    for (const auto& [key, value] : {std::pair{"schedule.chunks_forward", schedule.chunks_forward()},
                                     {"schedule.chunks_backward", schedule.chunks_backward()},
                                     {"schedule.waves", schedule.waves()}}) {
      if (value <= 1) continue;
      Fail(key, absl::StrCat(value, " does not go with ", Mention("train.numerics", numerics),
                             ", whose sums are those of undivided work; 0 or 1 would fit"));
    }
    if (config_.comm().transport() == "mpi") {
      Fail("comm.transport", absl::StrCat("mpi adds in an order of its own, which does not go with ",
                                          Mention("train.numerics", numerics), "; auto or tcp would fit"));
    }
  }

  void CheckExpertParallel(int world_size) {
    const Model& model = config_.model();
    const int64_t wanted = config_.parallel().expert() == -1 ? world_size : config_.parallel().expert();
    const bool has_experts = model.dense_layers_size() < model.num_hidden_layers();
    std::vector<int64_t> fitting = Divisors(world_size);
    if (has_experts) std::erase_if(fitting, [&](int64_t value) { return value > model.num_local_experts(); });
    if (std::find(fitting.begin(), fitting.end(), wanted) != fitting.end()) return;
    const std::string ranks = absl::StrCat(world_size, world_size == 1 ? " rank" : " ranks");
    const std::string given =
        config_.parallel().expert() == -1 ? absl::StrCat("-1, all ", ranks, ",") : absl::StrCat(wanted);
    std::string why;
    if (wanted < 1) {
      why = absl::StrCat(given, " is no number of ranks");
    } else if (world_size % wanted != 0) {
      why = absl::StrCat(given, " does not divide ", ranks);
    } else {
      why = absl::StrCat(given, " is more than ",
                         Mention("model.num_local_experts", model.num_local_experts()));
    }
    Fail("parallel.expert", absl::StrCat(why, "; ", WouldFit(fitting, wanted)));
  }

  absl::Status ToStatus() const { return errors_.ToStatus(); }

 private:
  void Fail(std::string_view key, std::string_view text) { errors_.Add(positions_.Where(key), key, text); }
  std::string Mention(std::string_view key, int64_t value) const {
    return positions_.Mention(key, absl::StrCat(value));
  }
  std::string Mention(std::string_view key, const std::string& value) const {
    return positions_.Mention(key, value);
  }

  void CheckDerivedHeadDim(int64_t hidden, int64_t heads) {
    if (hidden % heads == 0 && hidden / heads % 2 == 0) return;
    const std::string why =
        hidden % heads != 0 ? "is not a multiple of " : "gives heads of an odd width with ";
    const int64_t step = 2 * heads;
    std::vector<int64_t> fitting = {hidden / step * step, hidden / step * step + step};
    std::erase(fitting, 0);
    Fail("model.hidden_size", absl::StrCat(hidden, " ", why, Mention("model.num_attention_heads", heads),
                                           "; ", WouldFit(fitting, hidden), ", or an even model.head_dim"));
  }

  // Fails on a key that parallel.experts does not have unless it has the value that would fit.
  void NeedForExperts(bool fits, std::string_view key, std::string_view value, std::string_view fitting) {
    if (fits) return;
    Fail(key, absl::StrCat(AbslSv(value), " does not go with ", Mention("parallel.experts", config_.parallel().experts()), "; ",
                           AbslSv(fitting), ", or parallel.experts = sparse, would fit"));
  }

  void CheckSparseExperts(const Parallel& parallel) {
    if (parallel.expert() != 1) {
      Fail("parallel.expert", absl::StrCat(parallel.expert(), " makes groups of ranks, which ",
                                           Mention("parallel.experts", parallel.experts()), " has none of; 1 would fit"));
    }
    const int64_t experts = config_.model().num_local_experts();
    const auto at_most_all = [&](std::string_view key, int64_t value) {
      if (value <= experts) return;
      Fail(key, absl::StrCat(value, " is more than ", Mention("model.num_local_experts", experts), "; at most ", experts,
                             " would fit"));
    };
    at_most_all("parallel.expert_copies", parallel.expert_copies());
    at_most_all("parallel.expert_overlap", parallel.expert_overlap());
    if (parallel.expert_copies() != 0) return;
    const std::string no_copies = Mention("parallel.expert_copies", 0);
    if (parallel.expert_overlap() > 0) {
      Fail("parallel.expert_overlap", absl::StrCat(parallel.expert_overlap(), " experts have no room with ", no_copies,
                                                   "; 0 would fit"));
    }
    if (parallel.calibrate()) {
      Fail("parallel.calibrate", absl::StrCat("true has no room for copies with ", no_copies, "; false would fit"));
    }
    if (parallel.rematerialise()) {
      Fail("parallel.rematerialise", absl::StrCat("true has nothing to gather again with ", no_copies, "; false would fit"));
    }
  }

  // Fails on a key that model.router does not have unless it has the value that would fit.
  void NeedForRouter(bool fits, std::string_view key, const std::string& value, std::string_view fitting) {
    if (fits) return;
    Fail(key, absl::StrCat(value, " does not go with ", Mention("model.router", config_.model().router()), "; ", AbslSv(fitting),
                           " would fit"));
  }

  void CheckRouter(const Model& model) {
    const std::string& kind = model.router();
    const bool sigmoid = kind == "sigmoid_bias", experts_choose = kind == "expert_choice";
    const std::string choices = absl::StrCat(model.num_experts_per_tok());
    NeedForRouter(kind != "switch" || model.num_experts_per_tok() == 1, "model.num_experts_per_tok", choices, "1");
    NeedForRouter(kind != "gshard" || model.num_experts_per_tok() == 2, "model.num_experts_per_tok", choices, "2");
    const std::string factor = FormatNumber(model.capacity_factor());
    NeedForRouter(!experts_choose || model.capacity_factor() > 0, "model.capacity_factor", factor, "more than 0");
    NeedForRouter(experts_choose || kind == "switch" || kind == "gshard" || model.capacity_factor() == 0,
                  "model.capacity_factor", factor, "0");
    NeedForRouter((!sigmoid && !experts_choose) || !model.has_aux_loss() || model.aux_loss() == "none", "model.aux_loss",
                  model.aux_loss(), "none");
    NeedForRouter(!sigmoid || model.router_z_loss_coef() == 0, "model.router_z_loss_coef",
                  FormatNumber(model.router_z_loss_coef()), "0");
    NeedForRouter(sigmoid || model.seq_aux_loss_coef() == 0, "model.seq_aux_loss_coef",
                  FormatNumber(model.seq_aux_loss_coef()), "0");
    NeedForRouter(kind == "topk" || model.norm_topk_prob(), "model.norm_topk_prob", "false", "true");
    NeedForRouter(kind != "xmoe" || model.router_dim() > 0, "model.router_dim", "0", "more than 0");
    NeedForRouter(kind == "xmoe" || model.router_dim() == 0, "model.router_dim", absl::StrCat(model.router_dim()), "0");
  }

  void CheckDenseLayers(const Model& model) {
    std::set<int> seen;
    for (const int layer : model.dense_layers()) {
      if (layer < 0 || layer >= model.num_hidden_layers()) {
        Fail("model.dense_layers", absl::StrCat(layer, " is no layer with ",
                                                Mention("model.num_hidden_layers", model.num_hidden_layers()),
                                                "; 0 to ", model.num_hidden_layers() - 1, " would fit"));
      } else if (!seen.insert(layer).second) {
        Fail("model.dense_layers", absl::StrCat(layer, " stands in the list twice"));
      }
    }
  }

  const Config& config_;
  const KeyPositions& positions_;
  ConfigErrors errors_;
};

}  // namespace

absl::Status CheckConfig(const Config& config, const KeyPositions& positions) {
  Checker checker(config, positions);
  checker.CheckRun();
  checker.CheckModel();
  checker.CheckData();
  checker.CheckTrain();
  checker.CheckScheduler();
  checker.CheckTelemetry();
  checker.CheckExperts();
  checker.CheckSchedule();
  checker.CheckNumerics();
  return checker.ToStatus();
}

absl::Status CheckParallel(const Config& config, const KeyPositions& positions, int world_size) {
  Checker checker(config, positions);
  checker.CheckExpertParallel(world_size);
  return checker.ToStatus();
}

}  // namespace shoal
