#include "runtime/kernels/cpu/attention.h"

#include <algorithm>

#include "runtime/base/check.h"
#include "runtime/kernels/cpu/attention_inner.h"
#include "runtime/kernels/cpu/gemm.h"
#include "runtime/kernels/cpu/tasks.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {
namespace {

const AttentionInner& InnerOf(Isa isa, DType dtype) {
  const AttentionInner* tables[] = {kAttentionPlain, kAttentionAvx2, kAttentionAvx512};
  return tables[static_cast<int>(isa)][dtype == DType::kBF16 ? 1 : 0];
}

void CheckMatrix(const char* name, const Tensor& tensor, int64_t tokens, int64_t width, DType dtype) {
  SHOAL_CHECK(tensor.rank() == 2 && tensor.dim(0) == tokens && tensor.dim(1) == width &&
              tensor.dtype() == dtype)
      << name << " is " << Name(tensor.dtype()) << ShapeString(tensor.shape()) << ", wanted " << Name(dtype)
      << "[" << tokens << ", " << width << "]";
}

AttentionArgs Check(const AttentionShape& shape, const Tensor& qkv, const Tensor& first, const Tensor& out,
                    const Tensor& lse) {
  SHOAL_CHECK(shape.rows >= 0 && shape.seq >= 0 && shape.dim >= 1 && shape.kv_heads >= 1 &&
              shape.heads >= shape.kv_heads && shape.heads % shape.kv_heads == 0)
      << shape.rows << " rows of " << shape.seq << " tokens, " << shape.heads << " heads on "
      << shape.kv_heads << " of " << shape.dim;
  SHOAL_CHECK(qkv.dtype() == DType::kF32 || qkv.dtype() == DType::kBF16) << Name(qkv.dtype());
  const int64_t tokens = shape.rows * shape.seq;
  CheckMatrix("qkv", qkv, tokens, shape.qkv_width(), qkv.dtype());
  SHOAL_CHECK(first.empty() || (first.dtype() == DType::kI32 && first.rank() == 1 && first.dim(0) == tokens))
      << "first is " << Name(first.dtype()) << ShapeString(first.shape()) << ", wanted i32[" << tokens << "]";
  CheckMatrix("out", out, tokens, shape.q_width(), qkv.dtype());
  CheckMatrix("lse", lse, tokens, shape.heads, DType::kF32);
  AttentionArgs args = {};
  args.qkv = qkv.raw();
  args.first = first.empty() ? nullptr : first.data<int32_t>();
  args.out = out.raw();
  args.lse = lse.data<float>();
  args.seq = shape.seq;
  args.qkv_width = shape.qkv_width();
  args.heads = shape.heads;
  args.kv_heads = shape.kv_heads;
  args.dim = shape.dim;
  return args;
}

// In host memory alone.
void CheckFirst(const AttentionShape& shape, const int32_t* first) {
  if (first == nullptr) return;
  for (int64_t i = 0; i < shape.rows * shape.seq; ++i) {
    const int64_t token = i % shape.seq, least = token == 0 ? 0 : first[i - 1];
    SHOAL_CHECK(first[i] >= least && first[i] <= token)
        << "token " << token << " of sequence " << i / shape.seq << " sees tokens from " << first[i]
        << " on, wanted " << least << " to " << token;
  }
}

// Into how many parts to cut a sequence of `blocks` blocks so that every thread finds work; 1 when there are
// enough (row, KV head) pairs, because each part packs the keys anew.
int64_t Parts(const AttentionShape& shape, int64_t blocks) {
  const int64_t pairs = shape.rows * shape.kv_heads;
  const int64_t wanted = Threads() == 1 ? 1 : 4 * Threads();
  return std::min(blocks, (wanted + pairs - 1) / pairs);
}

TokenRange Part(int64_t part, int64_t parts, int64_t block, int64_t seq) {
  const int64_t blocks = (seq + block - 1) / block;
  return {std::min(seq, blocks * part / parts * block), std::min(seq, blocks * (part + 1) / parts * block)};
}

float* AttentionScratch(int64_t floats) {
  return static_cast<float*>(cpu::Scratch(cpu::ScratchSlot::kAttention, floats * int64_t{sizeof(float)}));
}

}  // namespace

namespace cpu {

void Attention(Isa isa, const AttentionShape& shape, const Tensor& qkv, const Tensor& first,
               const Tensor& out, const Tensor& lse) {
  const AttentionArgs args = Check(shape, qkv, first, out, lse);
  if (shape.rows == 0 || shape.seq == 0) return;
  CheckFirst(shape, args.first);
  const AttentionInner& inner = InnerOf(isa, qkv.dtype());
  const int64_t pairs = shape.rows * shape.kv_heads;
  const int64_t parts = Parts(shape, (shape.seq + kAttentionQueryBlock - 1) / kAttentionQueryBlock);
  RunTasks(pairs * parts, [&](int64_t task) {
    // Last parts first: they see the most keys, and a long task must not start at the end.
    const int64_t part = parts - 1 - task / pairs;
    const int64_t pair = task % pairs;
    inner.forward(args, pair / shape.kv_heads, static_cast<int>(pair % shape.kv_heads),
                  Part(part, parts, kAttentionQueryBlock, shape.seq),
                  AttentionScratch(inner.forward_scratch(shape.seq, shape.dim)));
  });
}

void AttentionBackward(Isa isa, const AttentionShape& shape, const Tensor& qkv, const Tensor& first,
                       const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dqkv) {
  AttentionArgs args = Check(shape, qkv, first, out, lse);
  CheckMatrix("dout", dout, out.dim(0), out.dim(1), qkv.dtype());
  CheckMatrix("dqkv", dqkv, qkv.dim(0), qkv.dim(1), qkv.dtype());
  if (shape.rows == 0 || shape.seq == 0) return;
  CheckFirst(shape, args.first);
  args.dout = dout.raw();
  args.dqkv = dqkv.raw();
  const AttentionInner& inner = InnerOf(isa, qkv.dtype());
  const int64_t pairs = shape.rows * shape.kv_heads;
  const int64_t parts = Parts(shape, (shape.seq + kAttentionKeyBlock - 1) / kAttentionKeyBlock);
  // Cut up, gradients of queries and of keys are separate tasks (7 products instead of 5, but no two write
  // the same).
  const int64_t kinds = parts == 1 ? 1 : 2;
  RunTasks(pairs * parts * kinds, [&](int64_t task) {
    const int64_t pair = task % pairs;
    const int64_t kind = task / pairs % kinds;
    const int64_t part = task / pairs / kinds;
    const TokenRange all = {0, shape.seq};
    const TokenRange none = {0, 0};
    // The heaviest first: the first keys are seen by all queries, the last queries see all keys.
    const TokenRange keys = kinds == 1  ? all
                            : kind == 1 ? none
                                        : Part(part, parts, kAttentionKeyBlock, shape.seq);
    const TokenRange queries = kinds == 1  ? all
                               : kind == 0 ? none
                                           : Part(parts - 1 - part, parts, kAttentionQueryBlock, shape.seq);
    if (keys.begin == keys.end && queries.begin == queries.end) return;
    inner.backward(args, pair / shape.kv_heads, static_cast<int>(pair % shape.kv_heads), queries, keys,
                   AttentionScratch(inner.backward_scratch(shape.seq, shape.dim)));
  });
}

}  // namespace cpu

void Attention(const AttentionShape& shape, const Tensor& qkv, const Tensor& first, const Tensor& out,
               const Tensor& lse, Stream& stream) {
  Check(shape, qkv, first, out, lse);
  if (Offloaded(stream, &DeviceKernels::attention, shape.rows, shape.seq, shape.heads, shape.kv_heads, shape.dim, qkv, first, out, lse)) {
    return;
  }
  cpu::Attention(ActiveIsa(), shape, qkv, first, out, lse);
}

void AttentionBackward(const AttentionShape& shape, const Tensor& qkv, const Tensor& first,
                       const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dqkv,
                       Stream& stream) {
  Check(shape, qkv, first, out, lse);
  CheckMatrix("dout", dout, out.dim(0), out.dim(1), qkv.dtype());
  CheckMatrix("dqkv", dqkv, qkv.dim(0), qkv.dim(1), qkv.dtype());
  if (Offloaded(stream, &DeviceKernels::attention_backward, shape.rows, shape.seq, shape.heads, shape.kv_heads, shape.dim, qkv, first,
                out, lse, dout, dqkv)) {
    return;
  }
  cpu::AttentionBackward(ActiveIsa(), shape, qkv, first, out, lse, dout, dqkv);
}

}  // namespace shoal::kernels
