// How far results are determined.
#pragma once

#include <cstdint>

namespace shoal {

enum class Numerics : uint8_t {
  kFast,  // Work is cut and ordered as suits the moment: results agree to rounding.
  // What is computed of the rows that one rank has for one expert has the same bits wherever and beside what it is computed, and
  // sums over ranks are taken in rank order: results do not depend on where experts are.
  kPinned,
};

}  // namespace shoal
