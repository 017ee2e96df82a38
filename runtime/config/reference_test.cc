#include "runtime/config/reference.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "google/protobuf/descriptor.h"
#include "runtime/config/rule.pb.h"
#include "runtime/config/testing.pb.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// The compiled-in schema has no comments; this one gets a comment on each key.
google::protobuf::FileDescriptorSet Schema() {
  google::protobuf::FileDescriptorSet schema;
  google::protobuf::DescriptorProto::descriptor()->file()->CopyTo(schema.add_file());
  Rule::descriptor()->file()->CopyTo(schema.add_file());
  google::protobuf::FileDescriptorProto& boat = *schema.add_file();
  testing::Boat::descriptor()->file()->CopyTo(&boat);
  for (int m = 0; m < boat.message_type_size(); ++m) {
    for (int f = 0; f < boat.message_type(m).field_size(); ++f) {
      auto& location = *boat.mutable_source_code_info()->add_location();
      for (const int step : {4, m, 2, f}) location.add_path(step);
      for (const int mark : {0, 0, 1}) location.add_span(mark);
      location.set_leading_comments(" About <" + boat.message_type(m).field(f).name() +
                                    "> and `<code>`.\n Second.\n");
    }
  }
  return schema;
}

TEST(ReferenceMarkdown, HasEveryKeyWithTypeDefaultRuleUnitAndComment) {
  const std::string page = ReferenceMarkdown(Schema(), "shoal.testing.Boat");
  EXPECT_THAT(page,
              HasSubstr("\n### `name`\n\nstring · required\n\nAbout &lt;name> and `<code>`.\nSecond.\n"));
  EXPECT_THAT(page, HasSubstr("\n## hull\n\nAbout &lt;hull>"));
  EXPECT_THAT(page, HasSubstr("\n### `hull.length`\n\nnumber, in metres · default `7.5` · above 0\n"));
  EXPECT_THAT(page, HasSubstr("\n### `hull.num_sleeping_cabins`\n\ninteger · default `1` · from 0 to 40\n"));
  EXPECT_THAT(page, HasSubstr("\n### `hull.material`\n\nstring · default `wood` · one of wood, steel\n"));
  EXPECT_THAT(page, HasSubstr("\n### `hull.doors`\n\nlist of integers · default `[]`\n"));
  EXPECT_THAT(page, HasSubstr("\n### `engine.present`\n\ntrue or false · default `true`\n"));
  EXPECT_THAT(page, Not(HasSubstr("Rule")));
}

}  // namespace
}  // namespace shoal
