#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_format.h"
#include "launch/checkpoint/checkpoint.h"
#include "launch/checkpoint/manifest.h"
#include "runtime/base/check.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/files/safetensors.h"

namespace shoal {
namespace {

using checkpoint::Manifest;
using checkpoint::Piece;
using checkpoint::PieceTable;

constexpr size_t kProblemsMax = 6;  // That are listed: another model differs in all of its tensors.

class Reader : public CheckpointReader {
 public:
  Reader(std::string path, Manifest manifest) : path_(std::move(path)), manifest_(std::move(manifest)) {
    for (const auto& [name, table] : manifest_.tensors) tensors_[name] = {table.shape, table.dtype};
    MutexLock lock(&mutex_);
    files_.resize(manifest_.files.size());
  }

  const std::string& path() const override { return path_; }
  int64_t step() const override { return manifest_.step; }
  int world_size() const override { return manifest_.world_size; }
  const std::string& meta() const override { return manifest_.meta; }
  const std::string& config_yaml() const override { return manifest_.config_yaml; }
  const std::map<std::string, CheckpointTensor>& tensors() const override { return tensors_; }

  absl::Status Check(const std::map<std::string, CheckpointTensor>& wanted) const override;
  absl::Status Read(const std::string& name, int64_t row_begin, const Tensor& out) const override;
  absl::Status VerifyAll(int threads) const override;

 private:
  absl::StatusOr<std::shared_ptr<const SafetensorsFile>> OpenFile(int index) const;
  absl::StatusOr<std::shared_ptr<const SafetensorsFile>> Verified(const std::string& name,
                                                                  const PieceTable& table,
                                                                  const Piece& piece) const;

  const std::string path_;
  const Manifest manifest_;
  std::map<std::string, CheckpointTensor> tensors_;
  mutable Mutex mutex_;
  mutable std::vector<std::shared_ptr<const SafetensorsFile>> files_
      ABSL_GUARDED_BY(mutex_);  // Null: not opened yet.
  mutable std::set<const Piece*> verified_ ABSL_GUARDED_BY(mutex_);
};

absl::Status Reader::Check(const std::map<std::string, CheckpointTensor>& wanted) const {
  std::vector<std::string> problems;
  for (const auto& [name, tensor] : wanted) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      problems.push_back(absl::StrCat("missing tensor ", name, " ", ShapeString(tensor.shape)));
    } else if (found->second.shape != tensor.shape || found->second.dtype != tensor.dtype) {
      problems.push_back(absl::StrCat("tensor ", name, " is ", AbslSv(Name(found->second.dtype)), " ",
                                      ShapeString(found->second.shape), ", wanted is ",
                                      AbslSv(Name(tensor.dtype)), " ", ShapeString(tensor.shape)));
    }
  }
  if (problems.empty()) return absl::OkStatus();
  std::string message =
      absl::StrCat(path_, " does not hold this run's state (", problems.size(), " differences):");
  for (size_t i = 0; i < std::min(problems.size(), kProblemsMax); ++i) absl::StrAppend(&message, "\n  ", problems[i]);
  if (problems.size() > kProblemsMax) absl::StrAppend(&message, "\n  and ", problems.size() - kProblemsMax, " more");
  return absl::InvalidArgumentError(message);
}

absl::StatusOr<std::shared_ptr<const SafetensorsFile>> Reader::OpenFile(int index) const {
  MutexLock lock(&mutex_);
  std::shared_ptr<const SafetensorsFile>& file = files_[static_cast<size_t>(index)];
  if (file == nullptr) {
    absl::StatusOr<std::shared_ptr<const SafetensorsFile>> opened =
        SafetensorsFile::Open(JoinPath(path_, manifest_.files[static_cast<size_t>(index)].name));
    // The manifest vouches for the file: whatever is wrong with it now is damage.
    if (absl::IsInvalidArgument(opened.status()) || absl::IsNotFound(opened.status())) {
      return absl::DataLossError(opened.status().message());
    }
    SHOAL_RETURN_IF_ERROR(opened.status());
    file = *std::move(opened);
  }
  return file;
}

// The file of the piece, after its bytes were compared with the hash, once.
absl::StatusOr<std::shared_ptr<const SafetensorsFile>> Reader::Verified(const std::string& name,
                                                                        const PieceTable& table,
                                                                        const Piece& piece) const {
  SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<const SafetensorsFile> file, OpenFile(piece.file));
  {
    MutexLock lock(&mutex_);
    if (verified_.contains(&piece)) return file;
  }
  const SafetensorsEntry* const entry =
      file->Find(checkpoint::PieceName(name, table.shape, piece.row_begin, piece.rows));
  Shape shape = table.shape;
  if (!shape.empty()) shape[0] = piece.rows;
  if (entry == nullptr || entry->dtype != table.dtype || entry->shape != shape) {
    return absl::DataLossError(absl::StrCat(file->path(), ": tensor ", name, ": rows from ", piece.row_begin,
                                            " are not there in the shape and type that the manifest gives"));
  }
  const absl::Span<const std::byte> bytes = file->Bytes(*entry);
  const uint64_t hash = checkpoint::HashOf(bytes.data(), static_cast<int64_t>(bytes.size()));
  if (hash != piece.hash) {
    return absl::DataLossError(absl::StrFormat("%s: tensor %s: damaged: xxh3 %016x, want %016x", file->path(),
                                               name, hash, piece.hash));
  }
  MutexLock lock(&mutex_);
  verified_.insert(&piece);
  return file;
}

absl::Status Reader::Read(const std::string& name, int64_t row_begin, const Tensor& out) const {
  const auto found = manifest_.tensors.find(name);
  if (found == manifest_.tensors.end()) return absl::NotFoundError(absl::StrCat(path_, ": no tensor ", name));
  const PieceTable& table = found->second;
  const int64_t rows = checkpoint::RowCount(out.shape());
  Shape expected = table.shape;
  if (!expected.empty()) expected[0] = rows;
  if (out.shape() != expected || out.dtype() != table.dtype || row_begin < 0 ||
      rows > checkpoint::RowCount(table.shape) || row_begin > checkpoint::RowCount(table.shape) - rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        path_, ": tensor ", name, " is ", AbslSv(Name(table.dtype)), " ", ShapeString(table.shape),
        ", wanted is ", AbslSv(Name(out.dtype())), " ", ShapeString(out.shape()), " from row ", row_begin));
  }
  for (const Piece& piece : table.pieces) {
    const int64_t begin = std::max(row_begin, piece.row_begin);
    const int64_t end = std::min(row_begin + rows, piece.row_begin + piece.rows);
    if (begin >= end) continue;
    SHOAL_ASSIGN_OR_RETURN(const std::shared_ptr<const SafetensorsFile> file, Verified(name, table, piece));
    const Tensor part = table.shape.empty() ? out : out.Rows(begin - row_begin, end - begin);
    SHOAL_RETURN_IF_ERROR(file->Read(checkpoint::PieceName(name, table.shape, piece.row_begin, piece.rows),
                                     begin - piece.row_begin, part));
  }
  return absl::OkStatus();
}

absl::Status Reader::VerifyAll(int threads) const {
  struct Job {
    const std::string* name;
    const PieceTable* table;
    const Piece* piece;
  };
  std::vector<Job> jobs;
  for (const auto& [name, table] : manifest_.tensors) {
    for (const Piece& piece : table.pieces) jobs.push_back({&name, &table, &piece});
  }
  Mutex mutex;
  size_t next = 0;                        // Guarded by `mutex`, as the next line.
  std::map<size_t, std::string> damaged;  // By job, so that the message does not depend on timing.
  const auto work = [&] {
    while (true) {
      size_t index;
      {
        MutexLock lock(&mutex);
        if (next == jobs.size()) return;
        index = next++;
      }
      const absl::Status status =
          Verified(*jobs[index].name, *jobs[index].table, *jobs[index].piece).status();
      if (status.ok()) continue;
      MutexLock lock(&mutex);
      damaged[index] = std::string(status.message());
    }
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (damaged.empty()) return absl::OkStatus();
  std::set<std::string> distinct;  // A file that cannot be opened is the same news for each of its pieces.
  for (const auto& entry : damaged) distinct.insert(entry.second);
  std::string message = absl::StrCat(path_, " is damaged:");
  for (const std::string& line : distinct) absl::StrAppend(&message, "\n  ", line);
  return absl::DataLossError(message);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenCheckpoint(const std::string& path) {
  const std::string manifest_path = JoinPath(path, checkpoint::kManifestFile);
  const absl::StatusOr<std::string> text = ReadFile(manifest_path);
  if (absl::IsNotFound(text.status()) && IsFolder(path)) {
    return absl::NotFoundError(
        absl::StrCat(path, " is no checkpoint: it holds no ", checkpoint::kManifestFile));
  }
  SHOAL_RETURN_IF_ERROR(text.status(), "opening checkpoint ", path);
  SHOAL_ASSIGN_OR_RETURN(Manifest manifest, checkpoint::DecodeManifest(*text, manifest_path));
  for (const checkpoint::ManifestFile& file : manifest.files) {
    const std::string file_path = JoinPath(path, file.name);
    const absl::StatusOr<int64_t> bytes = FileBytes(file_path);
    if (absl::IsNotFound(bytes.status())) return absl::DataLossError(absl::StrCat(file_path, " is missing"));
    SHOAL_RETURN_IF_ERROR(bytes.status());
    if (*bytes != file.bytes) {
      return absl::DataLossError(absl::StrCat(file_path, " has ", *bytes, " bytes, want ", file.bytes));
    }
  }
  return std::unique_ptr<CheckpointReader>(new Reader(path, std::move(manifest)));
}

}  // namespace shoal
