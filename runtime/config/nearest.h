// The nearest known word to a misspelt one, for "did you mean" in errors about keys, flags, commands and
// files.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace shoal {

// Insertions, deletions, substitutions and swaps of neighbours that turn `a` into `b`.
int EditDistance(std::string_view a, std::string_view b);

// How far `candidate` is from the misspelt `word`: 0 for equal words, -1 when nobody would call them alike.
// Words of which one lists a part of the other's underscore-separated parts are alike: num_experts and
// num_local_experts.
int Unlikeness(std::string_view word, std::string_view candidate);

// The most alike candidate, the first among equals; empty when none is alike.
std::string Nearest(std::string_view word, const std::vector<std::string>& candidates);

// "; did you mean X?", or empty when no candidate is alike.
std::string DidYouMean(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace shoal
