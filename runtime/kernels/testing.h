// For the tests of kernels: random tensors, comparison within computed bounds, finite differences, and the
// sweep over instruction sets and thread counts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "gtest/gtest.h"
#include "runtime/device/cpu.h"
#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::testing {

using ref::Get;
using ref::Set;

// Half a unit in the last place, relative: what one rounding may cost.
inline double Roundoff(DType dtype) { return dtype == DType::kBF16 ? 0x1p-8 : 0x1p-24; }

inline Tensor Random(Shape shape, DType dtype, uint64_t seed, double stddev = 1) {
  Tensor tensor = Empty(std::move(shape), dtype);
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal(0, stddev);
  for (int64_t i = 0; i < tensor.elements(); ++i) Set(tensor, i, normal(engine));
  return tensor;
}

inline Tensor RandomIds(Shape shape, int64_t limit, uint64_t seed) {
  Tensor tensor = Empty(std::move(shape), DType::kI32);
  std::mt19937_64 engine(seed);
  for (int32_t& id : tensor.span<int32_t>()) {
    id = static_cast<int32_t>(engine() % static_cast<uint64_t>(limit));
  }
  return tensor;
}

// `first` of attention.h for sequences of documents whose lengths follow each other, and begin anew, in this order.
inline Tensor FirstOfDocuments(int64_t rows, int64_t seq, const std::vector<int64_t>& lengths) {
  Tensor first = Empty({rows * seq}, DType::kI32);
  size_t document = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t begin = 0; begin < seq; begin += lengths[document++ % lengths.size()]) {
      const int64_t end = std::min(seq, begin + lengths[document % lengths.size()]);
      std::fill(first.data<int32_t>() + row * seq + begin, first.data<int32_t>() + row * seq + end, static_cast<int32_t>(begin));
    }
  }
  return first;
}
// Lengths from 1 to twice a block of any kernel, most of them short.
inline Tensor RandomFirst(int64_t rows, int64_t seq, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::uniform_real_distribution<double> logarithm(0, std::log(256.0));
  std::vector<int64_t> lengths(64);
  for (int64_t& length : lengths) length = static_cast<int64_t>(std::exp(logarithm(engine)));
  return FirstOfDocuments(rows, seq, lengths);
}

// `all` becomes NaN but for its rows from `begin` on, which are those of `own`: nothing but them may be read.
inline void PlaceAmongNan(const Tensor& own, int64_t begin, const Tensor& all) {
  std::memset(all.raw(), 0xff, static_cast<size_t>(all.bytes()));
  std::memcpy(all.Rows(begin, own.dim(0)).raw(), own.raw(), static_cast<size_t>(own.bytes()));
}

// Pairs of T tokens, `each` of them or, when ragged, 0 to 2 * each; slots in random order, among them rows of no pair.
struct Pairs {
  Tensor offset, slot, token;  // token: of each row.
  int64_t rows = 0, pairs = 0;
};
inline Pairs RandomPairs(int64_t T, int64_t each, bool ragged) {
  std::mt19937_64 random(11);
  Pairs made;
  std::vector<int32_t> token_of;
  made.offset = Empty({T + 1}, DType::kI32);
  for (int64_t t = 0; t <= T; ++t) {
    made.offset.data<int32_t>()[t] = static_cast<int32_t>(token_of.size());
    const int64_t count = ragged ? static_cast<int64_t>(random() % static_cast<uint64_t>(2 * each + 1)) : each;
    if (t < T) token_of.insert(token_of.end(), static_cast<size_t>(count), static_cast<int32_t>(t));
  }
  made.pairs = static_cast<int64_t>(token_of.size());
  made.rows = made.pairs + (ragged && T > 0 ? 3 : 0);
  std::vector<int32_t> rows(static_cast<size_t>(made.rows));
  std::iota(rows.begin(), rows.end(), 0);
  std::shuffle(rows.begin(), rows.end(), random);
  made.slot = Empty({made.pairs}, DType::kI32);
  made.token = Zeros({made.rows}, DType::kI32);
  for (size_t pair = 0; pair < token_of.size(); ++pair) {
    made.slot.data<int32_t>()[pair] = rows[pair];
    made.token.data<int32_t>()[rows[pair]] = token_of[pair];
  }
  return made;
}

// A copy in another type: exact towards a wider one.
inline Tensor As(const Tensor& from, DType dtype) {
  Tensor to = Empty(from.shape(), dtype);
  for (int64_t i = 0; i < from.elements(); ++i) Set(to, i, Get(from, i));
  return to;
}
inline Tensor Copy(const Tensor& from) { return As(from, from.dtype()); }

inline double MaxAbs(const Tensor& tensor) {
  double max = 0;
  for (int64_t i = 0; i < tensor.elements(); ++i) max = std::max(max, std::abs(Get(tensor, i)));
  return max;
}

// |got - want| <= relative * |want| + absolute, for each element.
inline void ExpectNear(const Tensor& got, const Tensor& want, double relative, double absolute,
                       std::string_view name) {
  ASSERT_EQ(got.shape(), want.shape()) << name;
  for (int64_t i = 0; i < got.elements(); ++i) {
    const double g = Get(got, i), w = Get(want, i);
    ASSERT_LE(std::abs(g - w), relative * std::abs(w) + absolute)
        << name << "[" << i << "] of " << ShapeString(got.shape()) << ": " << g << ", want " << w;
  }
}

inline void ExpectSameBits(const Tensor& got, const Tensor& want, std::string_view name) {
  ASSERT_EQ(got.shape(), want.shape()) << name;
  ASSERT_EQ(got.dtype(), want.dtype()) << name;
  if (got.bytes() == 0 || std::memcmp(got.raw(), want.raw(), static_cast<size_t>(got.bytes())) == 0) return;
  for (int64_t i = 0; i < got.elements(); ++i) {
    ASSERT_EQ(Get(got, i), Get(want, i)) << name << "[" << i << "] of " << ShapeString(got.shape());
  }
  FAIL() << name << ": equal values, different bits";
}

// Calls `run`, which returns its outputs, at every instruction set with 1 thread and hands the outputs to
// `check`; then with 2 and 3 threads, which must give the same bits.
inline void SweepLevels(const std::function<std::vector<Tensor>()>& run,
                        const std::function<void(const std::vector<Tensor>&)>& check) {
  const int threads_before = Threads();
  for (int number = 0; number <= static_cast<int>(BestInnerLevel()); ++number) {
    SCOPED_TRACE("InnerLevel " + std::to_string(number));
    SetInnerLevelForTest(static_cast<InnerLevel>(number));
    SetThreads(1);
    const std::vector<Tensor> alone = run();
    check(alone);
    for (int threads : {2, 3}) {
      SetThreads(threads);
      const std::vector<Tensor> shared = run();
      for (size_t i = 0; i < alone.size(); ++i) {
        ExpectSameBits(shared[i], alone[i],
                       "output " + std::to_string(i) + ", threads " + std::to_string(threads));
      }
    }
  }
  SetThreads(threads_before);
  SetInnerLevelForTest(BestInnerLevel());
}

// Checks dloss/dx, claimed to be `gradient`, by central differences of `loss`, which reads x (f64).
inline void CheckGradient(const Tensor& x, const Tensor& gradient, const std::function<double()>& loss,
                          std::string_view name) {
  constexpr double kStep = 1e-4;
  for (int64_t i = 0; i < x.elements(); ++i) {
    const double value = Get(x, i);
    Set(x, i, value + kStep);
    const double above = loss();
    Set(x, i, value - kStep);
    const double below = loss();
    Set(x, i, value);
    const double want = (above - below) / (2 * kStep);
    ASSERT_NEAR(Get(gradient, i), want, 1e-6 * std::max(1.0, std::abs(want))) << name << "[" << i << "]";
  }
}

inline double Dot(const Tensor& a, const Tensor& b) {
  double sum = 0;
  for (int64_t i = 0; i < a.elements(); ++i) sum += Get(a, i) * Get(b, i);
  return sum;
}

}  // namespace shoal::kernels::testing
