#include "launch/status/progress.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr const char* kDim = "\x1b[2m";
constexpr const char* kBold = "\x1b[1m";
constexpr const char* kPlain = "\x1b[0m";

// Always 6 characters for what a loss can be.
std::string FormatLoss(double loss) {
  if (!std::isfinite(loss)) return absl::StrFormat("%6f", loss);
  return absl::StrFormat("%6.*f", std::abs(loss) < 10 ? 4 : 2, loss);
}

// Always 4 characters.
std::string FormatNorm(double norm) {
  if (!std::isfinite(norm)) return absl::StrFormat("%4f", norm);
  if (norm >= 0.01 && norm < 9.995) return absl::StrFormat("%4.2f", norm);
  if (norm >= 0.01 && norm < 999.5) return absl::StrFormat("%4.0f", norm);
  return absl::StrFormat("%.0e", norm);
}

// A field of the line: its forms from the longest to the empty one, and when it gives way.
struct Field {
  std::vector<std::string> forms;
  size_t form = 0;
  const std::string& text() const { return forms[form]; }
};

enum FieldIndex { kStep, kEta, kLoss, kRate, kNorm, kTokens, kFlops, kShare, kBalance, kFields };

std::array<Field, kFields> FieldsOf(const Progress& progress) {
  std::array<Field, kFields> fields;
  const std::string total = std::to_string(progress.total_steps);
  fields[kStep].forms = {
      absl::StrFormat("step %*d/%s", static_cast<int>(total.size()), progress.step, total)};
  fields[kEta].forms = {absl::StrFormat("eta %6s", FormatSeconds(progress.eta_seconds)), ""};
  const auto set = [&](FieldIndex field, double value, std::vector<std::string> forms) {
    if (!std::isnan(value)) fields[field].forms = std::move(forms);
    fields[field].forms.emplace_back();
  };
  // A loss or gradient norm that is not a number is news, so it stays.
  fields[kLoss].forms = {absl::StrCat("loss ", FormatLoss(progress.loss)), ""};
  const std::string norm = FormatNorm(progress.grad_norm);
  fields[kNorm].forms = {absl::StrCat("grad norm ", norm), absl::StrCat("grad ", norm), ""};
  set(kRate, progress.learning_rate, {absl::StrFormat("lr %.1e", progress.learning_rate)});
  set(kTokens, progress.tokens_per_second,
      {absl::StrFormat("%5s tok/s", FormatCount(progress.tokens_per_second))});
  set(kFlops, progress.flops_per_second, {absl::StrFormat("%12s", FormatFlops(progress.flops_per_second))});
  const std::string share = absl::StrFormat("%3.0f%%", progress.peak_share * 100);
  set(kShare, progress.peak_share,
      {absl::StrCat(share, " of GEMM peak"), absl::StrCat(share, " of peak"), absl::StrCat(share, " peak")});
  const std::string balance = absl::StrFormat("%.2f", progress.expert_balance);
  set(kBalance, progress.expert_balance,
      {absl::StrCat("expert balance ", balance), absl::StrCat("balance ", balance),
       absl::StrCat("bal ", balance)});
  return fields;
}

int Width(const std::array<Field, kFields>& fields) {
  int width = -2;
  for (const Field& field : fields) {
    if (!field.text().empty()) width += 2 + static_cast<int>(field.text().size());
  }
  return width;
}

// Labels dim, values as they are: a field's letters before its first digit.
std::string Coloured(const std::string& text, FieldIndex field) {
  const size_t value = text.find_first_of("0123456789");
  if (value == std::string::npos || value == 0 || text[0] == ' ') return text;
  const char* emphasis = field == kLoss ? kBold : "";
  return absl::StrCat(kDim, text.substr(0, value), kPlain, emphasis, text.substr(value),
                      field == kLoss ? kPlain : "");
}

std::string WithUnit(double value, absl::Span<const char* const> units, double base) {
  size_t unit = 0;
  while (unit + 1 < units.size() && std::abs(value) >= base * 0.9995) {
    value /= base;
    ++unit;
  }
  if (unit == 0) return absl::StrFormat("%.0f%s", value, units[unit]);
  const int digits = value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return absl::StrFormat("%.*f%s", digits, value, units[unit]);
}

// Bytes of the UTF-8 character that `text` starts with, 0 when it is broken.
size_t CharacterBytes(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  size_t bytes = lead < 0x80 ? 1 : lead >= 0xc2 && lead < 0xe0 ? 2 : (lead & 0xf0) == 0xe0 ? 3 : 0;
  if (lead >= 0xf0 && lead < 0xf5) bytes = 4;
  if (bytes == 0 || bytes > text.size()) return 0;
  for (size_t i = 1; i < bytes; ++i) {
    if ((static_cast<unsigned char>(text[i]) & 0xc0) != 0x80) return 0;
  }
  const auto second = static_cast<unsigned char>(bytes > 1 ? text[1] : 0);
  // Overlong forms, surrogates, beyond U+10FFFF, and C1 control characters.
  if ((lead == 0xe0 && second < 0xa0) || (lead == 0xed && second > 0x9f) || (lead == 0xf0 && second < 0x90) ||
      (lead == 0xf4 && second > 0x8f) || (lead == 0xc2 && second < 0xa0)) {
    return 0;
  }
  return bytes;
}

// The printable characters of one line of a sample.
std::vector<std::string> Characters(std::string_view line) {
  std::vector<std::string> characters;
  while (!line.empty()) {
    const size_t bytes = CharacterBytes(line);
    const auto lead = static_cast<unsigned char>(line[0]);
    if (lead == '\t') {
      characters.emplace_back(" ");
    } else if (bytes == 0 || lead < 0x20 || lead == 0x7f) {
      characters.emplace_back("?");
    } else {
      characters.emplace_back(line.substr(0, bytes));
    }
    line.remove_prefix(std::max<size_t>(bytes, 1));
  }
  return characters;
}

}  // namespace

std::string FormatProgress(const Progress& progress, int columns, Colour colour) {
  const int width = std::min(columns, kColumnsMax);
  std::array<Field, kFields> fields = FieldsOf(progress);
  // Who gives way, step by step: first words, then whole fields.
  constexpr std::array kYield = {kBalance, kShare,   kNorm,  kShare,  kBalance, kRate, kFlops,
                                 kNorm,    kBalance, kShare, kTokens, kEta,     kLoss};
  for (const FieldIndex field : kYield) {
    if (Width(fields) <= width) break;
    if (!fields[field].text().empty()) ++fields[field].form;
  }
  std::string line;
  for (int i = 0; i < kFields; ++i) {
    const std::string& text = fields[i].text();
    if (text.empty()) continue;
    if (!line.empty()) line += "  ";
    line += colour == Colour::kTerminal ? Coloured(text, static_cast<FieldIndex>(i)) : text;
  }
  if (colour == Colour::kNone && static_cast<int>(line.size()) > width) line.resize(std::max(width, 0));
  return line;
}

double EtaSeconds(absl::Span<const double> recent_step_seconds, int64_t remaining_steps,
                  double other_seconds_per_step) {
  if (recent_step_seconds.empty()) return kUnknown;
  std::vector<double> sorted(recent_step_seconds.begin(), recent_step_seconds.end());
  std::sort(sorted.begin(), sorted.end());
  // The mean of the middle: the mean alone follows one slow step, the median alone ignores steps that differ
  // by design.
  const size_t cut = sorted.size() / 5;
  const double sum = std::accumulate(sorted.begin() + static_cast<int64_t>(cut),
                                     sorted.end() - static_cast<int64_t>(cut), 0.0);
  const double step_seconds = sum / static_cast<double>(sorted.size() - 2 * cut);
  return static_cast<double>(remaining_steps) * (step_seconds + other_seconds_per_step);
}

double ExpertBalance(absl::Span<const std::vector<int64_t>> counts_by_layer) {
  double worst = kUnknown;
  for (const std::vector<int64_t>& counts : counts_by_layer) {
    const auto sum = static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
    if (sum <= 0) continue;
    const auto max = static_cast<double>(*std::max_element(counts.begin(), counts.end()));
    const double balance = max * static_cast<double>(counts.size()) / sum;
    if (!(worst >= balance)) worst = balance;
  }
  return worst;
}

std::string FormatSeconds(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "--";
  if (seconds >= 0.05 && seconds < 9.95) return absl::StrFormat("%.1fs", seconds);
  const auto whole = static_cast<int64_t>(std::llround(std::min(seconds, 1e15)));
  if (whole < 60) return absl::StrFormat("%ds", whole);
  if (whole < 3600) return absl::StrFormat("%dm%02ds", whole / 60, whole % 60);
  if (whole < 86400) return absl::StrFormat("%dh%02dm", whole / 3600, whole / 60 % 60);
  return absl::StrFormat("%dd%02dh", whole / 86400, whole / 3600 % 24);
}

std::string FormatCount(double count) { return WithUnit(count, {"", "k", "M", "B", "T"}, 1000); }

std::string FormatInteger(int64_t integer) {
  const std::string digits = std::to_string(integer);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    const bool after_digit = i > 0 && digits[i - 1] != '-';
    if (after_digit && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

std::string FormatBytes(double bytes) {
  return WithUnit(bytes, {" B", " KiB", " MiB", " GiB", " TiB"}, 1024);
}

std::string FormatFlops(double per_second) {
  const double giga = per_second * 1e-9;
  if (giga >= 9999.5) return absl::StrFormat("%.3g TFLOP/s", giga * 1e-3);
  return absl::StrFormat("%.*f GFLOP/s", giga < 99.95 ? 1 : 0, giga);
}

std::string FormatTable(std::string_view title, absl::Span<const std::pair<std::string, std::string>> rows,
                        Colour colour) {
  size_t labels = 0;
  for (const auto& [label, value] : rows) labels = std::max(labels, label.size());
  const bool coloured = colour == Colour::kTerminal;
  std::string table = absl::StrCat(coloured ? kBold : "", AbslSv(title), coloured ? kPlain : "", "\n");
  const std::string margin(labels + 4, ' ');
  for (const auto& [label, value] : rows) {
    const int room = kColumnsMax - static_cast<int>(margin.size());
    const std::string wrapped = FormatSample(value, room, margin);
    const std::string padded = absl::StrCat(label, std::string(labels - label.size(), ' '));
    absl::StrAppend(&table, "  ", coloured ? kDim : "", padded, coloured ? kPlain : "", "  ",
                    wrapped.empty() ? "\n" : absl::string_view(wrapped).substr(margin.size()));
  }
  return table;
}

std::string FormatSample(std::string_view text, int width, std::string_view indent) {
  std::string formatted;
  for (const absl::string_view line : absl::StrSplit(AbslSv(text), '\n')) {
    std::vector<std::string> characters = Characters(StdSv(line));
    const auto limit = static_cast<size_t>(std::max(width, 1));
    size_t begin = 0;
    do {
      size_t end = std::min(begin + limit, characters.size());
      size_t next = end;
      if (end < characters.size()) {
        // Break after the last space that fits; a longer word breaks where the line ends.
        for (size_t at = end; at > begin; --at) {
          if (characters[at] != " ") continue;
          end = at;
          next = at + 1;
          break;
        }
      }
      absl::StrAppend(&formatted, AbslSv(indent));
      for (size_t i = begin; i < end; ++i) formatted += characters[i];
      formatted += '\n';
      begin = next;
    } while (begin < characters.size());
  }
  return formatted;
}

}  // namespace shoal
