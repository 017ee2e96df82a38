// What a checkpoint's manifest.json says. Internal to this folder.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/tensor/tensor.h"

namespace shoal::checkpoint {

inline constexpr char kManifestFile[] = "manifest.json";
// Key of the safetensors metadata under which each rank's file describes its pieces.
inline constexpr char kPiecesKey[] = "shoal_pieces";

// Some rows of a tensor, in one file.
struct Piece {
  int file = 0;  // Into Manifest::files.
  int64_t row_begin = 0;
  int64_t rows = 0;   // 1 for a tensor without dimensions.
  uint64_t hash = 0;  // xxh3 of the bytes.
};

struct PieceTable {
  Shape shape;  // Of the whole tensor.
  DType dtype = DType::kF32;
  std::vector<Piece> pieces;  // By row_begin.
};

struct ManifestFile {
  std::string name;
  int64_t bytes = 0;
};

struct Manifest {
  int64_t step = 0;
  int world_size = 1;
  std::string meta;
  std::string config_yaml;
  std::vector<ManifestFile> files;
  std::map<std::string, PieceTable> tensors;
};

// Rows of a tensor: its first dimension, or 1.
inline int64_t RowCount(const Shape& shape) { return shape.empty() ? 1 : shape[0]; }
// The name in a file of a piece of `tensor`: the tensor's own when the piece is all of it, so that a
// checkpoint of one rank is a plain safetensors file, else NAME@ROW.
std::string PieceName(const std::string& tensor, const Shape& full_shape, int64_t row_begin, int64_t rows);

uint64_t HashOf(const void* data, int64_t bytes);

// The text for kPiecesKey, and back, adding the pieces as of file `file`. Types come from the file itself, so
// they are left as they are.
std::string EncodePieces(const std::map<std::string, PieceTable>& tensors);
absl::Status AddPieces(std::string_view text, int file, std::map<std::string, PieceTable>& tensors);

// Sorts the pieces; an error names a tensor of which rows are missing or stand twice.
absl::Status CheckCover(std::map<std::string, PieceTable>& tensors);

std::string EncodeManifest(const Manifest& manifest);
// DATA_LOSS: not what EncodeManifest wrote. UNIMPLEMENTED: a later version. `source` names the file in
// errors.
absl::StatusOr<Manifest> DecodeManifest(std::string_view text, const std::string& source);

}  // namespace shoal::checkpoint
