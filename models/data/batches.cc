#include "models/data/batches.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "models/data/random.h"
#include "runtime/base/check.h"
#include "runtime/files/safetensors.h"

namespace shoal {
namespace {

// Of `random` data: more than a benchmark reads, and a validation split that still ends.
constexpr int64_t kRandomTokens = int64_t{1} << 24;

void CheckRows(const BatchSource& source, int64_t step, int64_t row_begin, const Tensor& out) {
  SHOAL_CHECK(out.rank() == 2 && out.dim(1) == source.seq() + 1)
      << ShapeString(out.shape()) << " for rows of " << source.seq() + 1;
  SHOAL_CHECK(step >= 0 && row_begin >= 0 && out.dim(0) <= source.rows_per_step() - row_begin)
      << "step " << step << " rows " << row_begin << "+" << out.dim(0) << " of " << source.rows_per_step();
}

absl::Status CheckLength(const TokenSource& tokens, int64_t seq) {
  if (tokens.size() > seq) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(tokens.size(), " tokens are too few: one window of ", seq,
                                                 " tokens and its last label need ", seq + 1));
}

// Rows that are windows of a token source.
class WindowBatches : public BatchSource {
 public:
  WindowBatches(TokenSourcePtr tokens, int64_t steps, int64_t rows_per_step, int64_t seq)
      : tokens_(std::move(tokens)), steps_(steps), rows_per_step_(rows_per_step), seq_(seq) {}

  int64_t steps() const override { return steps_; }
  int64_t rows_per_step() const override { return rows_per_step_; }
  int64_t seq() const override { return seq_; }

  absl::Status ReadRows(int64_t step, int64_t row_begin, const Tensor& out) const override {
    CheckRows(*this, step, row_begin, out);
    if (step >= steps_)
      return absl::OutOfRangeError(absl::StrCat("step ", step, " of ", steps_, " steps of data"));
    SHOAL_CHECK_LT(step, kEndless / (rows_per_step_ * seq_) - 1);
    const absl::Span<int32_t> ids = out.span<int32_t>();
    for (int64_t row = 0; row < out.dim(0); ++row) {
      const int64_t begin = WindowBegin(step * rows_per_step_ + row_begin + row);
      SHOAL_RETURN_IF_ERROR(tokens_->Read(begin, ids.subspan(row * (seq_ + 1), seq_ + 1)));
    }
    return absl::OkStatus();
  }

 protected:
  // Where window `window`, counted from 0 over all steps, starts.
  virtual int64_t WindowBegin(int64_t window) const = 0;
  int64_t tokens() const { return tokens_->size(); }

 private:
  const TokenSourcePtr tokens_;
  const int64_t steps_;
  const int64_t rows_per_step_;
  const int64_t seq_;
};

class SequentialBatches : public WindowBatches {
 public:
  using WindowBatches::WindowBatches;

 private:
  int64_t WindowBegin(int64_t window) const override { return window * seq() % (tokens() - seq()); }
};

class ShuffledBatches : public WindowBatches {
 public:
  ShuffledBatches(TokenSourcePtr tokens, const WindowOptions& options)
      : WindowBatches(std::move(tokens), kEndless, options.batch, options.seq),
        windows_(std::max<int64_t>(1, this->tokens() / seq() - 1)),
        order_key_(SplitMix64(options.seed, 0)),
        phases_(std::min(seq(), this->tokens() - windows_ * seq()), SplitMix64(options.seed, 1)) {}

 private:
  int64_t WindowBegin(int64_t window) const override {
    const auto epoch = static_cast<uint64_t>(window / windows_);
    const Permutation order(windows_, SplitMix64(order_key_, epoch));
    const uint64_t phase = phases_.At(epoch % phases_.size());
    return static_cast<int64_t>(phase + order.At(window % windows_) * static_cast<uint64_t>(seq()));
  }

  const int64_t windows_;  // Of an epoch.
  const uint64_t order_key_;
  const Permutation phases_;
};

// The tensor `batches`, i32 [steps, batch, seq + 1].
class StoredBatches : public BatchSource {
 public:
  StoredBatches(std::shared_ptr<const SafetensorsFile> file, const SafetensorsEntry& entry)
      : file_(std::move(file)), entry_(entry) {}

  int64_t steps() const override { return entry_.shape[0]; }
  int64_t rows_per_step() const override { return entry_.shape[1]; }
  int64_t seq() const override { return entry_.shape[2] - 1; }

  absl::Status ReadRows(int64_t step, int64_t row_begin, const Tensor& out) const override {
    CheckRows(*this, step, row_begin, out);
    if (step >= steps()) {
      return absl::OutOfRangeError(absl::StrCat(file_->path(), ": step ", step, " is past the ", steps(),
                                                " steps of the tensor batches"));
    }
    const int64_t first_row = step * rows_per_step() + row_begin;
    const int64_t row_bytes = (seq() + 1) * SizeOf(DType::kI32);
    if (!out.empty())
      std::memcpy(out.data<int32_t>(), file_->Bytes(entry_).data() + first_row * row_bytes, out.bytes());
    return absl::OkStatus();
  }

 private:
  const std::shared_ptr<const SafetensorsFile> file_;
  const SafetensorsEntry entry_;
};

absl::Status CheckStoredIds(const SafetensorsFile& file, const SafetensorsEntry& entry, int64_t vocab_size) {
  const std::byte* const bytes = file.Bytes(entry).data();
  const int64_t batch = entry.shape[1], width = entry.shape[2];
  for (int64_t i = 0; i < ElementCount(entry.shape); ++i) {
    int32_t id;
    std::memcpy(&id, bytes + i * SizeOf(DType::kI32), sizeof(id));
    if (id >= 0 && id < vocab_size) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("token ", id, " at [", i / width / batch, ", ", i / width % batch, ", ", i % width,
                     "] of the tensor batches does not fit a vocabulary of ", vocab_size));
  }
  return absl::OkStatus();
}

absl::StatusOr<Dataset> OpenStored(const DatasetOptions& options) {
  SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<const SafetensorsFile> file, SafetensorsFile::Open(options.path));
  const SafetensorsEntry* const entry = file->Find("batches");
  if (entry == nullptr)
    return absl::InvalidArgumentError(absl::StrCat(options.path, ": has no tensor batches"));
  const Shape& shape = entry->shape;
  if (entry->dtype != DType::kI32 || shape.size() != 3 || shape[0] < 1 || shape[1] != options.global_batch ||
      shape[2] != options.seq + 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.path, ": the tensor batches is ", entry->dtype_name, " ", ShapeString(shape),
                     ", want I32 [steps, ", options.global_batch, ", ", options.seq + 1,
                     "]: [steps, global batch, sequence + 1]"));
  }
  SHOAL_RETURN_IF_ERROR(CheckStoredIds(*file, *entry, options.vocab_size), options.path);
  Dataset dataset;
  dataset.train_tokens = shape[0] * shape[1] * options.seq;
  dataset.train = std::make_shared<StoredBatches>(std::move(file), *entry);
  return dataset;
}

// Text is in memory already: a byte that does not fit is found before training starts.
absl::Status ReadThrough(const TokenSource& tokens) {
  std::vector<int32_t> chunk(1 << 16);
  for (int64_t at = 0; at < tokens.size(); at += static_cast<int64_t>(chunk.size())) {
    const int64_t count = std::min<int64_t>(tokens.size() - at, static_cast<int64_t>(chunk.size()));
    SHOAL_RETURN_IF_ERROR(tokens.Read(at, absl::MakeSpan(chunk).first(count)));
  }
  return absl::OkStatus();
}

absl::StatusOr<TokenSourcePtr> OpenTokens(const DatasetOptions& options) {
  switch (options.kind) {
    case DataKind::kText: {
      SHOAL_ASSIGN_OR_RETURN(TokenSourcePtr text, OpenText(options.path));
      TokenSourcePtr tokens = CheckVocabulary(text, options.vocab_size, options.path);
      if (tokens != text) SHOAL_RETURN_IF_ERROR(ReadThrough(*tokens));
      return tokens;
    }
    case DataKind::kMegatron: {
      SHOAL_ASSIGN_OR_RETURN(TokenSourcePtr tokens, OpenMegatron(options.path, options.end_of_document));
      return CheckVocabulary(std::move(tokens), options.vocab_size, options.path + ".bin");
    }
    case DataKind::kRandom:
      return RandomTokens(options.seed, options.vocab_size, std::max(kRandomTokens, 4 * options.seq));
    case DataKind::kSafetensors:
      break;
  }
  SHOAL_CHECK(false) << "OpenDataset handles the kinds that hold no token sequence";
}

}  // namespace

absl::StatusOr<DataKind> ParseDataKind(std::string_view name) {
  if (name == "text") return DataKind::kText;
  if (name == "megatron") return DataKind::kMegatron;
  if (name == "safetensors") return DataKind::kSafetensors;
  if (name == "random") return DataKind::kRandom;
  return absl::InvalidArgumentError(
      absl::StrCat("kind of data: is ", AbslSv(name), ", want text, megatron, safetensors or random"));
}

absl::StatusOr<DataOrder> ParseDataOrder(std::string_view name) {
  if (name == "shuffled") return DataOrder::kShuffled;
  if (name == "sequential") return DataOrder::kSequential;
  return absl::InvalidArgumentError(
      absl::StrCat("order of data: is ", AbslSv(name), ", want shuffled or sequential"));
}

absl::StatusOr<BatchSourcePtr> TrainingWindows(TokenSourcePtr tokens, const WindowOptions& options) {
  SHOAL_CHECK(options.seq >= 1 && options.batch >= 1) << options.seq << " " << options.batch;
  SHOAL_RETURN_IF_ERROR(CheckLength(*tokens, options.seq));
  if (options.order == DataOrder::kShuffled) {
    return BatchSourcePtr(std::make_shared<ShuffledBatches>(std::move(tokens), options));
  }
  return BatchSourcePtr(
      std::make_shared<SequentialBatches>(std::move(tokens), kEndless, options.batch, options.seq));
}

absl::StatusOr<BatchSourcePtr> ValidationWindows(TokenSourcePtr tokens, int64_t seq) {
  SHOAL_CHECK_GE(seq, 1);
  SHOAL_RETURN_IF_ERROR(CheckLength(*tokens, seq));
  const int64_t rows = (tokens->size() - 1) / seq;
  // Within one step of (size - 1) / seq windows the sequential order never wraps around.
  return BatchSourcePtr(std::make_shared<SequentialBatches>(std::move(tokens), /*steps=*/1, rows, seq));
}

absl::StatusOr<Dataset> OpenDataset(const DatasetOptions& options) {
  SHOAL_CHECK(options.seq >= 1 && options.global_batch >= 1 && options.vocab_size >= 1)
      << options.seq << " " << options.global_batch << " " << options.vocab_size;
  SHOAL_CHECK(options.validation_fraction >= 0 && options.validation_fraction < 1)
      << options.validation_fraction;
  if (options.kind == DataKind::kSafetensors) return OpenStored(options);
  SHOAL_ASSIGN_OR_RETURN(const TokenSourcePtr tokens, OpenTokens(options));
  const std::string name = options.kind == DataKind::kRandom ? "random tokens" : options.path;
  Dataset dataset;
  dataset.validation_tokens =
      static_cast<int64_t>(static_cast<double>(tokens->size()) * options.validation_fraction);
  dataset.train_tokens = tokens->size() - dataset.validation_tokens;
  const WindowOptions windows = {options.order, options.seed, options.seq, options.global_batch};
  SHOAL_ASSIGN_OR_RETURN(dataset.train, TrainingWindows(Slice(tokens, 0, dataset.train_tokens), windows),
                         name, ": training split of ", tokens->size(), " tokens");
  if (options.validation_fraction == 0) return dataset;
  SHOAL_ASSIGN_OR_RETURN(
      dataset.validation,
      ValidationWindows(Slice(tokens, dataset.train_tokens, dataset.validation_tokens), options.seq), name,
      ": validation split, ", options.validation_fraction, " of ", tokens->size(), " tokens");
  return dataset;
}

}  // namespace shoal
