#include "runtime/kernels/cpu/gemm.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <tuple>

#include "absl/container/flat_hash_map.h"
#include "runtime/base/check.h"
#include "runtime/base/mutex.h"
#include "runtime/device/cpu.h"
#include "runtime/device/memory.h"

namespace shoal::kernels::cpu {
namespace {

// oneDNN of this process. Created at the first product, when SHOAL_ISA is known to all; never destroyed, because
// threads may still multiply while the process exits.
struct OneDnn {
  dnnl::engine engine;

  OneDnn() {
    if (ActiveIsa() == Isa::kPlain) dnnl::set_max_cpu_isa(dnnl::cpu_isa::sse41);
    if (ActiveIsa() == Isa::kAvx2) dnnl::set_max_cpu_isa(dnnl::cpu_isa::avx2);
    dnnl::set_primitive_cache_capacity(0);  // PrimitiveCache below is the only one.
    engine = dnnl::engine(dnnl::engine::kind::cpu, 0);
  }
  static OneDnn& Get() {
    static OneDnn* one_dnn = new OneDnn();
    return *one_dnn;
  }
};

dnnl::memory::data_type DataType(DType dtype) {
  return dtype == DType::kF32 ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
}

struct ShapeKey {
  Gemm gemm;  // Its pointers are null.
  int threads;

  auto Tie() const {
    return std::tie(gemm.m, gemm.n, gemm.k, gemm.lda, gemm.ldb, gemm.ldc, gemm.transpose_a, gemm.transpose_b,
                    gemm.accumulate, gemm.in, gemm.out, threads);
  }
  friend bool operator==(const ShapeKey& a, const ShapeKey& b) { return a.Tie() == b.Tie(); }
  template <class H>
  friend H AbslHashValue(H h, const ShapeKey& key) {
    return H::combine(std::move(h), key.Tie());
  }
};

struct Primitive {
  dnnl::memory::desc a, b, c, scratchpad;
  dnnl::matmul matmul;

  explicit Primitive(const Gemm& gemm) {
    const auto matrix = [](int64_t rows, int64_t columns, int64_t ld, bool transposed, DType dtype) {
      const dnnl::memory::dims strides = transposed ? dnnl::memory::dims{1, ld} : dnnl::memory::dims{ld, 1};
      return dnnl::memory::desc({rows, columns}, DataType(dtype), strides);
    };
    a = matrix(gemm.m, gemm.k, gemm.lda, gemm.transpose_a, gemm.in);
    b = matrix(gemm.k, gemm.n, gemm.ldb, gemm.transpose_b, gemm.in);
    c = matrix(gemm.m, gemm.n, gemm.ldc, /*transposed=*/false, gemm.out);
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (gemm.accumulate) {
      dnnl::post_ops sum;
      sum.append_sum(1.0f);
      attributes.set_post_ops(sum);
    }
    const dnnl::matmul::primitive_desc descriptor(dnnl::matmul::desc(a, b, c), attributes, OneDnn::Get().engine);
    scratchpad = descriptor.scratchpad_desc();
    matmul = dnnl::matmul(descriptor);
  }
};

// Creating a primitive costs up to a millisecond (it generates code), so they are kept. Thread-safe.
class PrimitiveCache {
 public:
  std::shared_ptr<const Primitive> Find(const ShapeKey& key) {
    {
      MutexLock lock(&mutex_);
      const auto found = primitives_.find(key);
      if (found != primitives_.end()) return found->second;
    }
    // Not under the lock: other threads go on meanwhile. Two may create the same one; the first to insert wins.
    auto created = std::make_shared<const Primitive>(key.gemm);
    MutexLock lock(&mutex_);
    // A model has a few dozen shapes; who exceeds the bound does not repeat its shapes, and any eviction order will do.
    if (primitives_.size() >= kPrimitivesMax) primitives_.clear();
    return primitives_.emplace(key, std::move(created)).first->second;
  }
  static PrimitiveCache& Get() {
    static PrimitiveCache* cache = new PrimitiveCache();
    return *cache;
  }

 private:
  static constexpr size_t kPrimitivesMax = 1024;
  Mutex mutex_;
  absl::flat_hash_map<ShapeKey, std::shared_ptr<const Primitive>> primitives_ ABSL_GUARDED_BY(mutex_);
};

// One of a primitive's threads must be exactly what it was created for: oneDNN fixes the partition then.
class TeamOfOneInsideParallelRegion {
 public:
  TeamOfOneInsideParallelRegion() : threads_(omp_get_max_threads()) {
    if (omp_in_parallel() != 0) omp_set_num_threads(1);
  }
  ~TeamOfOneInsideParallelRegion() { omp_set_num_threads(threads_); }

 private:
  const int threads_;
};

void RunPrimitive(const Gemm& gemm) {
  const TeamOfOneInsideParallelRegion team;
  ShapeKey key{gemm, omp_get_max_threads()};
  key.gemm.a = key.gemm.b = key.gemm.c = nullptr;
  const std::shared_ptr<const Primitive> primitive = PrimitiveCache::Get().Find(key);
  const dnnl::engine& engine = OneDnn::Get().engine;
  thread_local dnnl::stream stream(engine);
  const dnnl::memory a(primitive->a, engine, const_cast<void*>(gemm.a));
  const dnnl::memory b(primitive->b, engine, const_cast<void*>(gemm.b));
  const dnnl::memory c(primitive->c, engine, gemm.c);
  void* scratch = Scratch(ScratchSlot::kOneDnn, static_cast<int64_t>(primitive->scratchpad.get_size()));
  const dnnl::memory scratchpad(primitive->scratchpad, engine, scratch);
  const std::array<dnnl_exec_arg_t, 4> arguments = {{{DNNL_ARG_SRC, a.get()},
                                                     {DNNL_ARG_WEIGHTS, b.get()},
                                                     {DNNL_ARG_DST, c.get()},
                                                     {DNNL_ARG_SCRATCHPAD, scratchpad.get()}}};
  const dnnl_status_t status = dnnl_primitive_execute(primitive->matmul.get(), stream.get(),
                                                      static_cast<int>(arguments.size()), arguments.data());
  SHOAL_CHECK(status == dnnl_success) << "oneDNN status " << status;
}

// The f32 product takes any size without a primitive, at the speed of the primitives or better (docs/performance.md).
void RunSgemm(const Gemm& gemm) {
  OneDnn::Get();
  const dnnl_status_t status =
      dnnl_sgemm(gemm.transpose_a ? 'T' : 'N', gemm.transpose_b ? 'T' : 'N', gemm.m, gemm.n, gemm.k, 1.0f,
                 static_cast<const float*>(gemm.a), gemm.lda, static_cast<const float*>(gemm.b), gemm.ldb,
                 gemm.accumulate ? 1.0f : 0.0f, static_cast<float*>(gemm.c), gemm.ldc);
  SHOAL_CHECK(status == dnnl_success) << "oneDNN status " << status;
}

// `to`, dense, becomes the block [row, row + rows) x [column, column + columns) of op(from).
void ConvertBlock(const void* from, int64_t ld, bool transposed, int64_t row, int64_t column, int64_t rows,
                  int64_t columns, float* to) {
  if (transposed) {
    std::swap(row, column);
    std::swap(rows, columns);
  }
  const BFloat16* source = static_cast<const BFloat16*>(from) + row * ld + column;
#pragma omp parallel for schedule(static) if (rows * columns > 65536)
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * columns + j] = static_cast<float>(source[i * ld + j]);
  }
}

// bf16 operands on a processor that cannot multiply them: f32 products of blocks small enough to stay in cache and large
// enough that converting (once per kBlock products of an element) costs little.
void RunConverted(const Gemm& gemm) {
  constexpr int64_t kBlock = 512;
  constexpr int64_t kDepth = 1024;
  auto* a = static_cast<float*>(Scratch(ScratchSlot::kConvertA, kBlock * kDepth * 4));
  auto* b = static_cast<float*>(Scratch(ScratchSlot::kConvertB, kBlock * kDepth * 4));
  auto* c = static_cast<float*>(Scratch(ScratchSlot::kConvertC, kBlock * kBlock * 4));
  for (int64_t j = 0; j < gemm.n; j += kBlock) {
    for (int64_t i = 0; i < gemm.m; i += kBlock) {
      Gemm block = gemm;
      block.in = block.out = DType::kF32;
      block.m = std::min(kBlock, gemm.m - i);
      block.n = std::min(kBlock, gemm.n - j);
      block.a = a;
      block.b = b;
      const bool in_place = gemm.out == DType::kF32;
      block.c = in_place ? static_cast<float*>(gemm.c) + i * gemm.ldc + j : c;
      block.ldc = in_place ? gemm.ldc : block.n;
      for (int64_t depth = 0; depth < gemm.k; depth += kDepth) {
        block.k = std::min(kDepth, gemm.k - depth);
        ConvertBlock(gemm.a, gemm.lda, gemm.transpose_a, i, depth, block.m, block.k, a);
        ConvertBlock(gemm.b, gemm.ldb, gemm.transpose_b, depth, j, block.k, block.n, b);
        block.lda = gemm.transpose_a ? block.m : block.k;
        block.ldb = gemm.transpose_b ? block.k : block.n;
        block.accumulate = gemm.accumulate || depth > 0;
        RunSgemm(block);
      }
      if (in_place) continue;
      auto* out = static_cast<BFloat16*>(gemm.c) + i * gemm.ldc + j;
      for (int64_t row = 0; row < block.m; ++row) {
        for (int64_t column = 0; column < block.n; ++column) {
          out[row * gemm.ldc + column] = BFloat16(c[row * block.n + column]);
        }
      }
    }
  }
}

}  // namespace

bool NativeBf16Gemm() { return HasBf16Dot(); }

void* Scratch(ScratchSlot slot, int64_t bytes) {
  struct Block {
    std::shared_ptr<void> memory;
    int64_t bytes = 0;
  };
  thread_local std::array<Block, static_cast<size_t>(ScratchSlot::kCount)> blocks;
  Block& block = blocks[static_cast<size_t>(slot)];
  if (block.memory == nullptr || block.bytes < bytes) {
    block.memory.reset();  // First, so that the allocator may reuse it.
    block.memory = HostMemory::Get().Allocate(bytes);
    block.bytes = bytes;
  }
  return block.memory.get();
}

void RunGemm(const Gemm& gemm) {
  if (gemm.m == 0 || gemm.n == 0) return;
  if (gemm.k == 0) {
    if (gemm.accumulate) return;
    const int64_t width = SizeOf(gemm.out);
    for (int64_t row = 0; row < gemm.m; ++row) {
      std::memset(static_cast<char*>(gemm.c) + row * gemm.ldc * width, 0, static_cast<size_t>(gemm.n * width));
    }
    return;
  }
  if (gemm.in == DType::kF32) return RunSgemm(gemm);
  if (NativeBf16Gemm()) return RunPrimitive(gemm);
  RunConverted(gemm);
}

}  // namespace shoal::kernels::cpu
