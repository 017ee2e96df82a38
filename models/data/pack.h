// `shoal data pack`: text and JSONL files become one Megatron .bin/.idx pair, a token per byte. Hides
// parsing. Blocks; one caller per output prefix.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/status.h"

namespace shoal {

// What one document of a text file is.
enum class DocumentUnit : uint8_t { kFile, kLine };

struct PackOptions {
  // Read in this order. Names that end in .jsonl (before .zst or .gz) are JSONL, one document a line; the
  // others are text.
  std::vector<std::string> inputs;
  std::string output_prefix;
  std::string json_key = "text";
  // Put after every document, and then part of it.
  std::optional<int32_t> append_eod;
  DocumentUnit text_document = DocumentUnit::kFile;
};

struct PackReport {
  int64_t documents = 0;
  int64_t empty_documents = 0;  // Left out: empty files, lines or strings.
  int64_t tokens = 0;           // With those of append_eod.
  std::string_view type;        // Of a stored token: "u16" or "i32".
};

// Replaces a pair of that prefix once all is read and written; until then files under it are as before.
// INVALID_ARGUMENT with "FILE:LINE: why": a line is no JSON object with a string under json_key.
// INVALID_ARGUMENT: no inputs, or no document in them. The errors of reading and writing name the file.
absl::Status PackFiles(const PackOptions& options, PackReport* report);

}  // namespace shoal
