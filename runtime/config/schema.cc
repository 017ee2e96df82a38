#include "runtime/config/schema.h"

#include <charconv>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "runtime/base/check.h"

namespace shoal {

using google::protobuf::FieldDescriptor;

const Rule& RuleOf(const FieldDescriptor& field) { return field.options().GetExtension(rule); }

std::string ValueTypeName(const FieldDescriptor& field) {
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
    case FieldDescriptor::CPPTYPE_INT64:
    case FieldDescriptor::CPPTYPE_UINT32:
    case FieldDescriptor::CPPTYPE_UINT64:
      return "integer";
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return "number";
    case FieldDescriptor::CPPTYPE_BOOL:
      return "true or false";
    case FieldDescriptor::CPPTYPE_STRING:
      return "string";
    default:
      break;
  }
  SHOAL_CHECK(false) << field.full_name() << ": no configuration type";
  return "";
}

std::string TypeName(const FieldDescriptor& field) {
  const std::string value = ValueTypeName(field);
  if (!field.is_repeated()) return value;
  return absl::StrCat("list of ", value, field.cpp_type() == FieldDescriptor::CPPTYPE_BOOL ? "" : "s");
}

std::string AllowedValues(const Rule& rule) {
  if (rule.one_of_size() > 0) return absl::StrCat("one of ", absl::StrJoin(rule.one_of(), ", "));
  const std::string max = rule.has_max() ? FormatNumber(rule.max()) : "";
  std::string text;
  if (rule.has_min() && rule.has_max()) {
    text = absl::StrCat("from ", FormatNumber(rule.min()), " to ", max);
  } else if (rule.has_min()) {
    text = absl::StrCat("at least ", FormatNumber(rule.min()));
  } else if (rule.has_above()) {
    text = absl::StrCat("above ", FormatNumber(rule.above()), rule.has_max() ? " and at most " : "", max);
  } else if (rule.has_max()) {
    text = absl::StrCat("at most ", max);
  }
  return text;
}

ScalarKind ClassifyPlain(std::string_view text) {
  if (text.empty() || text == "~" || text == "null" || text == "Null" || text == "NULL")
    return ScalarKind::kNull;
  if (text == "true" || text == "false") return ScalarKind::kBool;
  const size_t sign = text[0] == '-' || text[0] == '+' ? 1 : 0;
  bool digits = false, integer = true;
  for (size_t i = sign; i < text.size(); ++i) {
    const char c = text[i];
    const bool digit = absl::ascii_isdigit(c);
    const bool separator = c == '_' && i > sign && i + 1 < text.size() && absl::ascii_isdigit(text[i - 1]) &&
                           absl::ascii_isdigit(text[i + 1]);
    digits = digits || digit;
    integer = integer && (digit || separator);
  }
  if (!digits) return ScalarKind::kString;
  if (integer) return ScalarKind::kInteger;
  return ParseNumber(text).has_value() ? ScalarKind::kNumber : ScalarKind::kString;
}

std::optional<double> ParseNumber(std::string_view text) {
  std::string digits(text);
  std::erase(digits, '_');
  double value = 0;
  // Hexadecimal floats, inf and nan parse too, but are no numbers of a configuration.
  const bool decimal = digits.find_first_not_of("0123456789+-.eE") == std::string::npos;
  if (!decimal || !absl::SimpleAtod(digits, &value) || !std::isfinite(value)) return std::nullopt;
  return value;
}

std::string FormatNumber(double value) {
  char buffer[32];
  const auto [end, error] = std::to_chars(buffer, buffer + sizeof(buffer), value);
  SHOAL_CHECK(error == std::errc()) << value;
  return std::string(buffer, end);
}

std::string YamlString(std::string_view text) {
  bool plain = !text.empty() && (absl::ascii_isalpha(text[0]) || text[0] == '/' || text[0] == '_');
  for (const char c : text)
    plain = plain && (absl::ascii_isalnum(c) || c == '/' || c == '_' || c == '-' || c == '.');
  if (plain && ClassifyPlain(text) == ScalarKind::kString) return std::string(text);
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      absl::StrAppend(&quoted, "\\", std::string(1, c));
    } else if (c == '\n') {
      quoted += "\\n";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      absl::StrAppendFormat(&quoted, "\\x%02x", c);
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

std::string FormatScalar(const google::protobuf::Message& message, const FieldDescriptor& field, int index) {
  const google::protobuf::Reflection& get = *message.GetReflection();
  const bool one = index < 0;
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return absl::StrCat(one ? get.GetInt32(message, &field) : get.GetRepeatedInt32(message, &field, index));
    case FieldDescriptor::CPPTYPE_INT64:
      return absl::StrCat(one ? get.GetInt64(message, &field) : get.GetRepeatedInt64(message, &field, index));
    case FieldDescriptor::CPPTYPE_UINT32:
      return absl::StrCat(one ? get.GetUInt32(message, &field)
                              : get.GetRepeatedUInt32(message, &field, index));
    case FieldDescriptor::CPPTYPE_UINT64:
      return absl::StrCat(one ? get.GetUInt64(message, &field)
                              : get.GetRepeatedUInt64(message, &field, index));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return FormatNumber(one ? get.GetDouble(message, &field)
                              : get.GetRepeatedDouble(message, &field, index));
    case FieldDescriptor::CPPTYPE_BOOL:
      return (one ? get.GetBool(message, &field) : get.GetRepeatedBool(message, &field, index)) ? "true"
                                                                                                : "false";
    case FieldDescriptor::CPPTYPE_STRING:
      return YamlString(one ? get.GetString(message, &field) : get.GetRepeatedString(message, &field, index));
    default:
      break;
  }
  SHOAL_CHECK(false) << field.full_name() << ": no configuration type";
  return "";
}

}  // namespace shoal
