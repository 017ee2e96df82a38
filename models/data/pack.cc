#include "models/data/pack.h"

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/strip.h"
#include "models/data/megatron.h"
#include "models/data/text_reader.h"
#include "models/tokenizer/byte_tokenizer.h"

namespace shoal {
namespace {

bool IsJsonl(const std::string& path) {
  absl::string_view name = path;
  if (!absl::ConsumeSuffix(&name, ".zst")) absl::ConsumeSuffix(&name, ".gz");
  return absl::EndsWith(name, ".jsonl");
}

absl::StatusOr<std::string> DocumentOfLine(const std::string& line, const std::string& key) {
  nlohmann::json object;
  try {
    object = nlohmann::json::parse(line);
  } catch (const nlohmann::json::parse_error& error) {
    return absl::InvalidArgumentError(absl::StrCat("is no JSON: ", error.what()));
  }
  if (!object.is_object())
    return absl::InvalidArgumentError(absl::StrCat("is ", object.type_name(), ", want an object"));
  const auto value = object.find(key);
  if (value == object.end()) return absl::InvalidArgumentError(absl::StrCat("has no key \"", key, "\""));
  if (!value->is_string()) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", key, "\" is ", value->type_name(), ", want a string"));
  }
  return value->get<std::string>();
}

class Packer {
 public:
  Packer(const PackOptions& options, MegatronWriter& writer) : options_(options), writer_(writer) {}

  absl::Status AddFile(const std::string& path) {
    SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<TextReader> reader, TextReader::Open(path));
    const bool jsonl = IsJsonl(path);
    if (!jsonl && options_.text_document == DocumentUnit::kFile) {
      SHOAL_ASSIGN_OR_RETURN(const std::string text, ReadAll(*reader));
      SHOAL_RETURN_IF_ERROR(AddDocument(text), path);
      return absl::OkStatus();
    }
    LineReader lines(*reader);
    std::string line;
    while (true) {
      SHOAL_ASSIGN_OR_RETURN(const bool found, lines.Next(&line));
      if (!found) return absl::OkStatus();
      SHOAL_RETURN_IF_ERROR(AddLine(line, jsonl), path, ":", lines.number());
    }
  }

  int64_t empty_documents() const { return empty_documents_; }

 private:
  absl::Status AddLine(const std::string& line, bool jsonl) {
    if (!jsonl || line.empty()) return AddDocument(line);
    SHOAL_ASSIGN_OR_RETURN(const std::string text, DocumentOfLine(line, options_.json_key));
    return AddDocument(text);
  }

  absl::Status AddDocument(std::string_view text) {
    if (text.empty()) {
      ++empty_documents_;
      return absl::OkStatus();
    }
    ids_.clear();
    EncodeBytes(text, &ids_);
    if (options_.append_eod.has_value()) ids_.push_back(*options_.append_eod);
    return writer_.AddDocument(ids_);
  }

  const PackOptions& options_;
  MegatronWriter& writer_;
  std::vector<int32_t> ids_;
  int64_t empty_documents_ = 0;
};

}  // namespace

absl::Status PackFiles(const PackOptions& options, PackReport* report) {
  if (options.inputs.empty()) return absl::InvalidArgumentError("no input files");
  if (options.output_prefix.empty()) return absl::InvalidArgumentError("no output prefix");
  const int32_t eod = options.append_eod.value_or(0);
  if (eod < 0)
    return absl::InvalidArgumentError(absl::StrCat("end-of-document token: is ", eod, ", want 0 or more"));
  const int64_t vocab_size = std::max<int64_t>(kByteVocabulary, int64_t{eod} + 1);
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<MegatronWriter> writer,
                         MegatronWriter::Create(options.output_prefix, vocab_size));
  Packer packer(options, *writer);
  for (const std::string& path : options.inputs) SHOAL_RETURN_IF_ERROR(packer.AddFile(path));
  if (writer->documents() == 0) {
    return absl::InvalidArgumentError(absl::StrCat("no document in ", options.inputs.front(),
                                                   options.inputs.size() > 1 ? " and the other inputs" : ""));
  }
  SHOAL_RETURN_IF_ERROR(writer->Finish());
  *report = {writer->documents(), packer.empty_documents(), writer->tokens(), Name(writer->type())};
  return absl::OkStatus();
}

}  // namespace shoal
