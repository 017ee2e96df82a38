#include "launch/checkpoint/manifest.h"

#include <algorithm>
#include <optional>

#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "runtime/base/status.h"
#include "runtime/files/json.h"
#include "runtime/files/safetensors.h"
#include "xxhash.h"

namespace shoal::checkpoint {
namespace {

using Json = nlohmann::json;

constexpr char kFormat[] = "shoal-checkpoint";
constexpr int kVersion = 1;
constexpr char kHashKey[] = "xxh3";  // Of the manifest without this key, as compact JSON with sorted keys.

std::string HashText(uint64_t hash) { return absl::StrFormat("%016x", hash); }

Json PiecesJson(const PieceTable& table, bool with_files) {
  Json list = Json::array();
  for (const Piece& piece : table.pieces) {
    Json json = {{"row_begin", piece.row_begin}, {"rows", piece.rows}, {kHashKey, HashText(piece.hash)}};
    if (with_files) json["file"] = piece.file;
    list.push_back(std::move(json));
  }
  return list;
}

// Throws nlohmann's exceptions for other types than ours; the callers turn them into statuses.
Piece ParsePiece(const Json& json) {
  Piece piece;
  piece.row_begin = json.at("row_begin").get<int64_t>();
  piece.rows = json.at("rows").get<int64_t>();
  absl::SimpleHexAtoi(json.at(kHashKey).get_ref<const std::string&>(), &piece.hash);
  return piece;
}

Shape ParseShape(const Json& json) {
  const std::vector<int64_t> sizes = json.get<std::vector<int64_t>>();
  return Shape(sizes.begin(), sizes.end());
}

std::optional<DType> ParseType(const std::string& name) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64, DType::kI8, DType::kU8,
                            DType::kI32, DType::kI64}) {
    if (SafetensorsName(dtype) == name) return dtype;
  }
  return std::nullopt;
}

// Throws as ParsePiece.
absl::Status ParseBody(const Json& json, Manifest& manifest) {
  if (json.at("format") != kFormat) return absl::DataLossError("not the manifest of a checkpoint");
  if (const int version = json.at("version").get<int>(); version != kVersion) {
    return absl::UnimplementedError(
        absl::StrCat("format version ", version, "; this program reads ", kVersion));
  }
  manifest.step = json.at("step").get<int64_t>();
  manifest.world_size = json.at("world_size").get<int>();
  manifest.meta = json.at("meta").get<std::string>();
  manifest.config_yaml = json.at("config").get<std::string>();
  for (const Json& file : json.at("files")) {
    manifest.files.push_back({file.at("name").get<std::string>(), file.at("bytes").get<int64_t>()});
    if (manifest.files.back().name.find('/') != std::string::npos)
      return absl::DataLossError("a file in another folder");
  }
  for (const auto& [name, tensor] : json.at("tensors").items()) {
    PieceTable& table = manifest.tensors[name];
    table.shape = ParseShape(tensor.at("shape"));
    const std::optional<DType> dtype = ParseType(tensor.at("dtype").get<std::string>());
    if (!dtype.has_value()) return absl::DataLossError(absl::StrCat("tensor ", name, ": unknown dtype"));
    table.dtype = *dtype;
    for (const Json& json_piece : tensor.at("pieces")) {
      Piece piece = ParsePiece(json_piece);
      piece.file = json_piece.at("file").get<int>();
      if (piece.file < 0 || static_cast<size_t>(piece.file) >= manifest.files.size()) {
        return absl::DataLossError(absl::StrCat("tensor ", name, ": no such file"));
      }
      table.pieces.push_back(piece);
    }
  }
  // The writer checked the same: here it means damage, not a mistake of ours.
  const absl::Status cover = CheckCover(manifest.tensors);
  return cover.ok() ? cover : absl::DataLossError(cover.message());
}

}  // namespace

std::string PieceName(const std::string& tensor, const Shape& full_shape, int64_t row_begin, int64_t rows) {
  return rows == RowCount(full_shape) ? tensor : absl::StrCat(tensor, "@", row_begin);
}

uint64_t HashOf(const void* data, int64_t bytes) { return XXH3_64bits(data, static_cast<size_t>(bytes)); }

std::string EncodePieces(const std::map<std::string, PieceTable>& tensors) {
  Json json = Json::object();
  for (const auto& [name, table] : tensors) {
    json[name] = {{"shape", std::vector<int64_t>(table.shape.begin(), table.shape.end())},
                  {"pieces", PiecesJson(table, /*with_files=*/false)}};
  }
  return json.dump();
}

absl::Status AddPieces(std::string_view text, int file, std::map<std::string, PieceTable>& tensors) {
  SHOAL_ASSIGN_OR_RETURN(const Json json, ParseJson(text, kPiecesKey));
  try {
    for (const auto& [name, tensor] : json.items()) {
      const Shape shape = ParseShape(tensor.at("shape"));
      const auto [entry, is_new] = tensors.try_emplace(name);
      PieceTable& table = entry->second;
      if (is_new) table.shape = shape;
      if (table.shape != shape) {
        return absl::InternalError(absl::StrCat("tensor ", name, ": ranks disagree on its shape, ",
                                                ShapeString(table.shape), " and ", ShapeString(shape)));
      }
      for (const Json& json_piece : tensor.at("pieces")) {
        Piece piece = ParsePiece(json_piece);
        piece.file = file;
        table.pieces.push_back(piece);
      }
    }
  } catch (const Json::exception& error) {
    return absl::DataLossError(error.what());
  }
  return absl::OkStatus();
}

absl::Status CheckCover(std::map<std::string, PieceTable>& tensors) {
  for (auto& [name, table] : tensors) {
    std::sort(table.pieces.begin(), table.pieces.end(), [](const Piece& a, const Piece& b) {
      return a.row_begin != b.row_begin ? a.row_begin < b.row_begin : a.rows < b.rows;
    });
    int64_t end = 0;
    for (const Piece& piece : table.pieces) {
      if (piece.rows < 0 || piece.row_begin != end) {
        return absl::InternalError(absl::StrCat("tensor ", name, " ", ShapeString(table.shape),
                                                ": a piece begins at row ", piece.row_begin,
                                                ", but those before it end at row ", end));
      }
      end += piece.rows;
    }
    if (end != RowCount(table.shape)) {
      return absl::InternalError(
          absl::StrCat("tensor ", name, " ", ShapeString(table.shape), ": its pieces end at row ", end));
    }
  }
  return absl::OkStatus();
}

std::string EncodeManifest(const Manifest& manifest) {
  Json json = {{"format", kFormat},     {"version", kVersion},
               {"step", manifest.step}, {"world_size", manifest.world_size},
               {"meta", manifest.meta}, {"config", manifest.config_yaml}};
  json["files"] = Json::array();
  for (const ManifestFile& file : manifest.files)
    json["files"].push_back({{"name", file.name}, {"bytes", file.bytes}});
  json["tensors"] = Json::object();
  for (const auto& [name, table] : manifest.tensors) {
    json["tensors"][name] = {{"dtype", std::string(SafetensorsName(table.dtype))},
                             {"shape", std::vector<int64_t>(table.shape.begin(), table.shape.end())},
                             {"pieces", PiecesJson(table, /*with_files=*/true)}};
  }
  // JSON holds UTF-8 alone; a stray byte in a path of the configuration shall not cost the checkpoint.
  constexpr auto kReplace = Json::error_handler_t::replace;
  const std::string body = json.dump(-1, ' ', false, kReplace);
  json[kHashKey] = HashText(HashOf(body.data(), static_cast<int64_t>(body.size())));
  return json.dump(1, ' ', false, kReplace) + "\n";
}

absl::StatusOr<Manifest> DecodeManifest(std::string_view text, const std::string& source) {
  absl::StatusOr<Json> parsed = ParseJson(text, source);
  if (!parsed.ok()) return absl::DataLossError(parsed.status().message());
  Json& json = *parsed;
  const auto hash = json.find(kHashKey);
  if (!json.is_object() || hash == json.end()) return absl::DataLossError(absl::StrCat(source, ": no hash"));
  const Json wanted = *hash;
  json.erase(kHashKey);
  const std::string body = json.dump();
  const std::string have = HashText(HashOf(body.data(), static_cast<int64_t>(body.size())));
  if (wanted != have) {
    return absl::DataLossError(absl::StrCat(source, ": damaged: xxh3 ", have, ", want ", wanted.dump()));
  }
  Manifest manifest;
  try {
    SHOAL_RETURN_IF_ERROR(ParseBody(json, manifest), source);
  } catch (const Json::exception& error) {
    return absl::DataLossError(absl::StrCat(source, ": ", error.what()));
  }
  return manifest;
}

}  // namespace shoal::checkpoint
