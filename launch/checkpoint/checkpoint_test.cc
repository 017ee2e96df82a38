#include "launch/checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <thread>

#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/files/faulty_disk.h"
#include "runtime/files/safetensors.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::TempDir;

// The tensors of a tiny run: a matrix and its moment, a vector, a count.
const std::map<std::string, CheckpointTensor>& Tensors() {
  static const auto* const kTensors = new std::map<std::string, CheckpointTensor>{
      {"w", {{7, 3}, DType::kF32}},
      {"w/exp_avg", {{7, 3}, DType::kF32}},
      {"norm", {{5}, DType::kF32}},
      {"count", {{}, DType::kI64}},
  };
  return *kTensors;
}

// Deterministic contents: byte `at` of tensor `name` at `step`.
uint8_t ByteAt(const std::string& name, int64_t step, int64_t at) {
  return static_cast<uint8_t>(std::hash<std::string>()(name) % 251 + static_cast<size_t>(step) * 13 +
                              static_cast<size_t>(at) * 7);
}

Tensor Contents(const std::string& name, int64_t step) {
  const CheckpointTensor& info = Tensors().at(name);
  Tensor tensor = Empty(info.shape, info.dtype);
  for (int64_t i = 0; i < tensor.bytes(); ++i) static_cast<uint8_t*>(tensor.raw())[i] = ByteAt(name, step, i);
  return tensor;
}

// What rank `rank` of `size` holds: rows split as evenly as they go; what has no rows is the last rank's.
std::vector<Shard> ShardsOf(int rank, int size, int64_t step) {
  std::vector<Shard> shards;
  for (const auto& [name, info] : Tensors()) {
    const Tensor full = Contents(name, step);
    if (info.shape.empty()) {
      if (rank == size - 1) shards.push_back({name, info.shape, 0, full});
      continue;
    }
    const int64_t begin = info.shape[0] * rank / size;
    const int64_t end = info.shape[0] * (rank + 1) / size;
    shards.push_back({name, info.shape, begin, full.Rows(begin, end - begin)});
  }
  return shards;
}

// Every tensor read in blocks of `block` rows equals what was saved at `step`.
void ExpectHolds(const CheckpointReader& reader, int64_t step, int64_t block) {
  EXPECT_EQ(reader.step(), step);
  for (const auto& [name, info] : Tensors()) {
    const Tensor want = Contents(name, step);
    const int64_t rows = info.shape.empty() ? 1 : info.shape[0];
    for (int64_t begin = 0; begin < rows; begin += block) {
      Shape shape = info.shape;
      if (!shape.empty()) shape[0] = std::min(block, rows - begin);
      const Tensor out = Empty(shape, info.dtype);
      const absl::Status status = reader.Read(name, begin, out);
      ASSERT_TRUE(status.ok()) << status;
      const Tensor part = shape.empty() ? want : want.Rows(begin, shape[0]);
      EXPECT_EQ(std::memcmp(out.raw(), part.raw(), static_cast<size_t>(out.bytes())), 0)
          << name << " row " << begin;
    }
  }
}

std::unique_ptr<CheckpointReader> OpenOrDie(const std::string& path) {
  absl::StatusOr<std::unique_ptr<CheckpointReader>> reader = OpenCheckpoint(path);
  SHOAL_CHECK_OK(reader.status());
  return *std::move(reader);
}

absl::Status SaveAll(Checkpointer& checkpointer, int64_t step, int rank = 0, int size = 1) {
  SHOAL_RETURN_IF_ERROR(
      checkpointer.Save(step, absl::StrCat("{\"at\":", step, "}"), ShardsOf(rank, size, step)));
  return checkpointer.Wait();
}

std::unique_ptr<Checkpointer> CreateOrDie(CheckpointerOptions options) {
  absl::StatusOr<std::unique_ptr<Checkpointer>> checkpointer =
      Checkpointer::Create(std::move(options), nullptr);
  SHOAL_CHECK_OK(checkpointer.status());
  return *std::move(checkpointer);
}

std::vector<std::string> FoldersOf(const TempDir& run) { return *ListFolder(run / "checkpoints"); }

// Runs `body` as each of `size` ranks of one group, on threads.
void RunRanks(int size, const std::function<void(int rank, std::unique_ptr<Communicator> group)>& body) {
  static int job = 0;
  const std::string name = absl::StrCat("unix:checkpoint-test-", getpid(), "-", job++);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      WorldOptions options;
      options.rank = rank;
      options.size = size;
      options.master_host = name;
      absl::StatusOr<std::unique_ptr<Communicator>> group = ConnectWorld(options);
      SHOAL_CHECK_OK(group.status());
      body(rank, *std::move(group));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(Checkpoint, WhatIsSavedIsReadBack) {
  const TempDir run;
  EXPECT_FALSE(NewestCheckpoint(run.path())->has_value());
  const auto checkpointer = CreateOrDie({.run_dir = run.path(), .config_yaml = "model: {}\n"});
  EXPECT_FALSE(NewestCheckpoint(run.path())->has_value());
  EXPECT_TRUE(checkpointer->Wait().ok());
  ASSERT_TRUE(SaveAll(*checkpointer, 1200).ok());
  const std::string path = NewestCheckpoint(run.path())->value();
  EXPECT_EQ(path, run / "checkpoints/step-00001200");
  EXPECT_THAT(*ListFolder(path), ElementsAre("manifest.json", "rank-00000-of-00001.safetensors"));
  const auto reader = OpenOrDie(path);
  EXPECT_EQ(reader->meta(), "{\"at\":1200}");
  EXPECT_EQ(reader->config_yaml(), "model: {}\n");
  EXPECT_EQ(reader->world_size(), 1);
  EXPECT_TRUE(reader->Check(Tensors()).ok());
  EXPECT_TRUE(reader->VerifyAll(3).ok());
  for (const int64_t block : {1, 2, 7}) ExpectHolds(*reader, 1200, block);
}

// Others can read a checkpoint of one rank as it is.
TEST(Checkpoint, FileOfOneRankHasPlainNames) {
  const TempDir run;
  ASSERT_TRUE(SaveAll(*CreateOrDie({.run_dir = run.path()}), 1).ok());
  const auto file = SafetensorsFile::Open(run / "checkpoints/step-00000001/rank-00000-of-00001.safetensors");
  for (const auto& [name, info] : Tensors()) {
    ASSERT_NE((*file)->Find(name), nullptr) << name;
    EXPECT_EQ((*file)->Find(name)->shape, info.shape);
  }
}

TEST(Checkpoint, AnyNumberOfRanksWritesTheSameState) {
  for (const int size : {2, 3, 4}) {
    const TempDir run;
    RunRanks(size, [&](int rank, std::unique_ptr<Communicator> group) {
      auto checkpointer = Checkpointer::Create({.run_dir = run.path()}, std::move(group));
      ASSERT_TRUE(checkpointer.ok()) << checkpointer.status();
      for (const int64_t step : {5, 6}) {
        const absl::Status saved = SaveAll(**checkpointer, step, rank, size);
        EXPECT_TRUE(saved.ok()) << saved;
      }
    });
    EXPECT_THAT(FoldersOf(run), ElementsAre("step-00000005", "step-00000006"));
    const auto reader = OpenOrDie(run / "checkpoints/step-00000006");
    EXPECT_EQ(reader->world_size(), size);
    EXPECT_TRUE(reader->Check(Tensors()).ok());
    EXPECT_TRUE(reader->VerifyAll(2).ok());
    for (const int64_t block : {1, 2, 3, 7}) ExpectHolds(*reader, 6, block);
  }
}

TEST(Checkpoint, ReadersOfManyThreadsSeeTheSame) {
  const TempDir run;
  ASSERT_TRUE(SaveAll(*CreateOrDie({.run_dir = run.path()}), 3).ok());
  const auto reader = OpenOrDie(run / "checkpoints/step-00000003");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back([&] { ExpectHolds(*reader, 3, 2); });
  for (std::thread& thread : threads) thread.join();
}

// A gate that keeps the background thread from writing.
class Gate : public DiskFaults {
 public:
  absl::Status Before(DiskAction& action) override {
    MutexLock lock(&mutex_);
    if (action.step == DiskStep::kWrite) {
      while (!open_) changed_.Wait(&mutex_);
    }
    return absl::OkStatus();
  }
  void Open() {
    MutexLock lock(&mutex_);
    open_ = true;
    changed_.NotifyAll();
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool open_ ABSL_GUARDED_BY(mutex_) = false;
};

TEST(Checkpoint, SaveReturnsBeforeAnythingIsWrittenAndKeepsItsOwnCopy) {
  const TempDir run;
  Gate gate;
  const auto checkpointer = CreateOrDie({.run_dir = run.path(), .faults = &gate});
  const std::vector<Shard> shards = ShardsOf(0, 1, 8);
  ASSERT_TRUE(checkpointer->Save(8, "", shards).ok());
  for (const Shard& shard : shards) std::memset(shard.data.raw(), 0, static_cast<size_t>(shard.data.bytes()));
  EXPECT_FALSE(NewestCheckpoint(run.path())->has_value());
  gate.Open();
  ASSERT_TRUE(checkpointer->Wait().ok());
  ExpectHolds(*OpenOrDie(run / "checkpoints/step-00000008"), 8, 7);
}

TEST(Checkpoint, NewestStayAndLaterStepsAreNotTouched) {
  const TempDir run;
  ASSERT_TRUE(MakeFolders(run / "checkpoints/mine").ok());
  ASSERT_TRUE(MakeFolders(run / "checkpoints/step-7").ok());
  ASSERT_TRUE(SaveAll(*CreateOrDie({.run_dir = run.path()}), 99).ok());
  const auto checkpointer = CreateOrDie({.run_dir = run.path(), .keep = 2});
  for (const int64_t step : {10, 20, 30, 40}) ASSERT_TRUE(SaveAll(*checkpointer, step).ok());
  EXPECT_THAT(FoldersOf(run),
              ElementsAre("mine", "step-00000030", "step-00000040", "step-00000099", "step-7"));
  const auto folders = *ListCheckpoints(run.path());
  ASSERT_EQ(folders.size(), 3u);
  EXPECT_EQ(folders[0].step, 30);
  EXPECT_EQ(folders[2].path, run / "checkpoints/step-00000099");
  ExpectHolds(*OpenOrDie(folders[0].path), 30, 7);
}

TEST(Checkpoint, SameStepIsReplaced) {
  const TempDir run;
  const auto checkpointer = CreateOrDie({.run_dir = run.path()});
  ASSERT_TRUE(checkpointer->Save(4, "first", ShardsOf(0, 1, 3)).ok());
  ASSERT_TRUE(SaveAll(*checkpointer, 4).ok());
  EXPECT_THAT(FoldersOf(run), ElementsAre("step-00000004"));
  ExpectHolds(*OpenOrDie(run / "checkpoints/step-00000004"), 4, 7);
}

TEST(Checkpoint, WhatEndedHalfWayIsTidiedUp) {
  const TempDir run;
  ASSERT_TRUE(SaveAll(*CreateOrDie({.run_dir = run.path()}), 4).ok());
  const std::string committed = run / "checkpoints/step-00000004";
  ASSERT_TRUE(RenameDurably(committed, committed + ".replaced").ok());
  ASSERT_TRUE(MakeFolders(run / "checkpoints/step-00000004.partial").ok());
  ASSERT_TRUE(MakeFolders(run / "checkpoints/step-00000003.removing/x").ok());
  EXPECT_EQ(NewestCheckpoint(run.path())->value(), committed + ".replaced");
  ExpectHolds(*OpenOrDie(committed + ".replaced"), 4, 7);
  CreateOrDie({.run_dir = run.path()});
  EXPECT_THAT(FoldersOf(run), ElementsAre("step-00000004"));
  ExpectHolds(*OpenOrDie(committed), 4, 7);
}

// Whatever the disk remembers after the crash, there is a checkpoint, and all there are are whole.
void ExpectWholeAfterCrash(const TempDir& run, int64_t old_step, int64_t new_step, int at) {
  SCOPED_TRACE(absl::StrCat("crash at step ", at));
  const auto folders = ListCheckpoints(run.path());
  ASSERT_TRUE(folders.ok() && !folders->empty());
  for (const CheckpointFolder& folder : *folders) {
    const auto reader = OpenCheckpoint(folder.path);
    ASSERT_TRUE(reader.ok()) << reader.status();
    EXPECT_TRUE((*reader)->VerifyAll(1).ok());
    EXPECT_THAT((*reader)->step(), AnyOf(old_step, new_step));
    ExpectHolds(**reader, folder.step, 7);
  }
  // And a new process goes on from there.
  const auto checkpointer = CreateOrDie({.run_dir = run.path(), .keep = 1});
  ASSERT_TRUE(SaveAll(*checkpointer, new_step + 1).ok());
  EXPECT_THAT(FoldersOf(run), ElementsAre(absl::StrCat("step-0000000", new_step + 1)));
}

TEST(Checkpoint, CrashAtAnyInstantLeavesAWholeCheckpoint) {
  for (const bool lose_unsynced : {false, true}) {
    for (const int64_t new_step : {2, 1}) {  // The next step; the same step once more.
      int crashes = 0;
      for (int at = 0;; ++at) {
        const TempDir run;
        ASSERT_TRUE(SaveAll(*CreateOrDie({.run_dir = run.path()}), 1).ok());
        FaultyDisk disk(FaultyDisk::Kind::kCrash, at);
        {
          auto checkpointer =
              Checkpointer::Create({.run_dir = run.path(), .keep = 1, .faults = &disk}, nullptr);
          // A failure to remove the old checkpoint does not fail the new one; such crashes are counted all
          // the same.
          if (checkpointer.ok()) SaveAll(**checkpointer, new_step).IgnoreError();
        }
        if (lose_unsynced) disk.LoseUnsynced();
        ExpectWholeAfterCrash(run, 1, new_step, at);
        if (!disk.failed()) break;
        ++crashes;
      }
      EXPECT_GT(crashes, 20);
    }
  }
}

TEST(Checkpoint, FullDiskAtAnyWriteFailsTheSaveAndGivesTheSpaceBack) {
  int failures = 0;
  for (int at = 0;; ++at) {
    const TempDir run;
    FaultyDisk disk(FaultyDisk::Kind::kFull, at);
    ASSERT_TRUE(SaveAll(*CreateOrDie({.run_dir = run.path()}), 1).ok());
    const auto checkpointer = CreateOrDie({.run_dir = run.path(), .faults = &disk});
    const absl::Status saved = SaveAll(*checkpointer, 2);
    if (saved.ok()) break;
    ++failures;
    EXPECT_EQ(saved.code(), absl::StatusCode::kResourceExhausted) << saved;
    EXPECT_THAT(std::string(saved.message()), HasSubstr("saving the checkpoint of step 2"));
    EXPECT_THAT(std::string(saved.message()), HasSubstr(run / "checkpoints/step-00000002.partial/"));
    EXPECT_THAT(FoldersOf(run), ElementsAre("step-00000001"));
    // Told once; there is space again, and the next save succeeds.
    EXPECT_TRUE(checkpointer->Wait().ok());
    EXPECT_TRUE(SaveAll(*checkpointer, 3).ok());
  }
  EXPECT_EQ(failures, 1 + static_cast<int>(Tensors().size()) + 1);  // Header, tensors, manifest.
}

TEST(Checkpoint, FailedSaveIsTheErrorOfTheNext) {
  const TempDir run;
  FaultyDisk disk(FaultyDisk::Kind::kFull, 0);
  const auto checkpointer = CreateOrDie({.run_dir = run.path(), .faults = &disk});
  ASSERT_TRUE(checkpointer->Save(1, "", ShardsOf(0, 1, 1)).ok());
  EXPECT_EQ(checkpointer->Save(2, "", ShardsOf(0, 1, 2)).code(), absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(checkpointer->Save(3, "", ShardsOf(0, 1, 3)).ok());
  ASSERT_TRUE(checkpointer->Wait().ok());
  EXPECT_THAT(FoldersOf(run), ElementsAre("step-00000003"));
}

TEST(Checkpoint, ErrorOfOneRankIsEveryRanks) {
  const TempDir run;
  RunRanks(3, [&](int rank, std::unique_ptr<Communicator> group) {
    FaultyDisk disk(rank == 1 ? FaultyDisk::Kind::kFull : FaultyDisk::Kind::kNone, 1);
    auto checkpointer = Checkpointer::Create({.run_dir = run.path(), .faults = &disk}, std::move(group));
    ASSERT_TRUE(checkpointer.ok()) << checkpointer.status();
    const absl::Status failed = SaveAll(**checkpointer, 5, rank, 3);
    EXPECT_EQ(failed.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(failed.message()), HasSubstr("rank 1: cannot write "));
    const absl::Status saved = SaveAll(**checkpointer, 6, rank, 3);
    EXPECT_TRUE(saved.ok()) << saved;
  });
  EXPECT_THAT(FoldersOf(run), ElementsAre("step-00000006"));
}

// Each rank on a disk of its own, as on hosts without a shared file system.
TEST(Checkpoint, RanksThatDoNotSeeEachOthersFilesSaySo) {
  for (const bool folder_exists : {false, true}) {
    const TempDir runs[2];
    if (folder_exists) {
      ASSERT_TRUE(MakeFolders(runs[1] / "checkpoints/step-00000005.partial").ok());
    }
    RunRanks(2, [&](int rank, std::unique_ptr<Communicator> group) {
      auto checkpointer = Checkpointer::Create({.run_dir = runs[rank].path()}, std::move(group));
      ASSERT_TRUE(checkpointer.ok()) << checkpointer.status();
      const absl::Status saved = SaveAll(**checkpointer, 5, rank, 2);
      EXPECT_EQ(saved.code(), absl::StatusCode::kFailedPrecondition) << saved;
      EXPECT_THAT(std::string(saved.message()), HasSubstr("a file system that all ranks share"));
      EXPECT_THAT(std::string(saved.message()), HasSubstr(folder_exists ? "rank 1 wrote" : "rank 1: "));
    });
    EXPECT_THAT(FoldersOf(runs[0]), IsEmpty());
  }
}

TEST(Checkpoint, EndOfTheEpochEndsTheSave) {
  const TempDir run;
  RunRanks(2, [&](int rank, std::unique_ptr<Communicator> group) {
    Communicator* const borrowed = group.get();
    auto checkpointer = Checkpointer::Create({.run_dir = run.path()}, std::move(group));
    ASSERT_TRUE(checkpointer.ok()) << checkpointer.status();
    if (rank == 1) {
      borrowed->Abort(absl::UnavailableError("rank 1 had enough"));
      return;
    }
    const absl::Status saved = SaveAll(**checkpointer, 5, rank, 2);
    EXPECT_EQ(saved.code(), absl::StatusCode::kAborted) << saved;
  });
  EXPECT_FALSE(NewestCheckpoint(run.path())->has_value());
}

TEST(Checkpoint, PiecesThatDoNotCoverATensorAreNamed) {
  const TempDir run;
  const auto checkpointer = CreateOrDie({.run_dir = run.path()});
  const auto save = [&](std::vector<Shard> shards) {
    SHOAL_CHECK_OK(checkpointer->Save(1, "", shards));
    const absl::Status status = checkpointer->Wait();
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
    EXPECT_THAT(FoldersOf(run), IsEmpty());
    return std::string(status.message());
  };
  const Tensor rows = Zeros({2, 3}, DType::kF32);
  EXPECT_THAT(save({{"a", {4, 3}, 0, rows}}), HasSubstr("tensor a [4, 3]: its pieces end at row 2"));
  EXPECT_THAT(save({{"a", {4, 3}, 2, rows}}), HasSubstr("begins at row 2, but those before it end at row 0"));
  EXPECT_THAT(save({{"a", {4, 3}, 0, rows}, {"a", {4, 3}, 1, rows}}), HasSubstr("begins at row 1"));
}

TEST(Checkpoint, SeveralPiecesOfOneTensorAndEmptyOnesWork) {
  const TempDir run;
  const Tensor full = Contents("w", 1);
  const auto checkpointer = CreateOrDie({.run_dir = run.path()});
  ASSERT_TRUE(checkpointer
                  ->Save(1, "",
                         {{"w", {7, 3}, 4, full.Rows(4, 3)},
                          {"w", {7, 3}, 0, full.Rows(0, 4)},
                          {"nothing", {0, 3}, 0, Zeros({0, 3}, DType::kF32)}})
                  .ok());
  ASSERT_TRUE(checkpointer->Wait().ok());
  const auto reader = OpenOrDie(run / "checkpoints/step-00000001");
  const Tensor out = Empty({5, 3}, DType::kF32);
  ASSERT_TRUE(reader->Read("w", 1, out).ok());
  EXPECT_EQ(std::memcmp(out.raw(), full.Rows(1, 5).raw(), static_cast<size_t>(out.bytes())), 0);
  EXPECT_TRUE(reader->Read("nothing", 0, Zeros({0, 3}, DType::kF32)).ok());
}

TEST(Checkpoint, ReadsThatDoNotFitAreRefused) {
  const TempDir run;
  ASSERT_TRUE(SaveAll(*CreateOrDie({.run_dir = run.path()}), 1).ok());
  const auto reader = OpenOrDie(run / "checkpoints/step-00000001");
  const auto code = [&](const char* name, int64_t row, Shape shape, DType dtype) {
    const absl::Status status = reader->Read(name, row, Zeros(std::move(shape), dtype));
    EXPECT_THAT(std::string(status.message()), HasSubstr(name));
    return status.code();
  };
  EXPECT_EQ(code("other", 0, {7, 3}, DType::kF32), absl::StatusCode::kNotFound);
  EXPECT_EQ(code("w", 1, {7, 3}, DType::kF32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("w", 0, {8, 3}, DType::kF32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("w", -1, {1, 3}, DType::kF32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("w", 0, {7, 2}, DType::kF32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("w", 0, {7, 3}, DType::kI32), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("count", 0, {1}, DType::kI64), absl::StatusCode::kInvalidArgument);

  auto wanted = Tensors();
  wanted["w"].shape = {7, 4};
  wanted["norm"].dtype = DType::kBF16;
  wanted["more"] = {{2}, DType::kF32};
  const std::string message(reader->Check(wanted).message());
  EXPECT_THAT(message, HasSubstr("missing tensor more [2]"));
  for (int i = 0; i < 100; ++i) wanted[absl::StrCat("z", i)] = {{2}, DType::kF32};
  const std::string many(reader->Check(wanted).message());
  EXPECT_THAT(many, AllOf(HasSubstr("103 differences"), HasSubstr("missing tensor more [2]"), HasSubstr("and 97 more")));
  EXPECT_THAT(message, HasSubstr("tensor w is f32 [7, 3], wanted is f32 [7, 4]"));
  EXPECT_THAT(message, HasSubstr("tensor norm is f32 [5], wanted is bf16 [5]"));
}

TEST(Checkpoint, WhatIsNoCheckpointIsNotFound) {
  const TempDir run;
  EXPECT_EQ(OpenCheckpoint(run / "none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(OpenCheckpoint(run.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(OpenCheckpoint(run.path()).status().message()), HasSubstr("is no checkpoint"));
}

void FlipBit(const std::string& path, int64_t byte, int bit) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(byte);
  const char old_byte = static_cast<char>(file.get());
  file.seekp(byte);
  file.put(static_cast<char>(old_byte ^ (1 << bit)));
}

// A bit of every third byte flipped: it is found, or it makes no difference to what is read. Truncation is
// found.
TEST(Checkpoint, NothingDamagedIsEverGivenOut) {
  const TempDir run;
  RunRanks(2, [&](int rank, std::unique_ptr<Communicator> group) {
    auto checkpointer = Checkpointer::Create({.run_dir = run.path()}, std::move(group));
    ASSERT_TRUE(SaveAll(**checkpointer, 1, rank, 2).ok());
  });
  const std::string path = run / "checkpoints/step-00000001";
  const std::vector<std::string> names = *ListFolder(path);
  for (const std::string& name : names) {
    const std::string file = JoinPath(path, name);
    const int64_t size = *FileBytes(file);
    int found = 0;
    for (int64_t byte = 0; byte < size; byte += 3) {
      const int bit = static_cast<int>(byte * 5 % 8);
      FlipBit(file, byte, bit);
      const auto reader = OpenCheckpoint(path);
      const absl::Status status = reader.ok() ? (*reader)->VerifyAll(1) : reader.status();
      if (status.ok()) {
        ExpectHolds(**reader, 1, 7);
      } else {
        EXPECT_THAT(status.code(), AnyOf(absl::StatusCode::kDataLoss, absl::StatusCode::kUnimplemented))
            << status;
        EXPECT_THAT(std::string(status.message()), HasSubstr(name));
        ++found;
      }
      FlipBit(file, byte, bit);
    }
    EXPECT_GT(found, size / 9) << name;
    const std::string contents = *ReadFile(file);
    ASSERT_TRUE(WriteFileAtomic(file, contents.substr(0, contents.size() - 1)).ok());
    EXPECT_EQ(OpenCheckpoint(path).status().code(),
              name == "manifest.json" ? absl::StatusCode::kOk : absl::StatusCode::kDataLoss);
    ASSERT_TRUE(WriteFileAtomic(file, contents.substr(0, contents.size() / 2)).ok());
    EXPECT_EQ(OpenCheckpoint(path).status().code(), absl::StatusCode::kDataLoss);
    ASSERT_TRUE(WriteFileAtomic(file, contents).ok());
  }
  ASSERT_TRUE(RemoveTree(path + "/rank-00001-of-00002.safetensors").ok());
  const absl::Status missing = OpenCheckpoint(path).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(missing.message()), HasSubstr("rank-00001-of-00002.safetensors is missing"));
}

TEST(Checkpoint, DamageNamesFileAndTensorAndLeavesTheRestReadable) {
  const TempDir run;
  ASSERT_TRUE(SaveAll(*CreateOrDie({.run_dir = run.path()}), 1).ok());
  const std::string file = run / "checkpoints/step-00000001/rank-00000-of-00001.safetensors";
  const int64_t size = *FileBytes(file);
  FlipBit(file, size - 1, 3);  // The last tensor by type and name.
  const auto reader = OpenOrDie(run / "checkpoints/step-00000001");
  const Tensor matrix = Empty({7, 3}, DType::kF32);
  const absl::Status status = reader->Read("w/exp_avg", 6, matrix.Rows(0, 1));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr(file + ": tensor w/exp_avg: damaged: xxh3 "));
  EXPECT_EQ(reader->Read("w/exp_avg", 0, matrix.Rows(0, 1)).code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(reader->Read("w", 0, matrix).ok());
  EXPECT_THAT(std::string(reader->VerifyAll(2).message()), HasSubstr("w/exp_avg"));
}

}  // namespace
}  // namespace shoal
