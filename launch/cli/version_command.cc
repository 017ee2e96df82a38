#include "absl/strings/str_format.h"
#include "google/protobuf/stubs/common.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"

namespace shoal {

int RunVersion(absl::Span<const std::string> args) {
  FlagSet flags("shoal version", "Prints the version of the program and of what built it.");
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  absl::PrintF("shoal %s (%s, protobuf %s)\n", SHOAL_VERSION, SHOAL_COMPILER,
               google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION));
  return kExitOk;
}

}  // namespace shoal
