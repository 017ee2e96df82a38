// The reference page of a configuration schema.
#pragma once

#include <string>
#include <string_view>

#include "google/protobuf/descriptor.pb.h"

namespace shoal {

// Markdown: a section for each message field of `root_message` (its full name), and below it each key with
// type, default, allowed values, unit and the comment above it in the schema. `schema` has all imports and
// source comments (protoc
// --include_imports --include_source_info). Our own mistake, and a failed check, if it has not.
std::string ReferenceMarkdown(const google::protobuf::FileDescriptorSet& schema,
                              std::string_view root_message);

}  // namespace shoal
