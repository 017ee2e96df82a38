// Compiled for the very machine that it is built on.
#include "tests/bench/fused_pass.h"

#include <array>
#include <cstring>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace shoal {
namespace {

typedef float Line __attribute__((vector_size(64)));
constexpr int64_t kLineElements = 64 / sizeof(float);
constexpr int64_t kPageElements = 4096 / sizeof(float);
constexpr int kPages = 4;

inline Line Load(const float* from) {
  Line line;
  std::memcpy(&line, from, sizeof line);
  return line;
}

template <bool kStreaming>
inline void Store(float* to, const Line& line) {
#if defined(__AVX512F__)
  if (kStreaming) return _mm512_stream_ps(to, reinterpret_cast<const __m512&>(line));
#elif defined(__AVX__)
  if (kStreaming) {
    const auto* halves = reinterpret_cast<const __m256*>(&line);
    _mm256_stream_ps(to, halves[0]);
    return _mm256_stream_ps(to + 8, halves[1]);
  }
#endif
  std::memcpy(to, &line, sizeof line);
}

template <int kFrom, int kTo, bool kStreaming>
inline void RunLine(const FusedPass& pass, int64_t i) {
  Line sum = Load(pass.from[0] + i);
#pragma GCC unroll 8
  for (int k = 1; k < kFrom; ++k) sum += Load(pass.from[k] + i);
#pragma GCC unroll 8
  for (int k = 0; k < kTo; ++k) Store<kStreaming>(pass.to[k] + i, sum);
}

template <int kFrom, int kTo, bool kStreaming>
void Run(const FusedPass& pass) {
  int64_t i = 0;
  // A copy, several pages in turn: more of the memory's banks are busy than with one.
  constexpr bool kInTurn = kStreaming && kFrom == 1 && kTo == 1;
  for (; kInTurn && i + kPages * kPageElements <= pass.elements; i += kPages * kPageElements) {
    for (int64_t at = i; at < i + kPageElements; at += kLineElements) {
#pragma GCC unroll 8
      for (int page = 0; page < kPages; ++page)
        RunLine<kFrom, kTo, kStreaming>(pass, at + page * kPageElements);
    }
  }
  for (; i + kLineElements <= pass.elements; i += kLineElements) RunLine<kFrom, kTo, kStreaming>(pass, i);
  for (; i < pass.elements; ++i) {
    float sum = pass.from[0][i];
    for (int k = 1; k < kFrom; ++k) sum += pass.from[k][i];
    for (int k = 0; k < kTo; ++k) pass.to[k][i] = sum;
  }
#ifdef __x86_64__
  if (kStreaming) _mm_sfence();
#endif
}

// By the number of `from` and `to` arrays, each from 1 to kFusedMax.
template <bool kStreaming, size_t... kIndex>
constexpr auto MakeTable(std::index_sequence<kIndex...>) {
  return std::array<void (*)(const FusedPass&), sizeof...(kIndex)>{
      Run<kIndex / kFusedMax + 1, kIndex % kFusedMax + 1, kStreaming>...};
}
constexpr auto kCached = MakeTable<false>(std::make_index_sequence<kFusedMax * kFusedMax>());
constexpr auto kStreamed = MakeTable<true>(std::make_index_sequence<kFusedMax * kFusedMax>());

bool OnLines(const FusedPass& pass) {
  uintptr_t bits = 0;
  for (int k = 0; k < pass.to_count; ++k) bits |= reinterpret_cast<uintptr_t>(pass.to[k]);
  return bits % 64 == 0;
}

}  // namespace

void RunFusedPass(const FusedPass& pass, bool streaming) {
  const int index = (pass.from_count - 1) * kFusedMax + pass.to_count - 1;
  (streaming && OnLines(pass) ? kStreamed : kCached)[index](pass);
}

}  // namespace shoal
