// Configuration messages from YAML and back. Hides yaml-cpp and protobuf reflection: any proto2 message made
// of messages, scalars and lists of scalars will do. Keys are field names, messages are maps, repeated
// scalars are lists; the Rule option (rule.proto) of a field is checked.
//
// Types are strict: "yes" is no number and 12 no string. Integers may have underscores (1_000_000); numbers
// are finite.
//
// Errors are INVALID_ARGUMENT and name all mistakes found, up to ten, one a line:
//   configs/a.yaml:12:5: model.hiden_size: unknown key; did you mean hidden_size?
// After an error the message holds something between the old and the new. Not thread-safe on one message.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "google/protobuf/message.h"
#include "runtime/config/errors.h"

namespace shoal {

// Merges `text` into `out`; keys that it does not name keep their values. `file_name` is for errors and
// positions only. `positions` may be null; otherwise each key that is set is noted.
absl::Status LoadYaml(std::string_view text, std::string_view file_name, google::protobuf::Message* out,
                      KeyPositions* positions);

// Sets one key from "key.path=value", the value written as in YAML; strings need no quotes. A list replaces
// the list.
absl::Status ApplyOverride(std::string_view override_text, google::protobuf::Message* out,
                           KeyPositions* positions);

// INVALID_ARGUMENT naming the keys that their rule requires and that neither `file_name` nor an override has
// set.
absl::Status CheckRequired(const google::protobuf::Message& message, std::string_view file_name);

// Every key in the order of the schema, defaults included. LoadYaml of the result gives an equal message.
std::string ToYaml(const google::protobuf::Message& message);

}  // namespace shoal
