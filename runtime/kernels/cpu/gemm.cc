#include "runtime/kernels/cpu/gemm.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <string_view>
#include <tuple>

#include "absl/container/flat_hash_map.h"
#include "runtime/base/check.h"
#include "runtime/base/mutex.h"
#include "runtime/device/cpu.h"
#include "runtime/device/memory.h"
#include "runtime/kernels/cpu/gemm_amx.h"
#include "runtime/kernels/cpu/tasks.h"

namespace shoal::kernels::cpu {
namespace {

// oneDNN of this process. Created at the first product, when SHOAL_ISA is known to all; never destroyed,
// because threads may still multiply while the process exits.
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

// How many blocks cover `extent`.
int64_t Blocks(int64_t extent, int64_t block) { return (extent + block - 1) / block; }

dnnl::memory::data_type DataType(DType dtype) {
  return dtype == DType::kF32 ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
}

// A Gemm without its pointers.
struct ShapeKey {
  Gemm gemm;

  auto Tie() const {
    return std::tie(gemm.m, gemm.n, gemm.k, gemm.lda, gemm.ldb, gemm.ldc, gemm.transpose_a, gemm.transpose_b,
                    gemm.accumulate, gemm.in, gemm.out);
  }
  friend bool operator==(const ShapeKey& a, const ShapeKey& b) { return a.Tie() == b.Tie(); }
  template <class H>
  friend H AbslHashValue(H h, const ShapeKey& key) {
    return H::combine(std::move(h), key.Tie());
  }
};

dnnl::memory::desc Matrix(int64_t rows, int64_t columns, int64_t ld, bool transposed, DType dtype) {
  const dnnl::memory::dims strides = transposed ? dnnl::memory::dims{1, ld} : dnnl::memory::dims{ld, 1};
  return dnnl::memory::desc({rows, columns}, DataType(dtype), strides);
}
dnnl::memory::desc MatrixA(const Gemm& gemm) {
  return Matrix(gemm.m, gemm.k, gemm.lda, gemm.transpose_a, gemm.in);
}
dnnl::memory::desc MatrixB(const Gemm& gemm) {
  return Matrix(gemm.k, gemm.n, gemm.ldb, gemm.transpose_b, gemm.in);
}
dnnl::memory::desc MatrixC(const Gemm& gemm) {
  return Matrix(gemm.m, gemm.n, gemm.ldc, /*transposed=*/false, gemm.out);
}

// Made for one thread: oneDNN fixes the partition then, and tasks are how work is shared here.
struct Primitive {
  dnnl::memory::desc scratchpad;
  dnnl::matmul matmul;

  // gemm.k may be DNNL_RUNTIME_DIM_VAL.
  explicit Primitive(const Gemm& gemm) {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (gemm.accumulate) {
      dnnl::post_ops sum;
      sum.append_sum(1.0f);
      attributes.set_post_ops(sum);
    }
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);  // Of this thread.
    const dnnl::matmul::primitive_desc descriptor(
        dnnl::matmul::desc(MatrixA(gemm), MatrixB(gemm), MatrixC(gemm)), attributes, OneDnn::Get().engine);
    scratchpad = descriptor.scratchpad_desc();
    matmul = dnnl::matmul(descriptor);
    omp_set_num_threads(threads);
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
    // Not under the lock: other threads go on meanwhile. Two may create the same one; the first to insert
    // wins.
    auto created = std::make_shared<const Primitive>(key.gemm);
    MutexLock lock(&mutex_);
    // A model has a few dozen shapes; who exceeds the bound does not repeat its shapes, and any eviction
    // order will do.
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

// On the calling thread, in a task.
void RunPrimitive(const Gemm& gemm) {
  ShapeKey key{gemm};
  key.gemm.a = key.gemm.b = key.gemm.c = nullptr;
  if (gemm.varying == Varying::kM) key.gemm.m = DNNL_RUNTIME_DIM_VAL;
  if (gemm.varying == Varying::kK) key.gemm.k = DNNL_RUNTIME_DIM_VAL;
  const std::shared_ptr<const Primitive> primitive = PrimitiveCache::Get().Find(key);
  const dnnl::engine& engine = OneDnn::Get().engine;
  thread_local dnnl::stream stream(engine);
  const dnnl::memory a(MatrixA(gemm), engine, const_cast<void*>(gemm.a));
  const dnnl::memory b(MatrixB(gemm), engine, const_cast<void*>(gemm.b));
  const dnnl::memory c(MatrixC(gemm), engine, gemm.c);
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

const void* Offset(const void* base, DType dtype, int64_t elements) {
  return static_cast<const std::byte*>(base) + elements * SizeOf(dtype);
}

// The part [row, row + rows) x [column, column + columns) of c.
Gemm Block(const Gemm& gemm, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  Gemm block = gemm;
  block.m = rows;
  block.n = columns;
  block.a = Offset(gemm.a, gemm.in, gemm.transpose_a ? row : row * gemm.lda);
  block.b = Offset(gemm.b, gemm.in, gemm.transpose_b ? column * gemm.ldb : column);
  block.c = const_cast<void*>(Offset(gemm.c, gemm.out, row * gemm.ldc + column));
  return block;
}

void RunAmx(const Gemm& gemm) {
  const AmxGemm amx = {gemm.m,
                       gemm.n,
                       gemm.k,
                       static_cast<const uint16_t*>(gemm.a),
                       static_cast<const uint16_t*>(gemm.b),
                       gemm.c,
                       gemm.lda,
                       gemm.ldb,
                       gemm.ldc,
                       gemm.transpose_a,
                       gemm.transpose_b,
                       gemm.accumulate,
                       gemm.out == DType::kBF16};
  AmxMultiply(amx, Scratch(ScratchSlot::kPacked, AmxScratchBytes(amx)));
}

// bf16 on a processor that multiplies it: blocks of c, each a task of one thread. Blocks are large, because
// each packs its operands anew, and no more than a few per thread.
void RunNativeBf16(const Gemm& gemm) {
  constexpr int64_t kColumns = 512;
  constexpr int64_t kRowsMin = 256;
  const int64_t tasks = Threads() == 1 ? 1 : 4 * Threads();
  const int64_t row_blocks =
      std::clamp<int64_t>(Blocks(tasks, Blocks(gemm.n, kColumns)), 1, Blocks(gemm.m, kRowsMin));
  const int64_t rows = Blocks(Blocks(gemm.m, row_blocks), 32) * 32;
  // Few rows: narrower blocks, so that no thread is without.
  const int64_t columns = std::min(kColumns, Blocks(Blocks(gemm.n * row_blocks, tasks), 32) * 32);
  const int64_t row_count = Blocks(gemm.m, rows);
  RunTasks(row_count * Blocks(gemm.n, columns), [&](int64_t task) {
    const int64_t row = task % row_count * rows, column = task / row_count * columns;
    const Gemm block =
        Block(gemm, row, std::min(rows, gemm.m - row), column, std::min(columns, gemm.n - column));
    if (ActiveBf16Path() == Bf16Path::kAmx) {
      RunAmx(block);
    } else {
      RunPrimitive(block);
    }
  });
}

// The f32 product takes any size without a primitive, and is as fast: on a Sapphire Rapids core 194 GFLOP/s
// at 1024^3, where the primitive for that very shape has 184.
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
  constexpr int64_t kRowsOfTask = 128;
  RunTasks(Blocks(rows, kRowsOfTask), [&](int64_t task) {
    for (int64_t i = task * kRowsOfTask; i < std::min(rows, (task + 1) * kRowsOfTask); ++i) {
      for (int64_t j = 0; j < columns; ++j) to[i * columns + j] = static_cast<float>(source[i * ld + j]);
    }
  });
}

// bf16 operands on a processor that cannot multiply them: f32 products of blocks small enough to stay in
// cache and large enough that converting (once per kBlock products of an element) costs little.
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

Bf16Path ActiveBf16Path() {
  static const Bf16Path path = [] {
    const char* limit = std::getenv("SHOAL_BF16");
    const std::string_view wanted = limit == nullptr ? "amx" : limit;
    if (!HasBf16Dot() || wanted == "convert") return Bf16Path::kConvert;
    return wanted == "dot" || !HasAmx() ? Bf16Path::kDot : Bf16Path::kAmx;
  }();
  return path;
}

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
      std::memset(static_cast<char*>(gemm.c) + row * gemm.ldc * width, 0,
                  static_cast<size_t>(gemm.n * width));
    }
    return;
  }
  if (gemm.in == DType::kF32) return RunSgemm(gemm);
  if (ActiveBf16Path() != Bf16Path::kConvert) return RunNativeBf16(gemm);
  RunConverted(gemm);
}

}  // namespace shoal::kernels::cpu
