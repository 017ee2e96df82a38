// What `shoal bench collectives` says: sizes, statistics, ratios and tables. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace shoal {

// The operations that are measured, in the order of the tables. pingpong: half the time of a message from
// rank 0 to rank 1 and back.
inline constexpr std::string_view kBenchOps[] = {"all_reduce", "reduce_scatter", "all_gather", "all_to_all",
                                                 "broadcast",  "reduce",         "gather",     "scatter",
                                                 "barrier",    "pingpong"};

// "8:256M" is 8, the powers of four between, and 256M; "8,1K,64K" a list; both mix. K, M and G are powers of
// 1024. Ascending, without repetition. INVALID_ARGUMENT names the part that is no size.
absl::StatusOr<std::vector<int64_t>> ParseSizes(std::string_view text);
std::string SizeName(int64_t bytes);  // "8", "64K", "256M"

// Bus bandwidth = algorithm bandwidth (bytes / time) times this, as nccl-tests has it: what the slowest link
// must carry.
double BusFactor(std::string_view op, int ranks);

struct Spread {
  double median = 0, p10 = 0, p90 = 0;
};
// The median of the rounds' medians, and percentiles of all samples. At least one round, none empty.
Spread Summarise(absl::Span<const std::vector<double>> rounds);

// One line of the CSV file: a library's times for one operation at one size.
struct BenchRow {
  std::string library;    // "shoal", "openmpi", "openmpi_warm", "mpich", "mpich_warm", "gloo", or "limit".
  std::string transport;  // Of the comparison: "shm" or "tcp". Gloo knows only TCP.
  std::string op;
  int64_t bytes = 0;  // The whole buffer of a rank.
  int ranks = 0;
  Spread us;  // NaN: it hung or failed.

  // Not in the file.
  std::string algorithm;  // Gloo's, the fastest.
  int64_t wrong = 0;      // Elements.
  std::string failure;    // Why there is no time.
};

std::string CsvText(absl::Span<const BenchRow> rows);  // With the heading.
// Of several rows for the same thing the last counts. INVALID_ARGUMENT names the line.
absl::StatusOr<std::vector<BenchRow>> ParseCsv(std::string_view text);

// The rows of one operation at one size, as a line of a table has them.
struct Comparison {
  const BenchRow* own = nullptr;
  const BenchRow* limit = nullptr;
  std::vector<const BenchRow*> peers;  // In the order of PeerLibraries().

  // Best peer's median / ours, of peers whose result was right; 0 without one or without own times. As
  // shipped: without the warm ones.
  double RatioShipped() const;
  double RatioBest() const;
  double RatioTo(std::string_view library) const;
  double RatioToLimit() const;  // Ours / the limit; 0 without one.
};

struct Table {
  std::string transport;
  int ranks = 0;
  std::vector<std::string> libraries;  // Peers that have rows.
  std::vector<Comparison> lines;       // By operation, then size.
};
// One per transport and number of ranks, in order of appearance. Points into `rows`.
std::vector<Table> MakeTables(absl::Span<const BenchRow> rows);

struct ElementNames {
  std::string type = "f32", redop = "sum";
  int64_t size = 4;  // Bytes of an element.
};
// In the manner of nccl-tests, with the peers' medians and the ratios behind.
std::string TableText(const Table& table, const ElementNames& element);
std::string TableMarkdown(const Table& table);

// The section of docs/performance.md: how it was measured, all tables, and where a peer was faster.
std::string SectionMarkdown(absl::Span<const Table> tables);

}  // namespace shoal
