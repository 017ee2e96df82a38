#include "models/data/batches.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "models/data/megatron.h"
#include "models/data/random.h"
#include "models/data/testing.h"
#include "runtime/files/safetensors.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using testing::CountingTokens;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Rows;

const std::string kOracle = SHOAL_SOURCE_DIR "/tests/oracle/";

BatchSourcePtr Windows(int64_t tokens, const WindowOptions& options) {
  return TrainingWindows(std::make_shared<CountingTokens>(tokens), options).value();
}

// Where the first `count` windows start; checks that each is seq + 1 consecutive tokens.
std::vector<int64_t> Starts(const BatchSource& source, int64_t count) {
  std::vector<int64_t> starts;
  const int64_t rows = source.rows_per_step(), width = source.seq() + 1;
  for (int64_t step = 0; static_cast<int64_t>(starts.size()) < count; ++step) {
    const std::vector<int32_t> ids = Rows(source, step, 0, rows);
    for (int64_t row = 0; row < rows; ++row) {
      starts.push_back(ids[row * width]);
      for (int64_t i = 0; i < width; ++i) EXPECT_EQ(ids[row * width + i], starts.back() + i);
    }
  }
  starts.resize(count);
  return starts;
}

TEST(Sequential, ReadsTheBatchesOfTheOracle) {
  for (const std::string model : {"mixtral_a", "mixtral_b"}) {
    const auto file = SafetensorsFile::Open(kOracle + model + "/batches.safetensors").value();
    const Shape shape = file->Find("batches")->shape;
    const Tensor golden = Empty(shape, DType::kI32);
    SHOAL_CHECK_OK(file->Read("batches", 0, golden));
    DatasetOptions options = {.kind = DataKind::kText,
                              .path = kOracle + "text.txt",
                              .order = DataOrder::kSequential,
                              .vocab_size = 256,
                              .seq = shape[2] - 1,
                              .global_batch = shape[1]};
    const Dataset text = OpenDataset(options).value();
    EXPECT_EQ(text.validation, nullptr);
    EXPECT_EQ(text.ValidationRows(), 0);
    options.kind = DataKind::kSafetensors;
    options.path = kOracle + model + "/batches.safetensors";
    const Dataset stored = OpenDataset(options).value();
    EXPECT_EQ(stored.train->steps(), shape[0]);
    for (int64_t step = 0; step < shape[0]; ++step) {
      const absl::Span<int32_t> ids = golden.Rows(step, 1).span<int32_t>();
      const std::vector<int32_t> want(ids.begin(), ids.end());
      EXPECT_EQ(Rows(*text.train, step, 0, shape[1]), want) << model << " step " << step;
      EXPECT_EQ(Rows(*stored.train, step, 0, shape[1]), want) << model << " step " << step;
    }
  }
}

TEST(Sequential, WrapsAroundAsDocumented) {
  const BatchSourcePtr source = Windows(100, {.order = DataOrder::kSequential, .seq = 8, .batch = 3});
  const std::vector<int64_t> starts = Starts(*source, 1000);
  for (int64_t w = 0; w < 1000; ++w) EXPECT_EQ(starts[w], w * 8 % 92);
}

TEST(Shuffled, EveryEpochReadsEachOfItsWindowsOnce) {
  for (const int64_t seq : {1, 2, 7, 32}) {
    for (int64_t tokens = seq + 1; tokens < 40 * seq; tokens += 1 + seq / 3) {
      const int64_t windows = std::max<int64_t>(1, tokens / seq - 1);
      const int64_t epochs = 4;
      const BatchSourcePtr source = Windows(tokens, {.seed = 11, .seq = seq, .batch = 3});
      std::vector<int64_t> starts = Starts(*source, windows * epochs);
      for (int64_t epoch = 0; epoch < epochs; ++epoch) {
        const auto begin = starts.begin() + epoch * windows;
        std::sort(begin, begin + windows);
        ASSERT_LT(*begin, seq);
        for (int64_t i = 0; i < windows; ++i) ASSERT_EQ(begin[i], *begin + i * seq) << tokens << " " << seq;
        ASSERT_LE(begin[windows - 1] + seq + 1, tokens);
      }
    }
  }
}

TEST(Shuffled, EpochsAndSeedsHaveTheirOwnOrders) {
  constexpr int64_t kSeq = 4, kWindows = 99;
  std::set<std::vector<int64_t>> orders;
  for (const uint64_t seed : {0, 1, 2}) {
    const BatchSourcePtr source = Windows(400, {.seed = seed, .seq = kSeq, .batch = 5});
    const std::vector<int64_t> starts = Starts(*source, 10 * kWindows);
    for (int64_t epoch = 0; epoch < 10; ++epoch) {
      std::vector<int64_t> order(starts.begin() + epoch * kWindows, starts.begin() + (epoch + 1) * kWindows);
      const int64_t phase = *std::min_element(order.begin(), order.end());
      for (int64_t& start : order) start -= phase;
      orders.insert(order);
    }
  }
  EXPECT_EQ(orders.size(), 30u);
}

TEST(Shuffled, OverSeqEpochsTheTextIsCutAtEveryPlaceOnce) {
  constexpr int64_t kSeq = 16, kWindows = 9;
  const BatchSourcePtr source = Windows(kSeq * (kWindows + 1), {.seed = 3, .seq = kSeq, .batch = 1});
  const std::vector<int64_t> starts = Starts(*source, kSeq * kWindows);
  EXPECT_EQ(std::set<int64_t>(starts.begin(), starts.end()).size(), static_cast<size_t>(kSeq * kWindows));
}

TEST(Shuffled, IsTheSameEverywhereForEver) {
  // A changed order would silently change every resumed run: these numbers must never change.
  const BatchSourcePtr source = Windows(1000, {.seed = 42, .seq = 10, .batch = 4});
  EXPECT_THAT(Starts(*source, 8), ElementsAre(924, 904, 934, 454, 494, 214, 164, 684));
}

TEST(BatchSource, AnySplitOfTheRowsReadsTheSame) {
  for (const DataOrder order : {DataOrder::kShuffled, DataOrder::kSequential}) {
    // 12 rows a step over epochs of 31 windows: most epochs begin inside a step.
    const BatchSourcePtr source = Windows(257, {.order = order, .seed = 5, .seq = 8, .batch = 12});
    for (int64_t step = 20; step-- > 0;) {
      const std::vector<int32_t> whole = Rows(*source, step, 0, 12);
      for (int64_t ranks = 1; ranks <= 13; ++ranks) {
        std::vector<int32_t> joined;
        for (int64_t rank = 0; rank < ranks; ++rank) {
          const int64_t begin = 12 * rank / ranks, end = 12 * (rank + 1) / ranks;
          const std::vector<int32_t> part = Rows(*source, step, begin, end - begin);
          joined.insert(joined.end(), part.begin(), part.end());
        }
        EXPECT_EQ(joined, whole) << step << " on " << ranks;
      }
    }
  }
}

TEST(Validation, PredictsEachHeldOutTokenOnceInOrder) {
  for (int64_t tokens = 9; tokens < 60; ++tokens) {
    const BatchSourcePtr source = ValidationWindows(std::make_shared<CountingTokens>(tokens), 8).value();
    EXPECT_EQ(source->steps(), 1);
    EXPECT_EQ(source->rows_per_step(), (tokens - 1) / 8);
    const std::vector<int64_t> starts = Starts(*source, source->rows_per_step());
    for (size_t row = 0; row < starts.size(); ++row) EXPECT_EQ(starts[row], static_cast<int64_t>(row) * 8);
    const Tensor row = Empty({1, 9}, DType::kI32);
    EXPECT_EQ(source->ReadRows(1, 0, row).code(), absl::StatusCode::kOutOfRange);
  }
}

TEST(OpenDataset, HoldsTheEndOutAndNeverTrainsOnIt) {
  const testing::TempDir dir;
  std::string text(1000, 'a');
  std::fill(text.end() - 50, text.end(), 'b');
  testing::WriteFile(dir / "t.txt", text);
  for (const DataOrder order : {DataOrder::kShuffled, DataOrder::kSequential}) {
    const Dataset dataset = OpenDataset({.path = dir / "t.txt",
                                         .order = order,
                                         .validation_fraction = 0.05,
                                         .vocab_size = 256,
                                         .seq = 16,
                                         .global_batch = 7})
                                .value();
    EXPECT_EQ(dataset.train_tokens, 950);
    EXPECT_EQ(dataset.validation_tokens, 50);
    EXPECT_EQ(dataset.ValidationRows(), 3);
    for (int64_t step = 0; step < 100; ++step) {
      for (const int32_t id : Rows(*dataset.train, step, 0, 7)) ASSERT_EQ(id, 'a');
    }
    for (const int32_t id : Rows(*dataset.validation, 0, 0, 3)) EXPECT_EQ(id, 'b');
  }
}

TEST(OpenDataset, ReadsTheTextThatShips) {
  const Dataset dataset = OpenDataset({.path = SHOAL_SOURCE_DIR "/data/quickstart.txt.zst",
                                       .order = DataOrder::kSequential,
                                       .validation_fraction = 0.05,
                                       .vocab_size = 128,
                                       .seq = 20,
                                       .global_batch = 1})
                              .value();
  EXPECT_EQ(dataset.train_tokens + dataset.validation_tokens, 4312396);
  EXPECT_EQ(dataset.validation_tokens, 215619);
  const std::vector<int32_t> ids = Rows(*dataset.train, 0, 0, 1);
  EXPECT_EQ(std::string(ids.begin(), ids.end()), "CHAPTER 1. Loomings.\n");
}

TEST(OpenDataset, ReadsMegatronAndChecksTheVocabulary) {
  const testing::TempDir dir;
  const auto writer = MegatronWriter::Create(dir / "p", 1000).value();
  std::vector<int32_t> ids(100, 3);
  ids[57] = 999;
  SHOAL_CHECK_OK(writer->AddDocument(absl::MakeConstSpan(ids).first(40)));
  SHOAL_CHECK_OK(writer->AddDocument(absl::MakeConstSpan(ids).subspan(40)));
  SHOAL_CHECK_OK(writer->Finish());
  DatasetOptions options = {.kind = DataKind::kMegatron,
                            .path = dir / "p",
                            .order = DataOrder::kSequential,
                            .validation_fraction = 0.49,
                            .vocab_size = 1000,
                            .seq = 40,
                            .global_batch = 1};
  const Dataset fits = OpenDataset(options).value();
  EXPECT_EQ(Rows(*fits.validation, 0, 0, 1)[57 - 51], 999);
  options.vocab_size = 999;
  const Dataset narrow = OpenDataset(options).value();
  const Tensor row = Empty({1, 41}, DType::kI32);
  EXPECT_TRUE(narrow.train->ReadRows(0, 0, row).ok());
  EXPECT_EQ(
      narrow.validation->ReadRows(0, 0, row),
      absl::InvalidArgumentError((dir / "p.bin") + ": token 999 at 57 does not fit a vocabulary of 999"));
}

TEST(OpenDataset, NamesAByteThatDoesNotFitBeforeTraining) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "t.txt", std::string(100000, 'a') + "\xe9" + std::string(100000, 'a'));
  const DatasetOptions options = {.path = dir / "t.txt", .vocab_size = 128, .seq = 8, .global_batch = 1};
  EXPECT_EQ(
      OpenDataset(options).status(),
      absl::InvalidArgumentError((dir / "t.txt") + ": token 233 at 100000 does not fit a vocabulary of 128"));
}

TEST(OpenDataset, SaysHowManyTokensAreNeeded) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "t.txt", std::string(100, 'a'));
  DatasetOptions options = {.path = dir / "t.txt", .vocab_size = 256, .seq = 100, .global_batch = 1};
  const absl::Status train = OpenDataset(options).status();
  EXPECT_EQ(train.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(train.message(),
            (dir / "t.txt") +
                ": training split of 100 tokens: 100 tokens are too few: one window of 100 tokens and "
                "its last label need 101");
  options.seq = 10;
  options.validation_fraction = 0.1;
  const absl::Status validation = OpenDataset(options).status();
  EXPECT_THAT(std::string(validation.message()),
              HasSubstr("validation split, 0.1 of 100 tokens: 10 tokens are too few"));
  options.seq = 9;
  EXPECT_TRUE(OpenDataset(options).ok());
  testing::WriteFile(dir / "t.txt", "");
  EXPECT_THAT(std::string(OpenDataset(options).status().message()), HasSubstr("0 tokens are too few"));
}

TEST(OpenDataset, NamesAMissingFileOfEveryKind) {
  const testing::TempDir dir;
  for (const DataKind kind : {DataKind::kText, DataKind::kMegatron, DataKind::kSafetensors}) {
    const absl::Status status =
        OpenDataset({.kind = kind, .path = dir / "none", .vocab_size = 256, .seq = 8, .global_batch = 1})
            .status();
    EXPECT_EQ(status.code(), absl::StatusCode::kNotFound) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(dir / "none"));
  }
}

TEST(OpenDataset, RandomNeedsNoFile) {
  const Dataset dataset = OpenDataset({.kind = DataKind::kRandom,
                                       .validation_fraction = 0.05,
                                       .seed = 4,
                                       .vocab_size = 32000,
                                       .seq = 512,
                                       .global_batch = 4})
                              .value();
  const std::vector<int32_t> rows = Rows(*dataset.train, 3, 0, 4);
  EXPECT_GT(*std::max_element(rows.begin(), rows.end()), 31000);
  EXPECT_LT(*std::max_element(rows.begin(), rows.end()), 32000);
  EXPECT_GT(dataset.ValidationRows(), 1);
}

// A .safetensors file with one tensor of ids.
void WriteBatches(const std::string& path, const std::string& name, const Shape& shape,
                  std::vector<int32_t> ids) {
  const Tensor tensor(ids.data(), shape, DType::kI32);
  SHOAL_CHECK_OK(
      WriteSafetensors(path, {{name, DType::kI32, shape}}, {}, [&](size_t) { return tensor; }).status());
}

TEST(OpenDataset, StoredBatchesEndWithAnError) {
  const testing::TempDir dir;
  const std::string path = dir / "b.safetensors";
  WriteBatches(path, "batches", {2, 2, 3}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
  const Dataset dataset = OpenDataset({.kind = DataKind::kSafetensors,
                                       .path = path,
                                       .validation_fraction = 0.05,
                                       .vocab_size = 12,
                                       .seq = 2,
                                       .global_batch = 2})
                              .value();
  EXPECT_EQ(dataset.validation, nullptr);
  EXPECT_EQ(dataset.train->steps(), 2);
  EXPECT_THAT(Rows(*dataset.train, 1, 1, 1), ElementsAre(9, 10, 11));
  EXPECT_EQ(dataset.train->ReadRows(2, 0, Empty({1, 3}, DType::kI32)),
            absl::OutOfRangeError(path + ": step 2 is past the 2 steps of the tensor batches"));
}

TEST(OpenDataset, StoredBatchesMustFit) {
  const testing::TempDir dir;
  const std::string path = dir / "b.safetensors";
  const auto open = [&](int64_t batch, int64_t seq, int64_t vocab_size) {
    const DatasetOptions options = {.kind = DataKind::kSafetensors,
                                    .path = path,
                                    .vocab_size = vocab_size,
                                    .seq = seq,
                                    .global_batch = batch};
    return std::string(OpenDataset(options).status().message());
  };
  WriteBatches(path, "batches", {1, 2, 3}, {0, 1, 2, 3, 4, 5});
  EXPECT_EQ(open(2, 2, 6), "");
  EXPECT_EQ(open(2, 2, 5),
            path + ": token 5 at [0, 1, 2] of the tensor batches does not fit a vocabulary of 5");
  EXPECT_THAT(open(3, 2, 6), HasSubstr("is I32 [1, 2, 3], want I32 [steps, 3, 3]"));
  EXPECT_THAT(open(2, 3, 6), HasSubstr("is I32 [1, 2, 3], want I32 [steps, 2, 4]"));
  WriteBatches(path, "batches", {1, 2, 3}, {0, 1, 2, 3, -4, 5});
  EXPECT_THAT(open(2, 2, 6), HasSubstr("token -4 at [0, 1, 1]"));
  WriteBatches(path, "tokens", {1, 2, 3}, {0, 1, 2, 3, 4, 5});
  EXPECT_EQ(open(2, 2, 6), path + ": has no tensor batches");
}

TEST(ParseNames, AreTheConfigurations) {
  EXPECT_EQ(ParseDataKind("text").value(), DataKind::kText);
  EXPECT_EQ(ParseDataKind("megatron").value(), DataKind::kMegatron);
  EXPECT_EQ(ParseDataKind("safetensors").value(), DataKind::kSafetensors);
  EXPECT_EQ(ParseDataKind("random").value(), DataKind::kRandom);
  EXPECT_EQ(ParseDataOrder("shuffled").value(), DataOrder::kShuffled);
  EXPECT_EQ(ParseDataOrder("sequential").value(), DataOrder::kSequential);
  EXPECT_THAT(std::string(ParseDataKind("txt").status().message()), HasSubstr("is txt, want text, megatron"));
  EXPECT_EQ(ParseDataOrder("").status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace shoal
