// The safetensors format, byte exact: u64 header size, JSON header, data. Readers check everything that the
// header claims before any byte is used; errors name the file and the tensor. Little-endian hosts only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "runtime/files/file.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

// "F32", "BF16", ...
std::string_view SafetensorsName(DType dtype);

struct SafetensorsEntry {
  std::string name;
  std::string dtype_name;      // As in the file; the format knows more types than Shoal.
  std::optional<DType> dtype;  // Unset: a type that Shoal cannot read.
  Shape shape;
  int64_t begin = 0;  // Of its bytes, from the start of the data.
  int64_t bytes = 0;
};

// One file, mapped. Immutable and thread-safe. The file must not be truncated meanwhile (see MappedFile).
class SafetensorsFile {
 public:
  // NOT_FOUND and the like from the system; INVALID_ARGUMENT: the file is not what the format demands
  // (offsets with holes or overlaps, sizes that do not fit shapes or the file, equal keys, unknown types, a
  // header above 100 MB, ...).
  static absl::StatusOr<std::shared_ptr<const SafetensorsFile>> Open(const std::string& path);

  const std::string& path() const { return file_->path(); }
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }  // In the order of their bytes.
  const SafetensorsEntry* Find(std::string_view name) const;                 // Null: no such tensor.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // The bytes of an entry of this file. Not aligned.
  absl::Span<const std::byte> Bytes(const SafetensorsEntry& entry) const;
  // Copies rows [row_begin, row_begin + out.dim(0)) of the tensor (of a tensor without dimensions: its value;
  // row_begin 0) into `out`, whose other dimensions equal the tensor's. `out` has the tensor's type, or is
  // F32 and the tensor BF16, F16 or F64. NOT_FOUND; INVALID_ARGUMENT: another shape or type.
  absl::Status Read(const std::string& name, int64_t row_begin, const Tensor& out) const;

 private:
  SafetensorsFile(std::shared_ptr<const MappedFile> file, size_t data_begin,
                  std::vector<SafetensorsEntry> entries, std::map<std::string, std::string> metadata);

  const std::shared_ptr<const MappedFile> file_;  // Shared: MappedFile::Open hands it out so.
  const size_t data_begin_;
  const std::vector<SafetensorsEntry> entries_;
  const std::map<std::string, std::string> metadata_;
  absl::flat_hash_map<std::string, size_t> index_;  // Into entries_.
};

// A set of tensors in one file, or in the files that an index (model.safetensors.index.json) names. Immutable
// and thread-safe.
class SafetensorsSet {
 public:
  // `path`: a .safetensors file, or an index (ends in .json) whose files lie beside it. Index and files must
  // name exactly the same tensors.
  static absl::StatusOr<SafetensorsSet> Open(const std::string& path);

  struct Item {
    std::shared_ptr<const SafetensorsFile> file;
    const SafetensorsEntry* entry;
  };
  const std::map<std::string, Item>& items() const { return items_; }
  // As SafetensorsFile::Read.
  absl::Status Read(const std::string& name, int64_t row_begin, const Tensor& out) const;

 private:
  std::string path_;
  std::map<std::string, Item> items_;
};

struct SafetensorsSpec {
  std::string name;
  DType dtype;
  Shape shape;
};

// Writes the file atomically, in the order of the reference writer (types descending, then names). `source`
// is called once per tensor, in that order, with its index in `specs`; what it returns must have the shape
// and type of the spec, and is written before the next call. Returns the file's size.
absl::StatusOr<int64_t> WriteSafetensors(const std::string& path, const std::vector<SafetensorsSpec>& specs,
                                         const std::map<std::string, std::string>& metadata,
                                         const std::function<absl::StatusOr<Tensor>(size_t)>& source,
                                         DiskFaults* faults = nullptr);

// Bytes of one tensor converted to `to` as SafetensorsFile::Read does it; `count` elements. INVALID_ARGUMENT:
// no such conversion.
absl::Status ConvertElements(const std::byte* from, DType from_type, void* to, DType to_type, int64_t count);

}  // namespace shoal
