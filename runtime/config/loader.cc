#include "runtime/config/loader.h"

#include <yaml-cpp/yaml.h>

#include <limits>
#include <map>
#include <optional>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "runtime/config/nearest.h"
#include "runtime/config/schema.h"

namespace shoal {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

std::string JoinKey(std::string_view section, std::string_view key) {
  return section.empty() ? std::string(key) : absl::StrCat(AbslSv(section), ".", AbslSv(key));
}

bool IsSection(const FieldDescriptor& field) { return field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE; }

bool IsPlain(const YAML::Node& node) { return node.Tag() != "!"; }  // yaml-cpp tags quoted scalars so.

struct KnownKey {
  std::string section;
  std::string name;
};

void ListKeys(const Descriptor& descriptor, const std::string& section, std::vector<KnownKey>* keys) {
  for (int i = 0; i < descriptor.field_count(); ++i) {
    const FieldDescriptor& field = *descriptor.field(i);
    keys->push_back({section, field.name()});
    if (IsSection(field)) ListKeys(*field.message_type(), JoinKey(section, field.name()), keys);
  }
}

// How a suggestion names a key of the same section: as it stands there, or with its section.
enum class Named : uint8_t { kFromSection, kWhole };

// "; did you mean hidden_size?", or with its section when it belongs to another one. A key that is spelt
// exactly so elsewhere is meant rather than a similar one here.
std::string SuggestKey(const Descriptor& root, std::string_view section, std::string_view name, Named named) {
  std::vector<KnownKey> keys;
  ListKeys(root, "", &keys);
  int least = std::numeric_limits<int>::max();
  std::string suggestion;
  for (const KnownKey& key : keys) {
    const int unlikeness = Unlikeness(name, key.name);
    if (unlikeness < 0) continue;
    const bool here = key.section == section;
    const int score = 2 * unlikeness + (here ? 0 : 1);
    if (score >= least) continue;
    least = score;
    suggestion = here && named == Named::kFromSection ? key.name : JoinKey(key.section, key.name);
  }
  return suggestion.empty() ? "" : absl::StrCat("; did you mean ", suggestion, "?");
}

std::string SomeKeys(const Descriptor& descriptor) {
  std::vector<std::string> names;
  for (int i = 0; i < descriptor.field_count() && i < 3; ++i) names.push_back(descriptor.field(i)->name());
  return absl::StrCat("keys such as ", absl::StrJoin(names, ", "));
}

std::string Describe(const YAML::Node& node) {
  if (node.IsMap()) return "a section";
  if (node.IsSequence()) return "a list";
  if (!node.IsScalar()) return "nothing";
  constexpr size_t kShownMax = 60;
  std::string text = node.Scalar();
  if (text.size() > kShownMax) text = text.substr(0, kShownMax) + "...";
  if (!IsPlain(node)) return absl::StrCat("the string \"", text, "\"");
  switch (ClassifyPlain(node.Scalar())) {
    case ScalarKind::kNull:
      return "nothing";
    case ScalarKind::kBool:
      return text;
    case ScalarKind::kInteger:
      return absl::StrCat("the integer ", text);
    case ScalarKind::kNumber:
      return absl::StrCat("the number ", text);
    case ScalarKind::kString:
      break;
  }
  return absl::StrCat("the string \"", text, "\"");
}

// A value that fits its field. The member for the field's type is set.
struct Scalar {
  int64_t integer = 0;
  uint64_t natural = 0;
  double number = 0;
  bool boolean = false;
  std::string text;
};

void Store(const Scalar& value, const FieldDescriptor* field, Message* out) {
  const google::protobuf::Reflection& set = *out->GetReflection();
  const bool add = field->is_repeated();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32: {
      const int32_t narrow = static_cast<int32_t>(value.integer);
      return add ? set.AddInt32(out, field, narrow) : set.SetInt32(out, field, narrow);
    }
    case FieldDescriptor::CPPTYPE_INT64:
      return add ? set.AddInt64(out, field, value.integer) : set.SetInt64(out, field, value.integer);
    case FieldDescriptor::CPPTYPE_UINT32: {
      const uint32_t narrow = static_cast<uint32_t>(value.natural);
      return add ? set.AddUInt32(out, field, narrow) : set.SetUInt32(out, field, narrow);
    }
    case FieldDescriptor::CPPTYPE_UINT64:
      return add ? set.AddUInt64(out, field, value.natural) : set.SetUInt64(out, field, value.natural);
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return add ? set.AddDouble(out, field, value.number) : set.SetDouble(out, field, value.number);
    case FieldDescriptor::CPPTYPE_BOOL:
      return add ? set.AddBool(out, field, value.boolean) : set.SetBool(out, field, value.boolean);
    case FieldDescriptor::CPPTYPE_STRING:
      return add ? set.AddString(out, field, value.text) : set.SetString(out, field, value.text);
    default:
      SHOAL_CHECK(false) << field->full_name() << ": no configuration type";
  }
}

// The bounds of an integer type narrower than the Scalar's member.
std::string CheckWidth(const FieldDescriptor& field, const Scalar& value) {
  const bool is_int32 = field.cpp_type() == FieldDescriptor::CPPTYPE_INT32;
  const bool is_uint32 = field.cpp_type() == FieldDescriptor::CPPTYPE_UINT32;
  const bool fits = (!is_int32 || value.integer == static_cast<int32_t>(value.integer)) &&
                    (!is_uint32 || value.natural <= std::numeric_limits<uint32_t>::max());
  return fits ? "" : "does not fit 32 bits";
}

// Empty when the rule holds, otherwise what is wrong.
std::string CheckRule(const FieldDescriptor& field, const Scalar& value, const std::string& text) {
  const Rule& rule = RuleOf(field);
  if (rule.one_of_size() > 0) {
    const std::vector<std::string> allowed(rule.one_of().begin(), rule.one_of().end());
    for (const std::string& word : allowed) {
      if (word == value.text) return "";
    }
    return absl::StrCat("\"", value.text, "\" is not ", AllowedValues(rule), DidYouMean(value.text, allowed));
  }
  if (rule.has_min() && value.number < rule.min())
    return absl::StrCat(text, " is too small; ", AllowedValues(rule));
  if (rule.has_above() && value.number <= rule.above())
    return absl::StrCat(text, " is too small; ", AllowedValues(rule));
  if (rule.has_max() && value.number > rule.max())
    return absl::StrCat(text, " is too large; ", AllowedValues(rule));
  return "";
}

// Parses an integer or number whose kind is known to fit the field; empty when it is in range.
std::string ParseNumeric(const FieldDescriptor& field, const std::string& text, Scalar* value) {
  std::string digits = text;
  std::erase(digits, '_');
  const std::optional<double> number = ParseNumber(text);
  if (!number.has_value()) return absl::StrCat(text, " is out of range");
  value->number = *number;
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
    case FieldDescriptor::CPPTYPE_INT64:
      if (!absl::SimpleAtoi(digits, &value->integer)) return absl::StrCat(text, " does not fit 64 bits");
      break;
    case FieldDescriptor::CPPTYPE_UINT32:
    case FieldDescriptor::CPPTYPE_UINT64:
      if (*number < 0) return absl::StrCat(text, " is too small; at least 0");
      if (!absl::SimpleAtoi(digits, &value->natural)) return absl::StrCat(text, " does not fit 64 bits");
      break;
    default:
      return "";
  }
  const std::string width = CheckWidth(field, *value);
  return width.empty() ? "" : absl::StrCat(text, " ", width);
}

// Reads one document, or one override, into a message.
class Reader {
 public:
  Reader(const Descriptor& root, std::string_view source, bool is_override, KeyPositions* positions)
      : root_(root), source_(source), is_override_(is_override), positions_(positions) {}

  void ReadSection(const YAML::Node& node, const std::string& section, Message* out) {
    if (node.IsNull()) return;  // All of its keys are commented out.
    if (!node.IsMap()) {
      Fail(node, section,
           absl::StrCat("expected ", SomeKeys(*out->GetDescriptor()), "; found ", Describe(node)));
      return;
    }
    std::map<std::string, int> first_lines;
    for (const auto& item : node) {
      if (!item.first.IsScalar()) {
        Fail(item.first, section, "a key must be a word");
        continue;
      }
      const std::string& name = item.first.Scalar();
      const std::string path = JoinKey(section, name);
      const auto [first, inserted] = first_lines.emplace(name, item.first.Mark().line + 1);
      if (!inserted) {
        Fail(item.first, path, absl::StrCat("set twice, first in line ", first->second));
        continue;
      }
      const FieldDescriptor* field = out->GetDescriptor()->FindFieldByName(name);
      if (field == nullptr) {
        Fail(item.first, path, absl::StrCat("unknown key", SuggestKey(root_, section, name, Named::kFromSection)));
        continue;
      }
      if (positions_ != nullptr) positions_->Set(path, Where(item.first));
      ReadField(item.second, item.first, path, field, out);
    }
  }

  // `place` is where an error is reported when the value itself has no position (it is missing).
  void ReadField(const YAML::Node& node, const YAML::Node& place, const std::string& path,
                 const FieldDescriptor* field, Message* out) {
    if (IsSection(*field)) {
      SHOAL_CHECK(!field->is_repeated()) << field->full_name() << ": no configuration type";
      return ReadSection(node, path, out->GetReflection()->MutableMessage(out, field));
    }
    if (!field->is_repeated()) {
      if (const auto value = ParseScalar(node, place, path, *field)) Store(*value, field, out);
      return;
    }
    if (!node.IsSequence()) {
      const std::string example =
          node.IsScalar() && !node.IsNull() ? absl::StrCat("; write [", node.Scalar(), "]") : "";
      return Fail(node.IsNull() ? place : node, path,
                  absl::StrCat("expected a ", TypeName(*field), ", found ", Describe(node), example));
    }
    out->GetReflection()->ClearField(out, field);
    for (size_t i = 0; i < node.size(); ++i) {
      const YAML::Node element = node[i];
      const auto value = ParseScalar(element, place, absl::StrCat(path, "[", i, "]"), *field);
      if (value) Store(*value, field, out);
    }
  }

  ConfigErrors& errors() { return errors_; }

 private:
  std::string Where(const YAML::Node& node) const {
    if (is_override_) return source_;
    return absl::StrCat(source_, ":", node.Mark().line + 1, ":", node.Mark().column + 1);
  }

  void Fail(const YAML::Node& node, std::string_view path, std::string_view text) {
    errors_.Add(Where(node), path, text);
  }

  std::optional<Scalar> ParseScalar(const YAML::Node& node, const YAML::Node& place, const std::string& path,
                                    const FieldDescriptor& field) {
    const YAML::Node& at = node.IsNull() ? place : node;
    const ScalarKind kind = !node.IsScalar() ? ScalarKind::kNull
                            : !IsPlain(node) ? ScalarKind::kString
                                             : ClassifyPlain(node.Scalar());
    const std::string expected =
        absl::StrCat("expected ", Article(ValueTypeName(field)), ", found ", Describe(node));
    Scalar value;
    std::string wrong;
    switch (field.cpp_type()) {
      case FieldDescriptor::CPPTYPE_STRING:
        if (kind != ScalarKind::kString) {
          const std::string quotes =
              kind == ScalarKind::kNull ? "" : absl::StrCat("; write \"", node.Scalar(), "\"");
          wrong = expected + quotes;
        }
        value.text = node.IsScalar() ? node.Scalar() : "";
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        if (kind != ScalarKind::kBool) wrong = expected;
        value.boolean = node.IsScalar() && node.Scalar() == "true";
        break;
      default: {
        const bool number =
            field.cpp_type() == FieldDescriptor::CPPTYPE_DOUBLE && kind == ScalarKind::kNumber;
        wrong =
            number || kind == ScalarKind::kInteger ? ParseNumeric(field, node.Scalar(), &value) : expected;
      }
    }
    if (wrong.empty()) wrong = CheckRule(field, value, node.Scalar());
    if (wrong.empty()) return value;
    Fail(at, path, wrong);
    return std::nullopt;
  }

  static std::string Article(const std::string& type) {
    if (type == "true or false") return type;
    return absl::StrCat(type == "integer" ? "an " : "a ", type);
  }

  const Descriptor& root_;
  const std::string source_;
  const bool is_override_;
  KeyPositions* const positions_;
  ConfigErrors errors_;
};

absl::Status SyntaxError(std::string_view where, const YAML::Exception& error) {
  return absl::InvalidArgumentError(absl::StrCat(AbslSv(where), ": not YAML: ", error.msg));
}

// The message that holds the key, its field, or what is wrong with the path.
struct Target {
  Message* message = nullptr;
  const FieldDescriptor* field = nullptr;
  std::string wrong;
};

Target FindTarget(const std::string& path, Message* root) {
  Target target{.message = root};
  std::string section;
  const std::vector<std::string> names = absl::StrSplit(path, '.');
  for (size_t i = 0; i < names.size(); ++i) {
    target.field = target.message->GetDescriptor()->FindFieldByName(names[i]);
    if (target.field == nullptr) {
      target.wrong = absl::StrCat("unknown key", SuggestKey(*root->GetDescriptor(), section, names.back(), Named::kWhole));
      return target;
    }
    if (i + 1 == names.size()) return target;
    section = JoinKey(section, names[i]);
    if (!IsSection(*target.field)) {
      target.wrong = absl::StrCat(section, " is a value, not a section");
      return target;
    }
    target.message = target.message->GetReflection()->MutableMessage(target.message, target.field);
  }
  return target;
}

void FindMissing(const Message& message, const std::string& section, std::string_view file_name,
                 ConfigErrors* errors) {
  const Descriptor& descriptor = *message.GetDescriptor();
  const google::protobuf::Reflection& get = *message.GetReflection();
  for (int i = 0; i < descriptor.field_count(); ++i) {
    const FieldDescriptor& field = *descriptor.field(i);
    const std::string path = JoinKey(section, field.name());
    if (IsSection(field)) {
      FindMissing(get.GetMessage(message, &field), path, file_name, errors);
      continue;
    }
    const bool present =
        field.is_repeated() ? get.FieldSize(message, &field) > 0 : get.HasField(message, &field);
    if (RuleOf(field).required() && !present) errors->Add(file_name, path, "must be set, and has no default");
  }
}

void AppendYaml(const Message& message, const std::string& indent, std::string* out) {
  const Descriptor& descriptor = *message.GetDescriptor();
  const google::protobuf::Reflection& get = *message.GetReflection();
  for (int i = 0; i < descriptor.field_count(); ++i) {
    const FieldDescriptor& field = *descriptor.field(i);
    if (IsSection(field)) {
      absl::StrAppend(out, indent, field.name(), ":\n");
      AppendYaml(get.GetMessage(message, &field), indent + "  ", out);
      continue;
    }
    std::string value;
    if (field.is_repeated()) {
      std::vector<std::string> elements;
      for (int j = 0; j < get.FieldSize(message, &field); ++j)
        elements.push_back(FormatScalar(message, field, j));
      value = absl::StrCat("[", absl::StrJoin(elements, ", "), "]");
    } else {
      value = FormatScalar(message, field, -1);
    }
    absl::StrAppend(out, indent, field.name(), ": ", value, "\n");
  }
}

}  // namespace

absl::Status LoadYaml(std::string_view text, std::string_view file_name, Message* out,
                      KeyPositions* positions) {
  try {
    const std::vector<YAML::Node> documents = YAML::LoadAll(std::string(text));
    if (documents.size() > 1) {
      return absl::InvalidArgumentError(absl::StrCat(AbslSv(file_name), ": holds ", documents.size(),
                                                     " YAML documents (separated by ---); expected one"));
    }
    Reader reader(*out->GetDescriptor(), file_name, /*is_override=*/false, positions);
    if (!documents.empty()) reader.ReadSection(documents[0], "", out);
    return reader.errors().ToStatus();
  } catch (const YAML::Exception& error) {
    const std::string position =
        error.mark.is_null() ? "" : absl::StrCat(":", error.mark.line + 1, ":", error.mark.column + 1);
    return SyntaxError(absl::StrCat(AbslSv(file_name), position), error);
  }
}

absl::Status ApplyOverride(std::string_view override_text, Message* out, KeyPositions* positions) {
  const std::string where = absl::StrCat("--set ", AbslSv(override_text));
  const size_t equals = override_text.find('=');
  if (equals == std::string_view::npos || equals == 0) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": expected key.path=value"));
  }
  const std::string path(override_text.substr(0, equals));
  const std::string text(override_text.substr(equals + 1));
  Reader reader(*out->GetDescriptor(), where, /*is_override=*/true, positions);
  const Target target = FindTarget(path, out);
  if (!target.wrong.empty()) {
    reader.errors().Add(where, path, target.wrong);
    return reader.errors().ToStatus();
  }
  // The shell has taken the quotes of a string, so that its text is taken as it is: data.path=a: b#c.
  const bool is_string =
      target.field->cpp_type() == FieldDescriptor::CPPTYPE_STRING && !target.field->is_repeated();
  const bool is_quoted = !text.empty() && (text[0] == '"' || text[0] == '\'');
  try {
    YAML::Node value;
    if (is_string && !is_quoted) {
      value = YAML::Node(text);
      value.SetTag("!");
    } else {
      value = YAML::Load(text);
    }
    if (positions != nullptr) positions->Set(path, where);
    reader.ReadField(value, value, path, target.field, target.message);
    return reader.errors().ToStatus();
  } catch (const YAML::Exception& error) {
    return SyntaxError(where, error);
  }
}

absl::Status CheckRequired(const Message& message, std::string_view file_name) {
  ConfigErrors errors;
  FindMissing(message, "", file_name, &errors);
  return errors.ToStatus();
}

std::string ToYaml(const Message& message) {
  std::string text;
  AppendYaml(message, "", &text);
  return text;
}

}  // namespace shoal
