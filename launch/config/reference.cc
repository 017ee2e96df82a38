#include "runtime/config/reference.h"

#include "absl/strings/str_cat.h"
#include "launch/config/config.h"
#include "runtime/base/check.h"

// The descriptor set of config.proto, comments included, which the generated code lacks.
asm(".pushsection .rodata,\"a\"\n"
    ".global shoal_config_schema_begin\n"
    ".global shoal_config_schema_end\n"
    "shoal_config_schema_begin: .incbin \"" SHOAL_CONFIG_SCHEMA
    "\"\n"
    "shoal_config_schema_end:\n"
    ".popsection\n");
extern "C" const char shoal_config_schema_begin[];
extern "C" const char shoal_config_schema_end[];

namespace shoal {
namespace {

constexpr char kIntroduction[] = R"(# Configuration

Every key of a configuration file. This page is generated from the comments of `launch/config/config.proto` by
`./shoal config reference`; change them there.

A file is YAML with a section for each heading below. Keys that are left out have their defaults. `--set section.key=value`
after `./shoal train CONFIG` changes a key from the command line, by the same rules. Numbers may have underscores (`1_000_000`);
types are strict: a string that looks like a number needs quotes.

```yaml
model:
  hidden_size: 192
  dense_layers: [0]
train:
  steps: 2_000
  precision: bf16
```

`./shoal config show CONFIG` prints a configuration in full, defaults included and derived values filled in;
`./shoal config check CONFIG --ranks N` says whether it can be trained on N ranks.
)";

}  // namespace

std::string ConfigReference() {
  google::protobuf::FileDescriptorSet schema;
  const int size = static_cast<int>(shoal_config_schema_end - shoal_config_schema_begin);
  SHOAL_CHECK(schema.ParseFromArray(shoal_config_schema_begin, size))
      << "the schema in this program is damaged";
  return absl::StrCat(kIntroduction, ReferenceMarkdown(schema, Config::descriptor()->full_name()));
}

}  // namespace shoal
