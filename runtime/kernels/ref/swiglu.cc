#include "runtime/kernels/swiglu.h"

#include <cmath>

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {
namespace {
double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
}  // namespace

void SwiGlu(const Tensor& gate_up, const Tensor& h, Stream&) {
  const int64_t R = h.dim(0), F = h.dim(1);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t f = 0; f < F; ++f) {
      const double gate = Get(gate_up, r * 2 * F + f), up = Get(gate_up, r * 2 * F + F + f);
      Set(h, r * F + f, gate * Sigmoid(gate) * up);
    }
  }
}

void SwiGluBackward(const Tensor& dh, const Tensor& gate_up, const Tensor& dgate_up, const Tensor& h,
                    Stream&) {
  const int64_t R = dh.dim(0), F = dh.dim(1);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t f = 0; f < F; ++f) {
      const double gate = Get(gate_up, r * 2 * F + f), up = Get(gate_up, r * 2 * F + F + f),
                   d = Get(dh, r * F + f);
      const double sigmoid = Sigmoid(gate);
      Set(dgate_up, r * 2 * F + f, d * up * sigmoid * (1 + gate * (1 - sigmoid)));
      Set(dgate_up, r * 2 * F + F + f, d * gate * sigmoid);
      Set(h, r * F + f, gate * sigmoid * up);
    }
  }
}

}  // namespace shoal::kernels::ref
