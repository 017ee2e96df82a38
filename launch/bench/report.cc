#include "launch/bench/report.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <tuple>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr std::string_view kCsvHeading = "library,transport,op,bytes,ranks,median_us,p10_us,p90_us";
constexpr int64_t kMaxSize = int64_t{1} << 40;

absl::StatusOr<int64_t> ParseSize(absl::string_view text) {
  absl::string_view digits = text;
  int shift = 0;
  if (!text.empty()) {
    const char unit = absl::ascii_toupper(text.back());
    shift = unit == 'K' ? 10 : unit == 'M' ? 20 : unit == 'G' ? 30 : 0;
    if (shift != 0) digits.remove_suffix(1);
  }
  int64_t value = 0;
  if (!absl::SimpleAtoi(digits, &value) || value < 1 || value > kMaxSize >> shift) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", text, "\" is no size: wanted a number such as 8, 64K or 256M"));
  }
  return value << shift;
}

double Percentile(const std::vector<double>& sorted, double share) {
  const double position = share * (sorted.size() - 1);
  const size_t below = static_cast<size_t>(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (position - below);
}

// NaN has no place in CSV or in a table.
std::string Number(double value, const char* none) {
  return std::isfinite(value) ? absl::StrFormat("%.6g", value) : none;
}

std::string Time(double us) {
  if (!std::isfinite(us)) return "-";
  if (us >= 10'000) return absl::StrFormat("%.1f ms", us * 1e-3);
  if (us >= 1'000) return absl::StrFormat("%.2f ms", us * 1e-3);
  return absl::StrFormat(us >= 100 ? "%.0f" : us >= 10 ? "%.1f" : "%.2f", us);
}

std::string Ratio(double ratio) { return ratio == 0 ? "-" : absl::StrFormat("%.2fx", ratio); }

bool IsWarm(const BenchRow& row) { return absl::EndsWith(row.library, "_warm"); }

bool HasTime(const BenchRow* row) { return row != nullptr && std::isfinite(row->us.median); }

// The fastest peer of those that `counts` takes; null without one.
template <class Counts>
const BenchRow* BestPeer(const Comparison& line, const Counts& counts) {
  const BenchRow* best = nullptr;
  for (const BenchRow* peer : line.peers) {
    if (!HasTime(peer) || peer->wrong > 0 || !counts(*peer)) continue;
    if (best == nullptr || peer->us.median < best->us.median) best = peer;
  }
  return best;
}

bool Any(const BenchRow&) { return true; }

double RatioOf(const BenchRow* peer, const BenchRow* own) {
  return HasTime(own) && peer != nullptr ? peer->us.median / own->us.median : 0;
}

int OpIndex(std::string_view op) {
  return std::find(std::begin(kBenchOps), std::end(kBenchOps), op) - std::begin(kBenchOps);
}

constexpr std::string_view kPeerOrder[] = {"openmpi", "openmpi_warm", "mpich", "mpich_warm", "gloo"};

std::string PeerTitle(std::string_view library) {
  static const std::map<std::string, std::string, std::less<>> titles = {{"openmpi", "OpenMPI"},
                                                                         {"openmpi_warm", "OpenMPI warm"},
                                                                         {"mpich", "MPICH"},
                                                                         {"mpich_warm", "MPICH warm"},
                                                                         {"gloo", "Gloo"}};
  const auto found = titles.find(library);
  return found == titles.end() ? std::string(library) : found->second;
}

const BenchRow* RowOf(const Comparison& line, const std::string& library) {
  for (const BenchRow* peer : line.peers) {
    if (peer->library == library) return peer;
  }
  return nullptr;
}

// A peer's time in `format`, marked when its result was wrong.
std::string PeerTime(const BenchRow* row, std::string (*format)(double us)) {
  if (row == nullptr) return "-";
  if (!HasTime(row)) return row->failure.empty() ? "failed" : row->failure;
  return absl::StrCat(format(row->us.median), row->wrong > 0 ? " (wrong)" : "");
}

std::string PlainUs(double us) { return absl::StrFormat("%.2f", us); }

std::string TableTitle(const Table& table) {
  return absl::StrCat(table.ranks, " ranks, ",
                      table.transport == "shm" ? "shared memory" : "TCP on loopback");
}

double BusGbPerSecond(const BenchRow& row) {
  return row.bytes / row.us.median * 1e-3 * BusFactor(row.op, row.ranks);
}

// Whole elements for every rank, as all programs of the comparison have it.
int64_t ElementsOf(const BenchRow& row, int64_t element_bytes) {
  return row.op == "barrier" ? 0 : std::max<int64_t>(row.bytes / element_bytes / row.ranks, 1) * row.ranks;
}

}  // namespace

absl::StatusOr<std::vector<int64_t>> ParseSizes(std::string_view text) {
  std::set<int64_t> sizes;
  for (absl::string_view part : absl::StrSplit(absl::string_view(text.data(), text.size()), ',')) {
    const std::vector<absl::string_view> ends = absl::StrSplit(part, ':');
    SHOAL_ASSIGN_OR_RETURN(const int64_t low, ParseSize(ends[0]));
    sizes.insert(low);
    if (ends.size() == 1) continue;
    SHOAL_ASSIGN_OR_RETURN(const int64_t high, ParseSize(ends[1]));
    if (ends.size() > 2 || high < low) {
      return absl::InvalidArgumentError(absl::StrCat("\"", part, "\" is no range of sizes: wanted LOW:HIGH"));
    }
    for (int64_t power = 1; power < high; power *= 4) {
      if (power > low) sizes.insert(power);
    }
    sizes.insert(high);
  }
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

std::string SizeName(int64_t bytes) {
  for (const auto& [shift, unit] : {std::pair(30, "G"), std::pair(20, "M"), std::pair(10, "K")}) {
    if (bytes >> shift > 0 && bytes % (int64_t{1} << shift) == 0) return absl::StrCat(bytes >> shift, unit);
  }
  return absl::StrCat(bytes);
}

double BusFactor(std::string_view op, int ranks) {
  const double others = ranks - 1.0;
  if (op == "all_reduce") return 2 * others / ranks;
  if (op == "broadcast" || op == "reduce" || op == "pingpong") return 1;
  if (op == "barrier") return 0;
  return others / ranks;
}

Spread Summarise(absl::Span<const std::vector<double>> rounds) {
  SHOAL_CHECK(!rounds.empty());
  std::vector<double> all, medians;
  for (std::vector<double> round : rounds) {
    SHOAL_CHECK(!round.empty());
    all.insert(all.end(), round.begin(), round.end());
    std::sort(round.begin(), round.end());
    medians.push_back(Percentile(round, 0.5));
  }
  std::sort(all.begin(), all.end());
  std::sort(medians.begin(), medians.end());
  return {Percentile(medians, 0.5), Percentile(all, 0.1), Percentile(all, 0.9)};
}

std::string CsvText(absl::Span<const BenchRow> rows) {
  std::string text = absl::StrCat(std::string(kCsvHeading), "\n");
  for (const BenchRow& row : rows) {
    absl::StrAppend(&text, row.library, ",", row.transport, ",", row.op, ",", row.bytes, ",", row.ranks, ",",
                    Number(row.us.median, "nan"), ",", Number(row.us.p10, "nan"), ",",
                    Number(row.us.p90, "nan"), "\n");
  }
  return text;
}

absl::StatusOr<std::vector<BenchRow>> ParseCsv(std::string_view text) {
  std::vector<BenchRow> rows;
  std::map<std::tuple<std::string, std::string, std::string, int64_t, int>, size_t> known;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(absl::string_view(text.data(), text.size()), '\n')) {
    ++number;
    if (line.empty() || line == absl::string_view(kCsvHeading.data(), kCsvHeading.size())) continue;
    const std::vector<std::string> fields = absl::StrSplit(line, ',');
    BenchRow row;
    if (fields.size() != 8 || !absl::SimpleAtoi(fields[3], &row.bytes) ||
        !absl::SimpleAtoi(fields[4], &row.ranks) || row.bytes < 0 || row.ranks < 1 ||
        !absl::SimpleAtod(fields[5], &row.us.median) || !absl::SimpleAtod(fields[6], &row.us.p10) ||
        !absl::SimpleAtod(fields[7], &row.us.p90)) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", number, ": wanted ", std::string(kCsvHeading), ", got \"", line, "\""));
    }
    row.library = fields[0];
    row.transport = fields[1];
    row.op = fields[2];
    const auto [at, is_new] =
        known.try_emplace({row.library, row.transport, row.op, row.bytes, row.ranks}, rows.size());
    if (is_new) {
      rows.push_back(row);
    } else {
      rows[at->second] = row;
    }
  }
  return rows;
}

double Comparison::RatioShipped() const {
  return RatioOf(BestPeer(*this, [](const BenchRow& peer) { return !IsWarm(peer); }), own);
}
double Comparison::RatioBest() const { return RatioOf(BestPeer(*this, Any), own); }
double Comparison::RatioTo(std::string_view library) const {
  return RatioOf(BestPeer(*this, [&](const BenchRow& peer) { return peer.library == library; }), own);
}
double Comparison::RatioToLimit() const {
  return HasTime(own) && HasTime(limit) ? own->us.median / limit->us.median : 0;
}

std::vector<Table> MakeTables(absl::Span<const BenchRow> rows) {
  std::vector<Table> tables;
  std::vector<std::map<std::pair<int, int64_t>, Comparison>> lines;  // Per table, by operation and size.
  for (const BenchRow& row : rows) {
    const auto found = std::find_if(tables.begin(), tables.end(), [&](const Table& table) {
      return table.transport == row.transport && table.ranks == row.ranks;
    });
    const size_t at = found - tables.begin();
    if (found == tables.end()) {
      tables.push_back({row.transport, row.ranks});
      lines.emplace_back();
    }
    Comparison& line = lines[at][{OpIndex(row.op), row.bytes}];
    if (row.library == "shoal") {
      line.own = &row;
    } else if (row.library == "limit") {
      line.limit = &row;
    } else {
      line.peers.push_back(&row);
    }
  }
  for (size_t i = 0; i < tables.size(); ++i) {
    for (auto& [key, line] : lines[i]) tables[i].lines.push_back(line);
    for (std::string_view library : kPeerOrder) {
      const std::string name(library);
      const auto has = [&](const Comparison& line) { return RowOf(line, name) != nullptr; };
      if (std::any_of(tables[i].lines.begin(), tables[i].lines.end(), has))
        tables[i].libraries.push_back(name);
    }
  }
  return tables;
}

std::string TableText(const Table& table, const ElementNames& element) {
  std::string text = absl::StrFormat("# transport %s, %d ranks; times in us, median of rounds\n",
                                     table.transport, table.ranks);
  absl::StrAppendFormat(&text, "# %-14s %10s %10s %5s %7s %10s %10s %10s %7s %7s %6s", "op", "bytes", "count",
                        "type", "redop", "time", "p10", "p90", "algbw", "busbw", "#wrong");
  for (const std::string& library : table.libraries) absl::StrAppendFormat(&text, " %12s", library);
  const bool limits =
      std::any_of(table.lines.begin(), table.lines.end(), [](const auto& line) { return line.limit; });
  if (!table.libraries.empty()) absl::StrAppendFormat(&text, " %8s %8s", "shipped", "best");
  if (limits) absl::StrAppendFormat(&text, " %8s", "limit");
  text += "\n";
  for (const Comparison& line : table.lines) {
    if (line.own == nullptr) continue;
    const BenchRow& own = *line.own;
    const bool reduces = own.op == "all_reduce" || own.op == "reduce_scatter" || own.op == "reduce";
    absl::StrAppendFormat(&text, "  %-14s %10d %10d %5s %7s", own.op, own.bytes,
                          ElementsOf(own, element.size), element.type, reduces ? element.redop : "none");
    if (HasTime(&own)) {
      absl::StrAppendFormat(&text, " %10.2f %10.2f %10.2f %7.2f %7.2f %6d", own.us.median, own.us.p10,
                            own.us.p90, own.bytes / own.us.median * 1e-3, BusGbPerSecond(own), own.wrong);
    } else {
      absl::StrAppendFormat(&text, " %s", own.failure.empty() ? "failed" : own.failure);
    }
    for (const std::string& library : table.libraries) {
      absl::StrAppendFormat(&text, " %12s", PeerTime(RowOf(line, library), PlainUs));
    }
    if (!table.libraries.empty()) {
      absl::StrAppendFormat(&text, " %8s %8s", Ratio(line.RatioShipped()), Ratio(line.RatioBest()));
    }
    if (limits) absl::StrAppendFormat(&text, " %8s", Ratio(line.RatioToLimit()));
    text += "\n";
  }
  return text;
}

std::string TableMarkdown(const Table& table) {
  const bool limits =
      std::any_of(table.lines.begin(), table.lines.end(), [](const auto& line) { return line.limit; });
  const bool with_gloo = table.transport == "tcp" && std::find(table.libraries.begin(), table.libraries.end(),
                                                               "gloo") != table.libraries.end();
  std::vector<std::string> titles = {"op", "bytes", "Shoal (p10..p90)", "bus GB/s"};
  for (const std::string& library : table.libraries) titles.push_back(PeerTitle(library));
  if (!table.libraries.empty()) titles.insert(titles.end(), {"as shipped", "any tuning"});
  if (with_gloo) titles.push_back("Gloo alone");
  if (limits) titles.push_back("over the limit");
  std::string text = absl::StrFormat("### %s\n\n", TableTitle(table));
  absl::StrAppend(&text, "| ", absl::StrJoin(titles, " | "), " |\n|",
                  absl::StrJoin(std::vector<std::string>(titles.size(), "---"), "|"), "|\n");
  for (const Comparison& line : table.lines) {
    if (line.own == nullptr) continue;
    const BenchRow& own = *line.own;
    std::vector<std::string> cells = {own.op, SizeName(own.bytes)};
    if (HasTime(&own)) {
      cells.push_back(absl::StrCat(Time(own.us.median), " (", Time(own.us.p10), "..", Time(own.us.p90), ")"));
      cells.push_back(own.op == "barrier" ? "-" : absl::StrFormat("%.2f", BusGbPerSecond(own)));
    } else {
      cells.insert(cells.end(), {"failed", "-"});
    }
    for (const std::string& library : table.libraries) cells.push_back(PeerTime(RowOf(line, library), Time));
    if (!table.libraries.empty())
      cells.insert(cells.end(), {Ratio(line.RatioShipped()), Ratio(line.RatioBest())});
    if (with_gloo) cells.push_back(Ratio(line.RatioTo("gloo")));
    if (limits) cells.push_back(Ratio(line.RatioToLimit()));
    absl::StrAppend(&text, "| ", absl::StrJoin(cells, " | "), " |\n");
  }
  return text;
}

std::string SectionMarkdown(absl::Span<const Table> tables) {
  std::string text =
      "## Collectives beside OpenMPI, MPICH and Gloo\n\n"
      "Median of rounds in which all libraries take turns; microseconds unless marked. f32, sums, all_reduce "
      "in "
      "place; bytes are a rank's\n"
      "whole buffer. A sample is the time of the slowest rank from a barrier on; where an operation has a "
      "root and "
      "takes less than 50 us, the\n"
      "root moves on from call to call. *Warm*: the same library without page faults (allocator kept, 2 MiB "
      "pages). Gloo knows TCP alone,\n"
      "and stands there with the fastest of its algorithms. \"as shipped\" and \"any tuning\": best such "
      "peer's "
      "median / Shoal's, so above 1\n"
      "Shoal is faster.\n\n";
  for (const Table& table : tables) absl::StrAppend(&text, TableMarkdown(table), "\n");
  std::string slower;
  for (const Table& table : tables) {
    for (const Comparison& line : table.lines) {
      const double ratio = line.RatioBest();
      if (ratio == 0 || ratio >= 1) continue;
      absl::StrAppend(&slower, "- ", TableTitle(table), ", ", line.own->op, ", ", SizeName(line.own->bytes),
                      ": ", PeerTitle(BestPeer(line, Any)->library), " takes ", Ratio(ratio),
                      " of Shoal's time\n");
    }
  }
  return absl::StrCat(text, "### Where a peer is faster\n\n",
                      slower.empty() ? "Nowhere in these tables.\n" : slower);
}

}  // namespace shoal
