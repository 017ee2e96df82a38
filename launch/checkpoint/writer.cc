#include <algorithm>
#include <cstring>
#include <utility>

#include "launch/checkpoint/checkpoint.h"
#include "launch/checkpoint/layout.h"
#include "launch/checkpoint/manifest.h"
#include "runtime/base/check.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/files/safetensors.h"

namespace shoal {

using checkpoint::Manifest;
using checkpoint::Piece;
using checkpoint::PieceTable;

namespace {

// One rank's outcome of a phase, as it travels through the group.
struct Outcome {
  int32_t code = 0;
  char message[508] = {};  // Cut and ended by a zero byte.
};
static_assert(sizeof(Outcome) == 512);

Outcome OutcomeOf(const absl::Status& status) {
  Outcome outcome;
  outcome.code = static_cast<int32_t>(status.code());
  const absl::string_view message = status.message();
  std::copy_n(message.begin(), std::min(message.size(), sizeof outcome.message - 1), outcome.message);
  return outcome;
}

// Whether `data` is what the shard says it is.
void CheckShard(const Shard& shard) {
  Shape expected = shard.full_shape;
  if (!expected.empty()) {
    SHOAL_CHECK(shard.data.rank() == static_cast<int>(expected.size())) << shard.name;
    expected[0] = shard.data.dim(0);
    SHOAL_CHECK(shard.row_begin >= 0 && shard.row_begin <= shard.full_shape[0] - expected[0])
        << shard.name << ": rows " << shard.row_begin << "+" << expected[0] << " of "
        << ShapeString(shard.full_shape);
  }
  SHOAL_CHECK(shard.data.shape() == expected)
      << shard.name << ": " << ShapeString(shard.data.shape()) << " of " << ShapeString(shard.full_shape);
}

int64_t RowsOf(const Shard& shard) { return shard.full_shape.empty() ? 1 : shard.data.dim(0); }

std::string NameInFile(const Shard& shard) {
  return checkpoint::PieceName(shard.name, shard.full_shape, shard.row_begin, RowsOf(shard));
}

using Files = std::vector<std::shared_ptr<const SafetensorsFile>>;

// Opens what each rank wrote and lists it. The files' own headers are the message from the other ranks: what
// this rank cannot see cannot be part of the checkpoint.
absl::StatusOr<Files> CollectFiles(const std::string& folder, int size, Manifest& manifest) {
  Files files;
  for (int rank = 0; rank < size; ++rank) {
    const std::string name = checkpoint::RankFile(rank, size);
    const std::string path = JoinPath(folder, name);
    absl::StatusOr<std::shared_ptr<const SafetensorsFile>> file = SafetensorsFile::Open(path);
    if (absl::IsNotFound(file.status())) {
      return absl::FailedPreconditionError(
          absl::StrCat("rank ", rank, " wrote ", path,
                       ", but rank 0 does not see it: the run's folder must lie on a file "
                       "system that all ranks share"));
    }
    SHOAL_RETURN_IF_ERROR(file.status(), "reading back what rank ", rank, " wrote");
    const auto pieces = (*file)->metadata().find(checkpoint::kPiecesKey);
    if (pieces == (*file)->metadata().end())
      return absl::DataLossError(absl::StrCat(path, ": does not list its pieces"));
    SHOAL_ASSIGN_OR_RETURN(const int64_t bytes, FileBytes(path));
    manifest.files.push_back({name, bytes});
    SHOAL_RETURN_IF_ERROR(checkpoint::AddPieces(pieces->second, rank, manifest.tensors), path);
    files.push_back(*std::move(file));
  }
  return files;
}

// The type of each tensor, from the files that hold its pieces.
absl::Status FindTypes(const Files& files, Manifest& manifest) {
  for (auto& [name, table] : manifest.tensors) {
    for (const Piece& piece : table.pieces) {
      const SafetensorsFile& file = *files[static_cast<size_t>(piece.file)];
      const SafetensorsEntry* const entry =
          file.Find(checkpoint::PieceName(name, table.shape, piece.row_begin, piece.rows));
      if (entry == nullptr || !entry->dtype.has_value()) {
        return absl::DataLossError(absl::StrCat(file.path(), ": tensor ", name, " is not there"));
      }
      if (&piece == &table.pieces.front()) table.dtype = *entry->dtype;
      if (entry->dtype != table.dtype) {
        return absl::InternalError(absl::StrCat("tensor ", name, ": ranks disagree on its type, ",
                                                entry->dtype_name, " and ",
                                                AbslSv(SafetensorsName(table.dtype))));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

Checkpointer::Checkpointer(CheckpointerOptions options, std::unique_ptr<Communicator> group)
    : options_(std::move(options)), group_(std::move(group)) {}

absl::StatusOr<std::unique_ptr<Checkpointer>> Checkpointer::Create(CheckpointerOptions options,
                                                                   std::unique_ptr<Communicator> group) {
  SHOAL_CHECK(options.keep >= 1);
  std::unique_ptr<Checkpointer> checkpointer(new Checkpointer(std::move(options), std::move(group)));
  absl::Status status;
  if (checkpointer->rank() == 0) {
    const CheckpointerOptions& kept = checkpointer->options_;
    status = MakeFolders(checkpoint::CheckpointsFolder(kept.run_dir), kept.faults);
    if (status.ok()) status = checkpoint::TidyUp(kept.run_dir, kept.faults);
  }
  SHOAL_RETURN_IF_ERROR(checkpointer->Agree(status), "preparing checkpoints");
  return checkpointer;
}

Checkpointer::~Checkpointer() {
  const absl::Status status = Wait();
  if (!status.ok()) SHOAL_LOG(kError) << status.message();
}

absl::Status Checkpointer::Save(int64_t step, std::string meta, absl::Span<const Shard> shards) {
  SHOAL_CHECK(step >= 0);
  SHOAL_RETURN_IF_ERROR(Wait());
  step_ = step;
  meta_ = std::move(meta);
  snapshot_.resize(shards.size());
  for (size_t i = 0; i < shards.size(); ++i) {
    const Shard& shard = shards[i];
    CheckShard(shard);
    Tensor copy = std::move(snapshot_[i].data);
    if (copy.shape() != shard.data.shape() || copy.dtype() != shard.data.dtype()) {
      copy = Empty(shard.data.shape(), shard.data.dtype());
    }
    if (copy.bytes() > 0) std::memcpy(copy.raw(), shard.data.raw(), static_cast<size_t>(copy.bytes()));
    snapshot_[i] = {shard.name, shard.full_shape, shard.row_begin, std::move(copy)};
  }
  writer_ = std::thread([this] { result_ = WriteAndCommit(); });
  return absl::OkStatus();
}

absl::Status Checkpointer::Wait() {
  if (!writer_.joinable()) return absl::OkStatus();
  writer_.join();
  const absl::Status result = std::exchange(result_, absl::OkStatus());
  SHOAL_RETURN_IF_ERROR(result, "saving the checkpoint of step ", step_);
  return absl::OkStatus();
}

// The first rank's error that any rank has, or OK if none has one. Every rank returns the same.
absl::Status Checkpointer::Agree(const absl::Status& mine) {
  if (group_ == nullptr) return mine;
  const Outcome outcome = OutcomeOf(mine);
  const int64_t bytes = static_cast<int64_t>(sizeof outcome);
  const Tensor in = Empty({bytes}, DType::kU8);
  const Tensor out = Empty({bytes * size()}, DType::kU8);
  std::memcpy(in.raw(), &outcome, sizeof outcome);
  const std::vector<int64_t> counts(static_cast<size_t>(size()), bytes);
  const OpOptions op = {.deadline = absl::Now() + options_.timeout, .label = "checkpoint"};
  const absl::Status gathered = group_->AllGather(in, counts, out, op).Await();
  if (!gathered.ok()) {
    if (mine.ok()) return gathered;
    return absl::Status(gathered.code(),
                        absl::StrCat(gathered.message(), "; on this rank: ", mine.message()));
  }
  for (int rank = 0; rank < size(); ++rank) {
    Outcome other;
    std::memcpy(&other, out.data<uint8_t>() + rank * bytes, sizeof other);
    if (other.code != 0) {
      return absl::Status(static_cast<absl::StatusCode>(other.code),
                          absl::StrCat("rank ", rank, ": ", other.message));
    }
  }
  return absl::OkStatus();
}

absl::Status Checkpointer::WriteAndCommit() {
  absl::Status status = Agree(rank() == 0 ? Prepare() : absl::OkStatus());
  if (status.ok()) status = Agree(WriteOwnFile());
  if (status.ok()) status = Agree(rank() == 0 ? Commit() : absl::OkStatus());
  if (rank() != 0) return status;
  if (!status.ok()) {
    // Gives the space back at once. What this leaves, the next Create removes.
    const std::string partial =
        absl::StrCat(checkpoint::StepFolder(options_.run_dir, step_), AbslSv(checkpoint::kPartial));
    const absl::Status removed = RemoveTree(partial, options_.faults);
    if (!removed.ok()) SHOAL_LOG(kWarning) << removed.message();
    return status;
  }
  const absl::Status pruned = Prune();
  if (!pruned.ok()) SHOAL_LOG(kWarning) << "removing old checkpoints: " << pruned.message();
  return absl::OkStatus();
}

absl::Status Checkpointer::Prepare() {
  const std::string partial =
      absl::StrCat(checkpoint::StepFolder(options_.run_dir, step_), AbslSv(checkpoint::kPartial));
  SHOAL_RETURN_IF_ERROR(RemoveTree(partial, options_.faults));
  return MakeFolders(partial, options_.faults);
}

absl::Status Checkpointer::WriteOwnFile() {
  const std::string partial =
      absl::StrCat(checkpoint::StepFolder(options_.run_dir, step_), AbslSv(checkpoint::kPartial));
  if (!IsFolder(partial)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "rank 0 made ", partial,
        ", but it is not there: the run's folder must lie on a file system that all ranks share"));
  }
  std::map<std::string, PieceTable> pieces;
  std::vector<SafetensorsSpec> specs;
  for (const Shard& shard : snapshot_) {
    PieceTable& table = pieces[shard.name];
    table.shape = shard.full_shape;
    const uint64_t hash = checkpoint::HashOf(shard.data.raw(), shard.data.bytes());
    table.pieces.push_back({0, shard.row_begin, RowsOf(shard), hash});
    specs.push_back({NameInFile(shard), shard.data.dtype(), shard.data.shape()});
  }
  const auto source = [&](size_t i) -> absl::StatusOr<Tensor> { return snapshot_[i].data; };
  return WriteSafetensors(JoinPath(partial, checkpoint::RankFile(rank(), size())), specs,
                          {{checkpoint::kPiecesKey, checkpoint::EncodePieces(pieces)}}, source,
                          options_.faults)
      .status();
}

absl::Status Checkpointer::Commit() {
  const std::string committed = checkpoint::StepFolder(options_.run_dir, step_);
  const std::string partial = absl::StrCat(committed, AbslSv(checkpoint::kPartial));
  const std::string replaced = absl::StrCat(committed, AbslSv(checkpoint::kReplaced));
  Manifest manifest;
  manifest.step = step_;
  manifest.world_size = size();
  manifest.meta = meta_;
  manifest.config_yaml = options_.config_yaml;
  SHOAL_ASSIGN_OR_RETURN(const Files files, CollectFiles(partial, size(), manifest));
  SHOAL_RETURN_IF_ERROR(FindTypes(files, manifest));
  SHOAL_RETURN_IF_ERROR(checkpoint::CheckCover(manifest.tensors));
  SHOAL_RETURN_IF_ERROR(WriteFileAtomic(JoinPath(partial, checkpoint::kManifestFile),
                                        checkpoint::EncodeManifest(manifest), options_.faults));
  if (IsFolder(committed)) {
    SHOAL_RETURN_IF_ERROR(RemoveTree(replaced, options_.faults));
    SHOAL_RETURN_IF_ERROR(RenameDurably(committed, replaced, options_.faults));
  }
  return RenameDurably(partial, committed, options_.faults);
}

absl::Status Checkpointer::Prune() {
  SHOAL_RETURN_IF_ERROR(checkpoint::TidyUp(options_.run_dir, options_.faults));
  SHOAL_ASSIGN_OR_RETURN(std::vector<CheckpointFolder> folders, ListCheckpoints(options_.run_dir));
  // Later steps belong to a run that this one has left behind: the user's to keep or remove.
  std::erase_if(folders, [&](const CheckpointFolder& folder) { return folder.step > step_; });
  for (size_t i = 0; i + static_cast<size_t>(options_.keep) < folders.size(); ++i) {
    SHOAL_RETURN_IF_ERROR(checkpoint::RemoveCheckpoint(options_.run_dir, folders[i].step, options_.faults));
  }
  return absl::OkStatus();
}

}  // namespace shoal
