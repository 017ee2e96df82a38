// What the parts of this folder share about a field of a schema.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"
#include "runtime/config/rule.pb.h"

namespace shoal {

// The field's rule; an empty one when it has none.
const Rule& RuleOf(const google::protobuf::FieldDescriptor& field);

// The type of a value, of an element when the field is repeated: "integer", "number", "true or false",
// "string".
std::string ValueTypeName(const google::protobuf::FieldDescriptor& field);

// As ValueTypeName, or "list of integers" and so on.
std::string TypeName(const google::protobuf::FieldDescriptor& field);

// What the rule allows: "at least 1", "above 0", "from 0 to 0.9", "one of hf, switch, none". Empty: anything.
std::string AllowedValues(const Rule& rule);

// What a scalar without quotes is.
enum class ScalarKind : uint8_t { kNull, kBool, kInteger, kNumber, kString };
ScalarKind ClassifyPlain(std::string_view text);

// A finite decimal number, underscores between digits allowed.
std::optional<double> ParseNumber(std::string_view text);

// The shortest text that reads back as the same number.
std::string FormatNumber(double value);

// `text` as YAML reads it back as a string: plain where that is safe, otherwise in double quotes.
std::string YamlString(std::string_view text);

// The value as YAML. `index` is -1 for a singular field, otherwise the element of a repeated one.
std::string FormatScalar(const google::protobuf::Message& message,
                         const google::protobuf::FieldDescriptor& field, int index);

}  // namespace shoal
