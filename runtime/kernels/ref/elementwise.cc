#include "runtime/kernels/elementwise.h"

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {

void Convert(const Tensor& from, const Tensor& to, Stream&) {
  for (int64_t i = 0; i < from.elements(); ++i) Set(to, i, Get(from, i));
}

void AddTo(const Tensor& x, const Tensor& sum, Stream&) {
  for (int64_t i = 0; i < x.elements(); ++i) AddAt(sum, i, Get(x, i));
}

}  // namespace shoal::kernels::ref
