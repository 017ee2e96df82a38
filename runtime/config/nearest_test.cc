#include "runtime/config/nearest.h"

#include <gtest/gtest.h>

namespace shoal {
namespace {

TEST(EditDistance, CountsEditsAndSwaps) {
  EXPECT_EQ(EditDistance("", ""), 0);
  EXPECT_EQ(EditDistance("", "abc"), 3);
  EXPECT_EQ(EditDistance("hiden_size", "hidden_size"), 1);
  EXPECT_EQ(EditDistance("stpes", "steps"), 1);
  EXPECT_EQ(EditDistance("kitten", "sitting"), 3);
  EXPECT_EQ(EditDistance("ca", "abc"), 3);
}

TEST(Nearest, FindsMisspeltAndShortenedWords) {
  const std::vector<std::string> keys = {"num_hidden_layers", "num_local_experts", "num_experts_per_tok",
                                         "lr"};
  EXPECT_EQ(Nearest("num_hiden_layer", keys), "num_hidden_layers");
  EXPECT_EQ(Nearest("num_layers", keys), "num_hidden_layers");
  EXPECT_EQ(Nearest("num_experts", keys), "num_local_experts");
  EXPECT_EQ(Nearest("LR", keys), "lr");
  EXPECT_EQ(Nearest("colour", keys), "");
  EXPECT_EQ(Nearest("", keys), "");
  EXPECT_EQ(Nearest("x", {}), "");
}

TEST(Nearest, PrefersTheFirstOfEquals) { EXPECT_EQ(Nearest("bat", {"cat", "hat"}), "cat"); }

TEST(Nearest, IgnoresVeryLongWords) { EXPECT_EQ(Nearest(std::string(1 << 20, 'a'), {"a"}), ""); }

TEST(DidYouMean, IsEmptyOrAQuestion) {
  EXPECT_EQ(DidYouMean("trian", {"train", "help"}), "; did you mean train?");
  EXPECT_EQ(DidYouMean("zzz", {"train", "help"}), "");
}

}  // namespace
}  // namespace shoal
