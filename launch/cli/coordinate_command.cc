#include <csignal>
#include <fstream>

#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "collectives/membership/coordinator.h"
#include "launch/agent/environment.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

struct CoordinateFlags {
  std::string listen = "127.0.0.1:29400";
  int64_t min = 1;
  int64_t max = 16384;
  std::string job_id = "none";
  std::string secret_file;
  double heartbeat_timeout = 1;
  std::string backend = "static";
  std::string endpoint;
};

// The file's text without the white space around it.
absl::StatusOr<std::string> ReadSecret(const std::string& path) {
  std::ifstream file(path);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file) return absl::NotFoundError(absl::StrCat("--secret-file ", path, ": cannot be read"));
  const std::string secret(absl::StripAsciiWhitespace(text));
  if (secret.empty()) return absl::InvalidArgumentError(absl::StrCat("--secret-file ", path, ": is empty"));
  return secret;
}

absl::StatusOr<CoordinatorServerOptions> MakeOptions(const CoordinateFlags& flags) {
  CoordinatorServerOptions options;
  if (flags.min > flags.max) {
    return absl::InvalidArgumentError(absl::StrCat("--min ", flags.min, " is above --max ", flags.max));
  }
  options.listen = flags.listen;
  options.job_id = flags.job_id;
  options.core.size_min = static_cast<int>(flags.min);
  options.core.size_max = static_cast<int>(flags.max);
  options.core.heartbeat_timeout = absl::Seconds(flags.heartbeat_timeout);
  if (!flags.secret_file.empty()) {
    SHOAL_ASSIGN_OR_RETURN(options.secret, ReadSecret(flags.secret_file));
  } else {
    options.secret = ProcessEnv("SHOAL_JOB_SECRET").value_or("");
  }
  if ((flags.backend == "etcd") != !flags.endpoint.empty()) {
    return absl::InvalidArgumentError(
        "--rdzv-backend etcd and --rdzv-endpoint HOST:PORT belong together: where etcd is reached");
  }
  if (flags.backend == "etcd") options.etcd = absl::StrSplit(flags.endpoint, ',');
  return options;
}

// Until SIGTERM or SIGINT. They are blocked before any thread starts, so that this thread gets them.
absl::Status Coordinate(const CoordinatorServerOptions& options) {
  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  sigprocmask(SIG_BLOCK, &ends, nullptr);
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<CoordinatorServer> server, CoordinatorServer::Start(options));
  absl::PrintF("coordinating job '%s' at %s\n", options.job_id, server->address());
  (void)std::fflush(stdout);
  int signal_number = 0;
  (void)sigwait(&ends, &signal_number);
  return absl::OkStatus();
}

}  // namespace

int RunCoordinate(absl::Span<const std::string> args) {
  FlagSet flags("shoal coordinate",
                "Lets the processes of a job find each other, and forms its epochs: who is in, who has died or "
                "does not answer, who waits to join. It sees no data. It may be ended and started anew at any time: "
                "the processes go on meanwhile and register again. Ends on SIGTERM and SIGINT.");
  CoordinateFlags values;
  flags.Add({.name = "listen",
             .value = "HOST:PORT",
             .help = "Where members come. Port 0: any free one, which is printed; 0.0.0.0: every interface; "
                     "unix:NAME: this host alone."},
            &values.listen);
  flags.Add({.name = "min", .value = "N", .help = "An epoch has at least so many members.", .min = 1},
            &values.min);
  flags.Add({.name = "max", .value = "N", .help = "And at most so many; others wait.", .min = 1}, &values.max);
  flags.Add({.name = "job-id", .value = "ID", .help = "Name of the job; processes of another are refused."},
            &values.job_id);
  flags.Add({.name = "secret-file",
             .value = "FILE",
             .help = "Who joins must know what is in it. Default: the secret in SHOAL_JOB_SECRET; without any, "
                     "everybody who reaches the address may join."},
            &values.secret_file);
  flags.Add({.name = "heartbeat-timeout",
             .value = "SECONDS",
             .help = "A member silent for so long is excluded.",
             .min = 0.05},
            &values.heartbeat_timeout);
  flags.Heading("Several coordinators, one of which leads");
  flags.Add({.name = "rdzv-backend",
             .value = "static|etcd",
             .help = "etcd: whom etcd elects leads, the others stand by and take over.",
             .one_of = {"static", "etcd"}},
            &values.backend);
  flags.Add({.name = "rdzv-endpoint", .value = "HOST:PORT[,HOST:PORT...]", .help = "Where etcd is reached. Default: none."},
            &values.endpoint);
  flags.Examples({"./shoal coordinate --listen 10.0.0.1:29400 --min 4 --job-id night-run --secret-file secret",
                  "./shoal coordinate --listen 10.0.0.1:29400 --rdzv-backend etcd --rdzv-endpoint 10.0.0.9:2379"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const auto options = MakeOptions(values);
  if (!options.ok()) return Fail(flags.command(), options.status());
  const absl::Status status = Coordinate(*options);
  return status.ok() ? kExitOk : Fail(flags.command(), status);
}

}  // namespace shoal
