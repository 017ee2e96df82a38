// Counter-based random numbers for data: pure functions, the same on every machine.
#pragma once

#include <cstdint>

namespace shoal {

// The output function of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
// 2014): the `index`-th output of the generator with this seed. A bijection of `seed` for a fixed index.
constexpr uint64_t SplitMix64(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// A pseudo-random permutation of [0, size), in O(1) memory and O(1) expected time per look-up: a Feistel
// network over the next power of four (Luby, Rackoff: How to construct pseudorandom permutations, 1988),
// walked along its cycle until it falls into the range (Black, Rogaway: Ciphers with arbitrary finite
// domains, 2002), fewer than four steps on average.
class Permutation {
 public:
  // `size` from 1 to 2^62.
  Permutation(uint64_t size, uint64_t key) : size_(size), key_(key) {
    while ((uint64_t{1} << (2 * half_bits_)) < size_) ++half_bits_;
  }

  uint64_t size() const { return size_; }

  // Where `index` (below size()) goes.
  uint64_t At(uint64_t index) const {
    do {
      index = Encrypt(index);
    } while (index >= size_);
    return index;
  }

 private:
  // Four rounds suffice for ideal round functions; the short halves of small ranges are why there are more.
  static constexpr int kRounds = 8;

  uint64_t Encrypt(uint64_t block) const {
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
    uint64_t left = block >> half_bits_;
    uint64_t right = block & mask;
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t mixed = SplitMix64(SplitMix64(key_, round) ^ right, 0) >> 32;
      const uint64_t next = left ^ (mixed & mask);
      left = right;
      right = next;
    }
    return left << half_bits_ | right;
  }

  uint64_t size_;
  uint64_t key_;
  int half_bits_ = 1;
};

}  // namespace shoal
