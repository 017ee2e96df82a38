// The batches of a run: rows of seq + 1 token ids, of which the first seq are inputs and the last seq are
// labels. Hides files, splits and sample orders. What a row holds depends on the options and the row's number
// alone, never on ranks, threads or earlier calls; so any rank reads any rows of any step, in any pieces.
// Immutable and thread-safe; reads may block on the disk.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "models/data/token_source.h"
#include "runtime/base/status.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

inline constexpr int64_t kEndless = std::numeric_limits<int64_t>::max();

class BatchSource {
 public:
  virtual ~BatchSource() = default;

  // kEndless, or the number of steps that there are.
  virtual int64_t steps() const = 0;
  virtual int64_t rows_per_step() const = 0;
  // Tokens that a row predicts: its width less one.
  virtual int64_t seq() const = 0;
  // Fills `out`, i32 [rows, seq + 1], with rows [row_begin, row_begin + rows) of `step`; they must be within
  // rows_per_step(). OUT_OF_RANGE: `step` is steps() or later. INVALID_ARGUMENT, DATA_LOSS: a stored id is no
  // token of the vocabulary.
  virtual absl::Status ReadRows(int64_t step, int64_t row_begin, const Tensor& out) const = 0;
};

using BatchSourcePtr =
    std::shared_ptr<const BatchSource>;  // Shared: prefetchers and the trainer end in any order.

enum class DataKind : uint8_t { kText, kMegatron, kSafetensors, kRandom };
enum class DataOrder : uint8_t { kShuffled, kSequential };

// By the names of the configuration: "text", "shuffled", ... INVALID_ARGUMENT: another name.
absl::StatusOr<DataKind> ParseDataKind(std::string_view name);
absl::StatusOr<DataOrder> ParseDataOrder(std::string_view name);

// Rows of a token source without end. Numbering windows w = step * batch + row:
// * kSequential: window w starts at (w * seq) mod (n - seq), n the source's size.
// * kShuffled: an epoch is max(1, n / seq - 1) windows side by side, in a pseudo-random order keyed by (seed,
// epoch); an epoch
//   may begin anywhere in a step. The first window of the epoch starts at a phase below seq that differs from
//   epoch to epoch, so that over seq epochs the text is cut at every place; less than two windows of tokens
//   at the ends miss an epoch.
// INVALID_ARGUMENT: the source has less than seq + 1 tokens.
struct WindowOptions {
  DataOrder order = DataOrder::kShuffled;
  uint64_t seed = 0;
  int64_t seq = 0;
  int64_t batch = 0;
};
absl::StatusOr<BatchSourcePtr> TrainingWindows(TokenSourcePtr tokens, const WindowOptions& options);

// One step, whose rows are all windows of the source side by side: row r reads seq + 1 tokens from r * seq.
// Each token but the first is predicted once; a last, partial window is dropped. INVALID_ARGUMENT: less than
// seq + 1 tokens.
absl::StatusOr<BatchSourcePtr> ValidationWindows(TokenSourcePtr tokens, int64_t seq);

struct DatasetOptions {
  DataKind kind = DataKind::kText;
  // A text file, the prefix of a .bin/.idx pair or a .safetensors file; of kRandom: not used.
  std::string path;
  DataOrder order = DataOrder::kShuffled;
  // Share of the tokens, at the end, that is held out. Of kSafetensors: not used.
  double validation_fraction = 0;
  uint64_t seed = 0;
  // The token that documents end with; of kMegatron that is checked, as OpenMegatron does.
  std::optional<int32_t> end_of_document;
  int64_t vocab_size = 0;
  int64_t seq = 0;
  int64_t global_batch = 0;
};

struct Dataset {
  BatchSourcePtr train;
  // ValidationWindows of the held-out tokens. Null: nothing is held out.
  BatchSourcePtr validation;
  int64_t train_tokens = 0;
  int64_t validation_tokens = 0;

  // Rows of the whole validation split; the same for any number of ranks.
  int64_t ValidationRows() const { return validation == nullptr ? 0 : validation->rows_per_step(); }
};

// Errors name the file. NOT_FOUND: there is none. INVALID_ARGUMENT: it is too short for one window (says how
// many tokens are needed), an id does not fit vocab_size (says which and where; in Megatron files this is
// found when the id is read), documents end with another token, or the shape of the tensor `batches` does not fit. DATA_LOSS: it is damaged.
absl::StatusOr<Dataset> OpenDataset(const DatasetOptions& options);

}  // namespace shoal
