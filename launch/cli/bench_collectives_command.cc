#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "launch/agent/agent.h"
#include "launch/agent/exit_codes.h"
#include "launch/bench/comparison.h"
#include "launch/cli/bench_commands.h"
#include "launch/cli/flags.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

struct CollectivesFlags {
  std::string ops = "all_reduce,reduce_scatter,all_gather,all_to_all,broadcast";
  std::string sizes = "8:256M";
  std::string ranks = "2";
  std::string transports = "shm";
  std::string peers;
  double seconds = 0.1;
  int64_t rounds = 3;
  std::string dtype = "f32";
  std::string redop = "sum";
  std::string op_options;
  bool out_of_place = false;
  bool bind = false;
  bool explain = false;
  bool limits = false;
  bool probe = false;
  std::string csv;
  bool markdown = false;
  std::string from;
  std::string peers_folder;
};

std::vector<std::string> SplitList(const std::string& text) {
  return absl::StrSplit(text, ',', absl::SkipEmpty());
}

// build/release/bin/shoal -> build/release/tests/bench/peers
std::string DefaultPeersFolder() {
  const std::string self = SelfExecutable();
  return absl::StrCat(self.substr(0, self.rfind('/')), "/../tests/bench/peers");
}

absl::Status CheckOneOf(const char* flag, const std::vector<std::string>& values,
                        absl::Span<const std::string_view> known) {
  if (values.empty()) return absl::InvalidArgumentError(absl::StrCat("--", flag, " is empty"));
  for (const std::string& value : values) {
    if (std::find(known.begin(), known.end(), value) != known.end()) continue;
    std::string names;
    for (std::string_view name : known) absl::StrAppend(&names, names.empty() ? "" : ", ", std::string(name));
    return absl::InvalidArgumentError(absl::StrCat("--", flag, " has \"", value, "\": there are ", names));
  }
  return absl::OkStatus();
}

absl::StatusOr<ComparisonOptions> MakeOptions(const CollectivesFlags& flags) {
  ComparisonOptions options;
  options.ops = SplitList(flags.ops);
  options.transports = SplitList(flags.transports);
  options.peers = SplitList(flags.peers);
  SHOAL_RETURN_IF_ERROR(CheckOneOf("ops", options.ops, kBenchOps));
  SHOAL_RETURN_IF_ERROR(CheckOneOf("transport", options.transports, {"shm", "tcp"}));
  SHOAL_ASSIGN_OR_RETURN(options.sizes, ParseSizes(flags.sizes), "--sizes");
  for (const std::string& text : SplitList(flags.ranks)) {
    int ranks = 0;
    if (!absl::SimpleAtoi(text, &ranks) || ranks < 2 || ranks > 256) {
      return absl::InvalidArgumentError(
          absl::StrCat("--ranks has \"", text, "\": wanted a number from 2 to 256"));
    }
    options.ranks.push_back(ranks);
  }
  SHOAL_ASSIGN_OR_RETURN(options.own.dtype, ParseDType(flags.dtype), "--dtype");
  SHOAL_ASSIGN_OR_RETURN(options.own.redop, ParseRedop(flags.redop), "--redop");
  SHOAL_RETURN_IF_ERROR(ParseOpOptions(flags.op_options, &options.own), "--op-options");
  options.folder = flags.peers_folder.empty() ? DefaultPeersFolder() : flags.peers_folder;
  SHOAL_RETURN_IF_ERROR(CheckPeers(options.peers, options.folder), "--peers");
  if (!options.peers.empty() && (flags.dtype != "f32" || flags.redop != "sum")) {
    return absl::InvalidArgumentError(
        "peers are compared with in sums of f32: leave out --dtype and --redop, or --peers");
  }
  options.seconds = flags.seconds;
  options.rounds = static_cast<int>(flags.rounds);
  options.in_place = !flags.out_of_place;
  options.own.bind = flags.bind;
  options.own.explain = flags.explain;
  options.probe = flags.probe;
  options.limits = flags.limits;
  if (flags.limits && access(LimitsProgram(options.folder).c_str(), X_OK) != 0) {
    return absl::NotFoundError(
        absl::StrCat("--limits: there is no ", LimitsProgram(options.folder),
                     "; build it with\n  cmake --build build/release --target bench_limits"));
  }
  return options;
}

absl::Status AppendCsv(const std::string& path, absl::Span<const BenchRow> rows) {
  std::ofstream file(path, std::ios::app);
  std::string text = CsvText(rows);
  if (file.tellp() > 0) text.erase(0, text.find('\n') + 1);
  file << text << std::flush;
  return file ? absl::OkStatus() : absl::UnavailableError(absl::StrCat("cannot write to ", path));
}

absl::StatusOr<std::vector<BenchRow>> ReadCsv(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  SHOAL_ASSIGN_OR_RETURN(std::vector<BenchRow> rows, ParseCsv(text.str()), path);
  return rows;
}

void PrintTables(absl::Span<const BenchRow> rows, const CollectivesFlags& flags, const OwnOptions& own) {
  const ElementNames element = {flags.dtype, flags.redop, SizeOf(own.dtype)};
  const std::vector<Table> tables = MakeTables(rows);
  if (flags.markdown) {
    std::printf("%s", SectionMarkdown(tables).c_str());
  } else {
    for (const Table& table : tables) std::printf("%s\n", TableText(table, element).c_str());
  }
  std::fflush(stdout);
}

absl::Status BenchCollectives(const CollectivesFlags& flags) {
  if (!flags.from.empty()) {
    SHOAL_ASSIGN_OR_RETURN(const std::vector<BenchRow> rows, ReadCsv(flags.from));
    PrintTables(rows, flags, {});
    return absl::OkStatus();
  }
  SHOAL_ASSIGN_OR_RETURN(ComparisonOptions options, MakeOptions(flags));
  options.say = [](const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); };
  options.on_rows = [&](absl::Span<const BenchRow> rows) {
    return flags.csv.empty() ? absl::OkStatus() : AppendCsv(flags.csv, rows);
  };
  SHOAL_ASSIGN_OR_RETURN(const std::vector<BenchRow> rows, Compare(options));
  PrintTables(rows, flags, options.own);
  for (const BenchRow& row : rows) {
    if (row.library == "shoal" && (row.wrong > 0 || !row.failure.empty())) {
      return absl::DataLossError(
          absl::StrCat(row.op, " of ", SizeName(row.bytes), " on ", row.ranks, " ranks, ", row.transport,
                       ": ", row.failure.empty() ? absl::StrCat(row.wrong, " wrong elements") : row.failure));
    }
  }
  return absl::OkStatus();
}

void DeclareFlags(FlagSet* flags, CollectivesFlags* values) {
  flags->Add({.name = "ops",
              .value = "LIST",
              .help = "Operations, of all_reduce, reduce_scatter, all_gather, all_to_all, broadcast, reduce, "
                      "gather, scatter, barrier, pingpong."},
             &values->ops);
  flags->Add({.name = "sizes",
              .value = "LIST",
              .help = "Bytes of a rank's whole buffer: numbers with K, M or G, and ranges LOW:HIGH, which "
                      "have the powers of four between."},
             &values->sizes);
  flags->Add({.name = "ranks", .value = "LIST", .help = "Numbers of ranks, all on this host."},
             &values->ranks);
  flags->Add({.name = "transport", .value = "LIST", .help = "shm, tcp (on loopback), or both."},
             &values->transports);
  flags->Add({.name = "out-of-place",
              .help = "all_reduce into another buffer instead of in place. The other operations always do."},
             &values->out_of_place);
  flags->Add(
      {.name = "dtype", .value = "TYPE", .help = "Element type: f32, bf16, f16, f64, i8, u8, i32, i64."},
      &values->dtype);
  flags->Add({.name = "redop", .value = "OP", .help = "Reduction: sum, product, min, max, average."},
             &values->redop);
  flags->Add({.name = "op-options",
              .value = "LIST",
              .help = "wire=as_is|bf16|int8|fp8, order=fast|fixed, algorithm=NAME, separated by commas."},
             &values->op_options);
  flags->Add(
      {.name = "bind", .help = "Binds each of Shoal's ranks to a core, as OpenMPI does with two by itself."},
      &values->bind);
  flags->Add({.name = "explain", .help = "Says which algorithm Shoal chose at each size and why, and what it was expected to take."},
             &values->explain);
  flags->Heading("Comparison");
  flags->Add({.name = "peers",
              .value = "LIST",
              .help = "Libraries to compare with, of openmpi, mpich, gloo; each MPI as shipped and warm (no "
                      "page faults: allocator kept, 2 MiB pages), Gloo with all its algorithms, the fastest "
                      "counting. Built by tests/bench/peers/build."},
             &values->peers);
  flags->Add({.name = "peers-folder",
              .value = "DIR",
              .help = "Where their programs are. Default: tests/bench/peers of this build."},
             &values->peers_folder);
  flags->Add({.name = "seconds-per-size",
              .value = "S",
              .help = "Measuring time of a size in one round, about; never fewer than four samples.",
              .min = 0},
             &values->seconds);
  flags->Add(
      {.name = "rounds",
       .value = "N",
       .help = "How often all libraries take their turn. The median of the rounds' medians is printed.",
       .min = 1},
      &values->rounds);
  flags->Add(
      {.name = "limits", .help = "Measures beside it what the machine allows, and prints time / limit."},
      &values->limits);
  flags->Add({.name = "probe", .help = "Says in each round how far the cores are apart."}, &values->probe);
  flags->Heading("Output");
  flags->Add({.name = "csv",
              .value = "FILE",
              .help = "Appends library,transport,op,bytes,ranks,median_us,p10_us,p90_us."},
             &values->csv);
  flags->Add({.name = "markdown", .help = "Prints the section of docs/performance.md."}, &values->markdown);
  flags->Add({.name = "from",
              .value = "FILE",
              .help = "Measures nothing: prints the tables of such a CSV file; of several rows for the same "
                      "thing the last counts."},
             &values->from);
}

}  // namespace

int RunBenchCollectives(absl::Span<const std::string> args) {
  FlagSet flags("shoal bench collectives",
                "Verifies the collective operations, then measures them, alone or in alternation with other "
                "libraries, and prints a "
                "table in the manner of nccl-tests: time of the slowest rank, bytes / time (algbw), what a "
                "link must carry (busbw), "
                "wrong elements, and best peer / ours, of the peers as shipped and of all.");
  CollectivesFlags values;
  DeclareFlags(&flags, &values);
  flags.Examples({"./shoal bench collectives --ranks 2,4 --sizes 8,1K,64K,1M",
                  "./shoal bench collectives --ops all_reduce --peers openmpi,mpich,gloo --rounds 5 --csv "
                  "all_reduce.csv",
                  "./shoal bench collectives --from all_reduce.csv --markdown"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const absl::Status status = BenchCollectives(values);
  return status.ok() ? kExitOk : Fail(flags.command(), status);
}

}  // namespace shoal
