#include <filesystem>

#include "absl/strings/str_format.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"
#include "models/data/pack.h"
#include "runtime/base/status.h"
#include "runtime/files/file.h"

namespace shoal {
namespace {

absl::Status Pack(const PackOptions& options, PackReport* report) {
  const std::string folder = std::filesystem::path(options.output_prefix).parent_path();
  if (!folder.empty()) SHOAL_RETURN_IF_ERROR(MakeFolders(folder));
  return PackFiles(options, report);
}

int RunPack(absl::Span<const std::string> args) {
  FlagSet flags("shoal data pack",
                "Turns text and JSONL files into one data set of Megatron's format, PREFIX.bin and "
                "PREFIX.idx, a token per byte. "
                "Train on it with data.kind=megatron and data.path=PREFIX.");
  PackOptions options;
  int64_t append_eod = -1;
  std::string unit = "file";
  flags.AddPositional(
      "INPUT",
      "Files, in this order: .jsonl has a document per line, all else is text; .zst and .gz are unpacked.",
      &options.inputs);
  flags.Add({.name = "output-prefix",
             .value = "PREFIX",
             .help = "The two files are PREFIX.bin and PREFIX.idx; their folder is created.",
             .required = true},
            &options.output_prefix);
  flags.Add({.name = "json-key", .value = "KEY", .help = "Key of a JSONL line that holds the text."},
            &options.json_key);
  flags.Add(
      {.name = "append-eod",
       .value = "ID",
       .help =
           "Token to put after each document, below 2147483647; 256 is the first that is no byte. -1: none.",
       .min = -1},
      &append_eod);
  flags.Add({.name = "document-per",
             .value = "file|line",
             .help = "What one document of a text file is.",
             .one_of = {"file", "line"}},
            &unit);
  flags.Examples({"./shoal data pack book.txt more.jsonl.zst --output-prefix data/books --append-eod 256"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  if (append_eod > INT32_MAX)
    return Fail(flags.command(), absl::InvalidArgumentError("--append-eod: does not fit 32 bits"));
  if (append_eod >= 0) options.append_eod = static_cast<int32_t>(append_eod);
  options.text_document = unit == "line" ? DocumentUnit::kLine : DocumentUnit::kFile;
  PackReport report;
  if (const absl::Status status = Pack(options, &report); !status.ok())
    return Fail(flags.command(), status);
  absl::PrintF("%s.bin, %s.idx: %d documents, %d tokens (%s)", options.output_prefix, options.output_prefix,
               report.documents, report.tokens, std::string(report.type));
  if (report.empty_documents > 0) absl::PrintF("; %d empty documents left out", report.empty_documents);
  absl::PrintF("\n");
  return kExitOk;
}

}  // namespace

int RunData(absl::Span<const std::string> args) {
  const std::vector<Command> commands = {
      {"pack", "turn text and JSONL files into a .bin/.idx pair", RunPack}};
  const std::string help = CommandsHelp("shoal data", "Works on data sets.", commands);
  return Dispatch("shoal data", help, commands, args);
}

}  // namespace shoal
