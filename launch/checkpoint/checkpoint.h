// Checkpoints: written in the background, committed atomically, readable at any number of ranks. Each is a
// folder
//   <run_dir>/checkpoints/step-00001200/  manifest.json, rank-00000-of-00002.safetensors, ...
// with one safetensors file per writing rank and a manifest that says which rows of which tensor stand where,
// with a hash of each piece. Until its last byte is on the disk the folder's name ends in .partial; a rename
// commits it. The end of any process at any instant, or a full disk, leaves the checkpoints before it whole.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "collectives/communicator.h"
#include "runtime/files/file.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

// Rows [row_begin, row_begin + data.dim(0)) of a tensor of `full_shape`; a tensor without dimensions is one
// piece. By convention the state of parameter P is named P (master weights), P/exp_avg and P/exp_avg_sq
// (moments).
struct Shard {
  std::string name;
  Shape full_shape;
  int64_t row_begin = 0;
  Tensor data;
};

struct CheckpointerOptions {
  std::string run_dir;
  int keep = 2;                                // Committed checkpoints that stay, at least 1.
  std::string config_yaml = "";                // Stored in each checkpoint.
  absl::Duration timeout = absl::Minutes(30);  // For the slowest rank to write its part.
  DiskFaults* faults = nullptr;                // For tests.
};

// Writes checkpoints. Every rank has one, and all call the same functions with the same steps. Not
// thread-safe.
class Checkpointer {
 public:
  // `group`: all ranks, used by this object alone; null: there is one rank. Collective: the first rank makes
  // the folder and removes what an earlier process left unfinished. Errors as of Save.
  static absl::StatusOr<std::unique_ptr<Checkpointer>> Create(CheckpointerOptions options,
                                                              std::unique_ptr<Communicator> group);
  ~Checkpointer();  // Waits for a save in progress; logs its error if nobody asked for it.
  Checkpointer(const Checkpointer&) = delete;
  Checkpointer& operator=(const Checkpointer&) = delete;

  // Copies the shards, then returns while a background thread writes them. Waits for the save before first;
  // if that failed, returns its error and starts nothing. The shards of all ranks together must cover each
  // tensor exactly. `meta` is opaque; the first rank's is kept. A checkpoint of the same step is replaced; of
  // those up to `step` the newest `keep` stay, later ones are not touched.
  absl::Status Save(int64_t step, std::string meta, absl::Span<const Shard> shards);

  // Blocks until the save in progress is committed or has failed; OK when there is none. Tells a result once.
  // All ranks get the same: an error of one names it ("rank 2: ..."). RESOURCE_EXHAUSTED: the disk is full.
  // FAILED_PRECONDITION: ranks do not see each other's files. ABORTED: the group's epoch is over; whether the
  // checkpoint was committed shows on the disk.
  absl::Status Wait();

 private:
  Checkpointer(CheckpointerOptions options, std::unique_ptr<Communicator> group);
  int rank() const { return group_ == nullptr ? 0 : group_->index(); }
  int size() const { return group_ == nullptr ? 1 : group_->size(); }
  absl::Status Agree(const absl::Status& mine);
  absl::Status WriteAndCommit();
  absl::Status Prepare();
  absl::Status WriteOwnFile();
  absl::Status Commit();
  absl::Status Prune();

  const CheckpointerOptions options_;
  const std::unique_ptr<Communicator> group_;
  // Of the save in progress: written by the caller's thread before writer_ starts and after it was joined,
  // else used by it alone.
  int64_t step_ = 0;
  std::string meta_;
  std::vector<Shard> snapshot_;  // Its tensors are reused.
  absl::Status result_;
  std::thread writer_;  // Joinable while a save is in progress or its result was not told.
};

struct CheckpointFolder {
  int64_t step;
  std::string path;
};

// The committed checkpoints of a run, oldest first. Empty when the run has none, or does not exist.
absl::StatusOr<std::vector<CheckpointFolder>> ListCheckpoints(const std::string& run_dir);
absl::StatusOr<std::optional<std::string>> NewestCheckpoint(const std::string& run_dir);

struct CheckpointTensor {
  Shape shape;
  DType dtype = DType::kF32;
};

// Reads one checkpoint. Immutable to its callers and thread-safe. Every byte is checked against its hash,
// once, before it is given out.
class CheckpointReader {
 public:
  virtual ~CheckpointReader() = default;

  virtual const std::string& path() const = 0;
  virtual int64_t step() const = 0;
  virtual int world_size() const = 0;  // Of the job that wrote it.
  virtual const std::string& meta() const = 0;
  virtual const std::string& config_yaml() const = 0;
  virtual const std::map<std::string, CheckpointTensor>& tensors() const = 0;

  // INVALID_ARGUMENT counts the tensors of `wanted` that are missing, misshapen or of another type, and lists the
  // first ones. More tensors are no error.
  virtual absl::Status Check(const std::map<std::string, CheckpointTensor>& wanted) const = 0;
  // Fills `out` with rows [row_begin, row_begin + out.dim(0)) of a tensor, whoever wrote them. NOT_FOUND: no
  // such tensor. INVALID_ARGUMENT: another shape or type. DATA_LOSS: the bytes are not what was written; file
  // and tensor are named.
  virtual absl::Status Read(const std::string& name, int64_t row_begin, const Tensor& out) const = 0;
  // Checks every hash, on `threads` threads. DATA_LOSS lists all that is damaged.
  virtual absl::Status VerifyAll(int threads) const = 0;
};

// `path`: a checkpoint's folder. Checks the manifest and that all files are there with their sizes; hashes
// are checked as tensors are read. NOT_FOUND: no checkpoint. DATA_LOSS: damaged; the file is named.
// UNIMPLEMENTED: written by a later version of Shoal.
absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenCheckpoint(const std::string& path);

}  // namespace shoal
