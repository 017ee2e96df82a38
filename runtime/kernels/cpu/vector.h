// One float vector as wide as the instruction set this file is compiled for (AVX-512, AVX2 with FMA, or
// plain), with bf16 loads and stores, exp and horizontal sums. All in an anonymous namespace and with no
// other header of our own or of the C++ library: a source file compiled for AVX-512 must not emit inline
// functions that the linker could pick for a plain processor. Only cpu/inner_*.cc and files built like them
// include this.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define SHOAL_INLINE __attribute__((always_inline))

namespace shoal::kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));
typedef float HalfF32 __attribute__((vector_size(kLanes * 2)));  // Half as many lanes: what fills one F64.
typedef double F64 __attribute__((vector_size(kLanes * 4)));
constexpr int kF64Lanes = kLanes / 2;

// What a load or store covers: all lanes, or the first `lanes` (the others read as 0 and are not written).
struct Whole {};
struct Part {
  int64_t lanes;
};

inline F32 Splat(float value) { return F32{} + value; }  // -0 becomes 0.

inline F32 Load(const float* p, Whole) {
  F32 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline F32 Widen(U16 bits) {
#if defined(__AVX512F__)  // GCC 12 makes four instructions of the conversion by itself.
  return (F32)((U32)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#elif defined(__AVX2__)
  return (F32)((U32)_mm256_cvtepu16_epi32((__m128i)bits) << 16);
#else
  return (F32)(__builtin_convertvector(bits, U32) << 16);
#endif
}
// bf16 is its bits here.
inline F32 Load(const uint16_t* p, Whole) {
  U16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return Widen(bits);
}
#if defined(__AVX512F__)
inline __mmask16 MaskOf(Part part) { return (__mmask16)((1u << part.lanes) - 1); }
inline F32 Load(const float* p, Part part) { return (F32)_mm512_maskz_loadu_ps(MaskOf(part), p); }
inline F32 Load(const uint16_t* p, Part part) {
  return Widen((U16)_mm256_maskz_loadu_epi16(MaskOf(part), p));
}
#else
template <class T>
inline F32 Load(const T* p, Part part) {
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<uint64_t>(part.lanes) * sizeof(T));
  return Load(lanes, Whole{});
}
#endif

inline void Store(float* p, F32 v, Whole) { __builtin_memcpy(p, &v, sizeof(v)); }
// To nearest, ties to even; NaN stays NaN: as BFloat16(float), but the processor's own instruction takes
// denormals for 0.
inline U16 Narrow(F32 v) {
#if defined(__AVX512BF16__)
  return (U16)_mm512_cvtneps_pbh((__m512)v);
#else
  const U32 word = (U32)v;
  const U32 rounded = word + 0x7fff + ((word >> 16) & 1);
  const U32 quiet_nan = word | 0x400000;
  const U32 upper = (v != v ? quiet_nan : rounded) >> 16;
#if defined(__AVX512F__)
  return (U16)_mm512_cvtepi32_epi16((__m512i)upper);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)upper, (__m256i)upper);
  return (U16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(upper, U16);
#endif
#endif
}
inline void Store(uint16_t* p, F32 v, Whole) {
  const U16 bits = Narrow(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
#if defined(__AVX512F__)
inline void Store(float* p, F32 v, Part part) { _mm512_mask_storeu_ps(p, MaskOf(part), (__m512)v); }
inline void Store(uint16_t* p, F32 v, Part part) {
  _mm256_mask_storeu_epi16(p, MaskOf(part), (__m256i)Narrow(v));
}
#else
template <class T>
inline void Store(T* p, F32 v, Part part) {
  T lanes[kLanes];
  Store(lanes, v, Whole{});
  __builtin_memcpy(p, lanes, static_cast<uint64_t>(part.lanes) * sizeof(T));
}
#endif

// `v` with 0 in the lanes that are not covered.
inline F32 Keep(F32 v, Whole) { return v; }
inline F32 Keep(F32 v, Part part) {
  float lanes[kLanes];
  Store(lanes, v, Whole{});
  return Load(lanes, part);
}

// body(i, lanes) for i = 0, kLanes, ...: `lanes` is Whole, at the end Part when n is not a multiple.
template <class Body>
SHOAL_INLINE inline void ForEachVector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

// The same with four vectors a turn for sums, whose additions would wait for one another: body(i, u, lanes),
// where u in [0, kSums) names the accumulator.
constexpr int kSums = 4;
template <class Body>
SHOAL_INLINE inline void ForEachVectorSum(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    body(i, 0, Whole{});
    body(i + kLanes, 1, Whole{});
    body(i + 2 * kLanes, 2, Whole{});
    body(i + 3 * kLanes, 3, Whole{});
  }
  for (; i + kLanes <= n; i += kLanes) body(i, 0, Whole{});
  if (i < n) body(i, 1, Part{n - i});
}

// b when either is NaN. (The compiler makes a comparison and a blend of a > b ? a : b.)
inline F32 Max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return (F32)_mm_max_ps((__m128)a, (__m128)b);
#endif
}

inline F32 Sqrt(F32 v) {
#if defined(__AVX512F__)
  return (F32)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (F32)_mm256_sqrt_ps((__m256)v);
#else
  return (F32)_mm_sqrt_ps((__m128)v);
#endif
}

// Pairwise, so in the same order every time.
inline float HorizontalSum(F32 v) {
#if defined(__AVX512F__)
  const __m256 eight =
      _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#elif defined(__AVX2__)
  const __m256 eight = (__m256)v;
#endif
#if defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  const __m128 four = (__m128)v;
#endif
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float HorizontalSum(const F32 (&sums)[kSums]) {
  return HorizontalSum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
inline double HorizontalSum(F64 v) {
  double sum = 0;
  for (int lane = 0; lane < kF64Lanes; ++lane) sum += v[lane];
  return sum;
}
inline float HorizontalMax(F32 v) {
  float max = v[0];
  for (int lane = 1; lane < kLanes; ++lane) max = v[lane] > max ? v[lane] : max;
  return max;
}

// e^x for x <= 88, within 1.5 ulp; 0 below ln of the least normal number. NaN stays NaN. The range reduction
// and the polynomial are those of Cephes' expf.
inline F32 Exp(F32 x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // Adding it rounds to an integer, which then stands in the low bits.
  constexpr float kRound = 12582912.0f;
  const F32 shifted = x * kLog2E + kRound;
  const F32 n = shifted - kRound;
  const F32 r = (x - n * kLn2High) - n * kLn2Low;
  F32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const F32 scale = (F32)(((U32)shifted << 23) + (127u << 23));
  return x < -87.3365448f ? F32{} : p * scale;
}

// 1 / (1 + e^-x); NaN stays NaN.
inline F32 Sigmoid(F32 x) {
  const F32 denominator = 1.0f + Exp(-Max(Splat(-87.0f), x));
#if defined(__AVX512F__)
  // 14 bits and one step of Newton's, within 1 ulp: a division would take longer than the rest of a SwiGLU.
  const F32 guess = (F32)_mm512_rcp14_ps((__m512)denominator);
  return guess * (2.0f - denominator * guess);
#else
  return 1.0f / denominator;
#endif
}

}  // namespace
}  // namespace shoal::kernels
