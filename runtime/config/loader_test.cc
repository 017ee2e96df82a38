#include "runtime/config/loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "google/protobuf/util/message_differencer.h"
#include "runtime/config/testing.pb.h"

namespace shoal {
namespace {

using testing::Boat;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

std::string LoadError(std::string_view text) {
  Boat boat;
  const absl::Status status = LoadYaml(text, "b.yaml", &boat, /*positions=*/nullptr);
  EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
  return std::string(status.message());
}

std::string OverrideError(std::string_view text) {
  Boat boat;
  const absl::Status status = ApplyOverride(text, &boat, /*positions=*/nullptr);
  EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
  return std::string(status.message());
}

TEST(LoadYaml, FillsEveryKindOfKey) {
  Boat boat;
  KeyPositions positions;
  const absl::Status status = LoadYaml(R"(# A boat.
name: "12"
hull:
  length: 1e-3
  num_sleeping_cabins: +1_0
  material: steel
  doors: [1, -2]
  decks:
    - upper
    - 'true'
engine:
  present: false
  serial: 18446744073709551615
  cylinders: 4294967295
)",
                                       "b.yaml", &boat, &positions);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(boat.name(), "12");
  EXPECT_EQ(boat.hull().length(), 1e-3);
  EXPECT_EQ(boat.hull().num_sleeping_cabins(), 10);
  EXPECT_EQ(boat.hull().material(), "steel");
  EXPECT_THAT(boat.hull().doors(), ::testing::ElementsAre(1, -2));
  EXPECT_THAT(boat.hull().decks(), ::testing::ElementsAre("upper", "true"));
  EXPECT_FALSE(boat.engine().present());
  EXPECT_EQ(boat.engine().serial(), 18446744073709551615u);
  EXPECT_EQ(boat.engine().cylinders(), 4294967295u);
  EXPECT_EQ(positions.Where("hull.length"), "b.yaml:4:3");
  EXPECT_EQ(positions.Where("hull.decks"), "b.yaml:8:3");
  EXPECT_EQ(positions.Where("engine.hours"), "");
  EXPECT_EQ(positions.Mention("name", "12"), "name = 12 (b.yaml:2:1)");
  EXPECT_EQ(positions.Mention("engine.hours", "0"), "engine.hours = 0 (default)");
}

TEST(LoadYaml, TakesIntegersForNumbers) {
  Boat boat;
  ASSERT_TRUE(LoadYaml("hull: {length: 1_000}", "b.yaml", &boat, nullptr).ok());
  EXPECT_EQ(boat.hull().length(), 1000);
}

TEST(LoadYaml, TakesEmptyFilesAndSections) {
  EXPECT_EQ(LoadError(""), "");
  EXPECT_EQ(LoadError("# nothing\n"), "");
  EXPECT_EQ(LoadError("hull:\n  # length: 3\nengine:\n"), "");
}

TEST(LoadYaml, KeepsWhatTheTextDoesNotName) {
  Boat boat;
  ASSERT_TRUE(LoadYaml("hull: {length: 3, doors: [1]}", "b.yaml", &boat, nullptr).ok());
  ASSERT_TRUE(LoadYaml("hull: {doors: [2]}", "b.yaml", &boat, nullptr).ok());
  EXPECT_EQ(boat.hull().length(), 3);
  EXPECT_THAT(boat.hull().doors(), ::testing::ElementsAre(2));
}

TEST(LoadYaml, NamesTheNearestKey) {
  EXPECT_EQ(LoadError("hull:\n  lenght: 3\n"), "b.yaml:2:3: hull.lenght: unknown key; did you mean length?");
  EXPECT_EQ(LoadError("hull:\n  num_cabins: 3\n"),
            "b.yaml:2:3: hull.num_cabins: unknown key; did you mean num_sleeping_cabins?");
  EXPECT_EQ(LoadError("hull:\n  serial: 3\n"),
            "b.yaml:2:3: hull.serial: unknown key; did you mean engine.serial?");
  EXPECT_EQ(LoadError("length: 3\n"), "b.yaml:1:1: length: unknown key; did you mean hull.length?");
  EXPECT_EQ(LoadError("hul: {}\n"), "b.yaml:1:1: hul: unknown key; did you mean hull?");
  EXPECT_EQ(LoadError("zzzz: {}\n"), "b.yaml:1:1: zzzz: unknown key");
}

TEST(LoadYaml, SaysWhichTypeIsExpected) {
  EXPECT_EQ(LoadError("hull:\n  num_sleeping_cabins: yes\n"),
            "b.yaml:2:24: hull.num_sleeping_cabins: expected an integer, found the string \"yes\"");
  EXPECT_THAT(LoadError("hull: {num_sleeping_cabins: 1.5}"),
              EndsWith("expected an integer, found the number 1.5"));
  EXPECT_THAT(LoadError("hull: {num_sleeping_cabins: '1'}"),
              EndsWith("expected an integer, found the string \"1\""));
  EXPECT_THAT(LoadError("hull: {num_sleeping_cabins: [1]}"), EndsWith("expected an integer, found a list"));
  EXPECT_EQ(LoadError("hull:\n  num_sleeping_cabins:\n"),
            "b.yaml:2:3: hull.num_sleeping_cabins: expected an integer, found nothing");
  EXPECT_THAT(LoadError("hull: {length: long}"), EndsWith("expected a number, found the string \"long\""));
  EXPECT_THAT(LoadError("hull: {length: .nan}"), HasSubstr("expected a number"));
  EXPECT_THAT(LoadError("hull: {length: inf}"), HasSubstr("expected a number"));
  EXPECT_THAT(LoadError("hull: {length: 0x1p3}"), HasSubstr("expected a number"));
  EXPECT_THAT(LoadError("hull: {length: 1e999}"), HasSubstr("expected a number"));
  EXPECT_THAT(LoadError("engine: {present: yes}"),
              EndsWith("expected true or false, found the string \"yes\""));
  EXPECT_THAT(LoadError("engine: {present: 1}"), EndsWith("expected true or false, found the integer 1"));
  EXPECT_THAT(LoadError("name: 12"), EndsWith("name: expected a string, found the integer 12; write \"12\""));
  EXPECT_THAT(LoadError("name: {a: 1}"), EndsWith("name: expected a string, found a section"));
  EXPECT_THAT(LoadError("hull: 3"),
              EndsWith("hull: expected keys such as length, num_sleeping_cabins, material; "
                       "found the integer 3"));
  EXPECT_THAT(LoadError("hull: {doors: 3}"),
              EndsWith("expected a list of integers, found the integer 3; write [3]"));
  EXPECT_EQ(LoadError("hull: {doors: [1, x]}"),
            "b.yaml:1:19: hull.doors[1]: expected an integer, found the string \"x\"");
  EXPECT_THAT(LoadError("- 1"),
              EndsWith("b.yaml:1:1: expected keys such as name, hull, engine; found a list"));
  EXPECT_THAT(LoadError("? [a]\n: 1"), HasSubstr("a key must be a word"));
}

TEST(LoadYaml, ChecksRanges) {
  EXPECT_EQ(LoadError("hull:\n  length: 0\n"), "b.yaml:2:11: hull.length: 0 is too small; above 0");
  EXPECT_THAT(LoadError("hull: {num_sleeping_cabins: -1}"), EndsWith("-1 is too small; from 0 to 40"));
  EXPECT_THAT(LoadError("hull: {num_sleeping_cabins: 41}"), EndsWith("41 is too large; from 0 to 40"));
  EXPECT_THAT(LoadError("hull: {num_sleeping_cabins: 4294967297}"),
              EndsWith("4294967297 does not fit 32 bits"));
  EXPECT_THAT(LoadError("hull: {doors: [9223372036854775808]}"), EndsWith("does not fit 64 bits"));
  EXPECT_THAT(LoadError("engine: {serial: -1}"), EndsWith("-1 is too small; at least 0"));
  EXPECT_THAT(LoadError("engine: {serial: 18446744073709551616}"), EndsWith("does not fit 64 bits"));
  EXPECT_THAT(LoadError("engine: {cylinders: 4294967296}"), EndsWith("does not fit 32 bits"));
  EXPECT_THAT(LoadError("engine: {hours: 0}"), EndsWith("0 is too small; at least 1"));
  EXPECT_THAT(LoadError("hull: {material: steal}"),
              EndsWith("hull.material: \"steal\" is not one of wood, steel; did you mean steel?"));
}

TEST(LoadYaml, RefusesDuplicateKeys) {
  EXPECT_EQ(LoadError("name: a\nhull:\n  length: 1\n  length: 2\n"),
            "b.yaml:4:3: hull.length: set twice, first in line 3");
  EXPECT_EQ(LoadError("hull: {}\nname: a\nhull: {}\n"), "b.yaml:3:1: hull: set twice, first in line 1");
}

TEST(LoadYaml, ReportsUpToTenErrors) {
  EXPECT_EQ(LoadError("name: 1\nhull: {length: x}\n"),
            "b.yaml:1:7: name: expected a string, found the integer 1; write \"1\"\n"
            "b.yaml:2:16: hull.length: expected a number, found the string \"x\"");
  std::string text = "hull:\n  doors: [";
  for (int i = 0; i < 12; ++i) text += "x, ";
  const std::string error = LoadError(text + "x]");
  EXPECT_THAT(error, HasSubstr("hull.doors[9]"));
  EXPECT_THAT(error, Not(HasSubstr("hull.doors[10]")));
  EXPECT_THAT(error, EndsWith("\n... and 3 more"));
}

TEST(LoadYaml, NamesThePlaceOfSyntaxErrors) {
  EXPECT_THAT(LoadError("name: a\nhull: [\n"), HasSubstr("b.yaml:3:1: not YAML: "));
  EXPECT_THAT(LoadError("name: a\n\tb: c\n"), HasSubstr("b.yaml:2:"));
  EXPECT_THAT(LoadError("name: *nowhere\n"), HasSubstr("b.yaml:1:"));
  EXPECT_THAT(LoadError("name: a\n---\nname: b\n"), HasSubstr("holds 2 YAML documents"));
  EXPECT_THAT(LoadError("hull: &h\n  hull: *h\n"), HasSubstr("unknown key"));
  EXPECT_NE(LoadError(std::string(100000, '[')), "");
}

TEST(ApplyOverride, SetsOneKey) {
  Boat boat;
  KeyPositions positions;
  ASSERT_TRUE(ApplyOverride("hull.length=2.5", &boat, &positions).ok());
  ASSERT_TRUE(ApplyOverride("hull.doors=[3, 4]", &boat, &positions).ok());
  ASSERT_TRUE(ApplyOverride("hull.decks=[a, b]", &boat, &positions).ok());
  ASSERT_TRUE(ApplyOverride("engine={present: false}", &boat, &positions).ok());
  EXPECT_EQ(boat.hull().length(), 2.5);
  EXPECT_THAT(boat.hull().doors(), ::testing::ElementsAre(3, 4));
  EXPECT_THAT(boat.hull().decks(), ::testing::ElementsAre("a", "b"));
  EXPECT_FALSE(boat.engine().present());
  EXPECT_EQ(positions.Where("hull.length"), "--set hull.length=2.5");
}

TEST(ApplyOverride, TakesStringsAsTheyAre) {
  Boat boat;
  for (const std::string text : {"a: b #c", "12", "true", "", "x=y", "[1]"}) {
    ASSERT_TRUE(ApplyOverride("name=" + text, &boat, nullptr).ok()) << text;
    EXPECT_EQ(boat.name(), text);
  }
  ASSERT_TRUE(ApplyOverride("name=\"a\\tb\"", &boat, nullptr).ok());
  EXPECT_EQ(boat.name(), "a\tb");
}

TEST(ApplyOverride, ObeysTheSameChecks) {
  EXPECT_EQ(OverrideError("hull.lenght=3"), "--set hull.lenght=3: unknown key; did you mean hull.length?");
  EXPECT_EQ(OverrideError("length=3"), "--set length=3: unknown key; did you mean hull.length?");
  EXPECT_EQ(OverrideError("hul.length=3"), "--set hul.length=3: unknown key; did you mean hull.length?");
  EXPECT_EQ(OverrideError("name.x=3"), "--set name.x=3: name is a value, not a section");
  EXPECT_EQ(OverrideError("hull.length=long"),
            "--set hull.length=long: expected a number, found the string \"long\"");
  EXPECT_EQ(OverrideError("hull.length="), "--set hull.length=: expected a number, found nothing");
  EXPECT_EQ(OverrideError("hull.length=-1"), "--set hull.length=-1: -1 is too small; above 0");
  EXPECT_EQ(OverrideError("hull={length: 0}"),
            "--set hull={length: 0}: hull.length: 0 is too small; above 0");
  EXPECT_EQ(OverrideError("hull.material=gold"),
            "--set hull.material=gold: \"gold\" is not one of wood, steel");
  EXPECT_EQ(OverrideError("hull.length"), "--set hull.length: expected key.path=value");
  EXPECT_EQ(OverrideError("=3"), "--set =3: expected key.path=value");
  EXPECT_THAT(OverrideError("hull.doors=[1"), HasSubstr("--set hull.doors=[1: not YAML"));
  EXPECT_THAT(OverrideError(".=1"), HasSubstr("unknown key"));
}

TEST(CheckRequired, NamesMissingKeys) {
  Boat boat;
  EXPECT_EQ(CheckRequired(boat, "b.yaml").message(), "b.yaml: name: must be set, and has no default");
  boat.set_name("x");
  EXPECT_TRUE(CheckRequired(boat, "b.yaml").ok());
}

TEST(ToYaml, IsCompleteAndReadsBackEqual) {
  EXPECT_EQ(ToYaml(Boat()),
            "name: \"\"\nhull:\n  length: 7.5\n  num_sleeping_cabins: 1\n  material: wood\n  doors: []\n  "
            "decks: []\n"
            "engine:\n  present: true\n  serial: 0\n  cylinders: 0\n  hours: 0\n");
  for (const std::string name : {"",
                                 "a b",
                                 "true",
                                 "null",
                                 "~",
                                 "12",
                                 "1e3",
                                 "a\"b\\c",
                                 "line\nbreak",
                                 "\x01\x7f",
                                 "# x",
                                 "x: y",
                                 "- a",
                                 "ünï",
                                 "*a",
                                 "/abs/path-1.txt",
                                 " pad ",
                                 "0x10",
                                 "'",
                                 "runs"}) {
    Boat boat;
    boat.set_name(name);
    boat.mutable_hull()->set_length(0.1 + 0.2);
    boat.mutable_hull()->add_doors(-5);
    boat.mutable_hull()->add_decks(name);
    boat.mutable_hull()->add_decks("b, c]");
    boat.mutable_engine()->set_serial(18446744073709551615u);
    boat.mutable_engine()->set_hours(1);
    Boat again;
    const absl::Status status = LoadYaml(ToYaml(boat), "again", &again, nullptr);
    ASSERT_TRUE(status.ok()) << status << ToYaml(boat);
    EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equivalent(boat, again)) << ToYaml(boat);
    EXPECT_EQ(ToYaml(again), ToYaml(boat));
  }
}

}  // namespace
}  // namespace shoal
