#include "runtime/config/reference.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/dynamic_message.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "runtime/config/schema.h"

namespace shoal {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;

// The comment as Markdown: outside of `code`, < would open a tag.
std::string Comment(const FieldDescriptor& field) {
  google::protobuf::SourceLocation location;
  SHOAL_CHECK(field.GetSourceLocation(&location))
      << field.full_name() << ": the schema has no source comments";
  std::string text;
  for (const auto line : absl::StrSplit(location.leading_comments, '\n', absl::SkipWhitespace())) {
    absl::StrAppend(&text, absl::StripAsciiWhitespace(line), "\n");
  }
  std::string escaped;
  bool code = false;
  for (const char c : text) {
    if (c == '`') code = !code;
    absl::StrAppend(&escaped, c == '<' && !code ? "&lt;" : std::string(1, c));
  }
  return escaped;
}

void AppendKey(const std::string& path, const FieldDescriptor& field, const std::string& default_value,
               std::string* page) {
  const Rule& rule = RuleOf(field);
  absl::StrAppend(page, "\n### `", path, "`\n\n", TypeName(field));
  if (!rule.unit().empty()) absl::StrAppend(page, ", in ", rule.unit());
  absl::StrAppend(page, rule.required() ? " · required" : absl::StrCat(" · default `", default_value, "`"));
  const std::string allowed = AllowedValues(rule);
  if (!allowed.empty()) absl::StrAppend(page, " · ", allowed);
  absl::StrAppend(page, "\n\n", Comment(field));
}

void AppendSection(const std::string& path, const Descriptor& descriptor,
                   google::protobuf::DynamicMessageFactory* factory, std::string* page) {
  const google::protobuf::Message& defaults = *factory->GetPrototype(&descriptor);
  for (int i = 0; i < descriptor.field_count(); ++i) {
    const FieldDescriptor& field = *descriptor.field(i);
    const std::string key = path.empty() ? field.name() : absl::StrCat(path, ".", field.name());
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      absl::StrAppend(page, "\n## ", key, "\n\n", Comment(field));
      AppendSection(key, *field.message_type(), factory, page);
    } else {
      AppendKey(key, field, field.is_repeated() ? "[]" : FormatScalar(defaults, field, -1), page);
    }
  }
}

}  // namespace

std::string ReferenceMarkdown(const google::protobuf::FileDescriptorSet& schema,
                              std::string_view root_message) {
  google::protobuf::DescriptorPool pool;
  for (const google::protobuf::FileDescriptorProto& file : schema.file()) {
    SHOAL_CHECK(pool.BuildFile(file) != nullptr) << file.name() << ": the schema lacks an import";
  }
  const Descriptor* root = pool.FindMessageTypeByName(std::string(root_message));
  SHOAL_CHECK(root != nullptr) << root_message << ": not in the schema";
  google::protobuf::DynamicMessageFactory factory(&pool);
  std::string page;
  AppendSection("", *root, &factory, &page);
  return page;
}

}  // namespace shoal
