// Scores and choices of experts, and their gradients. A group of lanes of a warp has a token, whose row of experts it holds in
// registers; groups meet in exchanges of whole warps, so one without a token of its own does the last token again, without results.
#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"
#include "runtime/kernels/cuda/router_tally.h"

namespace shoal::cuda {
namespace {

constexpr int kBackwardThreads = 128;

template <int kGroup> __device__ __forceinline__ float GroupSum(float value) {
#pragma unroll
  for (int distance = kGroup / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}
template <int kGroup> __device__ __forceinline__ float GroupMax(float value) {
#pragma unroll
  for (int distance = kGroup / 2; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// kPacks packs of four experts per lane; lane l has experts 4 (p kGroup + l) + [0, 4) for p < kPacks.
template <int kGroup, int kPacks> struct Row {
  float at[kPacks][4];

  static __device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % kGroup; }
  static __device__ __forceinline__ int Expert(int p, int i) { return 4 * (p * kGroup + Lane()) + i; }

  // Calls body(expert, value) for the lane's experts.
  template <typename Body> __device__ __forceinline__ void ForEach(int experts, const Body& body) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (Expert(p, i) < experts) body(Expert(p, i), at[p][i]);
      }
    }
  }
  __device__ __forceinline__ void Fill(float value) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) at[p][i] = value;
    }
  }
  // `packed`: rows may be accessed four elements at once.
  __device__ __forceinline__ void LoadFrom(const float* from, int experts, bool packed) {
    if (!packed) {
      ForEach(experts, [&](int expert, float& value) { value = from[expert]; });
      return;
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (Expert(p, 0) >= experts) continue;
      const Floats<4> pack = Load<4>(from + Expert(p, 0));
#pragma unroll
      for (int i = 0; i < 4; ++i) at[p][i] = pack.at[i];
    }
  }
  __device__ __forceinline__ void StoreTo(float* to, int experts, bool packed) {
    if (!packed) {
      ForEach(experts, [&](int expert, float value) { to[expert] = value; });
      return;
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (Expert(p, 0) < experts) Store(to + Expert(p, 0), Floats<4>{{at[p][0], at[p][1], at[p][2], at[p][3]}});
    }
  }
};

// Orders floats as integers above 0, so that NaN has a place too and a choice is always K different experts. -0 equals 0.
__device__ __forceinline__ uint32_t OrderOf(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  const uint32_t order = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return order == 0 ? 1 : order;
}

struct Choice {
  const float* logits;
  const float* bias;  // Of TopKSigmoid.
  float scale;        // Of TopKSigmoid.
  bool renormalize;   // Of TopKSoftmax.
  float* scores;      // Probabilities, or sigmoids.
  int32_t* chosen;
  float* weights;
  float* logz;  // Of TopKSoftmax.
  int64_t tokens;
  int experts, k;
  bool packed;
  // The tally, of as many blocks as the grid has; null: none.
  int pieces;
  int32_t* counts;
  double* sums;
};

// Of a block that chooses: as many as have registers for rows of so many packs. 256 blocks then have 2 to 4 MiB of logits on their way.
constexpr int ChooseThreads(int packs) { return packs <= 2 ? 512 : packs == 4 ? 256 : 128; }

// What a thread adds up for the tally's sums.
template <int kPacks> struct ChoiceSums {
  double of_expert[kPacks][4] = {}, squares = 0;

  template <int kGroup> __device__ __forceinline__ void Add(const Row<kGroup, kPacks>& row, float logz) {
    if (row.Lane() == 0) squares += static_cast<double>(logz) * static_cast<double>(logz);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) of_expert[p][i] += static_cast<double>(row.at[p][i]);
    }
  }
};

// Writes the block's line of the tally's sums. shared [warps, experts].
template <int kGroup, int kPacks> __device__ __forceinline__ void StoreSums(const Choice& a, ChoiceSums<kPacks>& own, double* shared) {
  SHOAL_SHARED(double, scratch, [33]);
  using OwnRow = Row<kGroup, kPacks>;
  double* of_warp = shared + threadIdx.x / 32 * a.experts;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      double sum = own.of_expert[p][i];
#pragma unroll
      for (int distance = kGroup; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (threadIdx.x % 32 < kGroup && OwnRow::Expert(p, i) < a.experts) of_warp[OwnRow::Expert(p, i)] = sum;
    }
  }
  const double squares = BlockSum(own.squares, scratch);
  double* line = a.sums + static_cast<int64_t>(blockIdx.x) * (a.experts + 1);
  if (threadIdx.x == 0) line[a.experts] = squares;
  for (int expert = static_cast<int>(threadIdx.x); expert < a.experts; expert += static_cast<int>(blockDim.x)) {
    double sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += shared[static_cast<int>(warp) * a.experts + expert];
    line[expert] = sum;
  }
}

// A row of logits becomes scores; order: of the lane's experts, 0 for those that are none. Returns the row's logsumexp, of softmax.
template <bool kSigmoid, int kGroup, int kPacks>
__device__ __forceinline__ float ScoreRow(const Choice& a, Row<kGroup, kPacks>& row, uint32_t (&order)[kPacks][4]) {
  float max = -INFINITY, sum = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int expert = row.Expert(p, i);
      order[p][i] = 0;
      if (expert >= a.experts) continue;
      if constexpr (kSigmoid) {
        row.at[p][i] = 1.0f / (1.0f + expf(-row.at[p][i]));
        order[p][i] = OrderOf(row.at[p][i] + a.bias[expert]);
      } else {
        // By logits, not by probabilities: softmax is monotonic, but its rounding and underflow tie what differs.
        order[p][i] = OrderOf(row.at[p][i]);
        max = fmaxf(max, row.at[p][i]);
      }
    }
  }
  if constexpr (kSigmoid) return 0;
  max = GroupMax<kGroup>(max);
  row.ForEach(a.experts, [&](int, float& value) { value = expf(value - max), sum += value; });
  sum = GroupSum<kGroup>(sum);
  row.ForEach(a.experts, [&](int, float& value) { value /= sum; });
  return max + logf(sum);
}

// The best expert by `order`, which is then out of it, and its score; in all lanes of the group.
template <int kGroup, int kPacks>
__device__ __forceinline__ int TakeBest(const Row<kGroup, kPacks>& row, uint32_t (&order)[kPacks][4], float* score) {
  // The greatest order and of equal ones the lowest expert: the greatest of both in one word.
  uint32_t best = 0;
  int best_expert = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (order[p][i] > best) best = order[p][i], best_expert = row.Expert(p, i);
    }
  }
  uint64_t winner = static_cast<uint64_t>(best) << 32 | (0xffffffffu - static_cast<uint32_t>(best_expert));
#pragma unroll
  for (int distance = kGroup / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, winner, distance);
    winner = other > winner ? other : winner;
  }
  const int expert = static_cast<int>(0xffffffffu - static_cast<uint32_t>(winner));
  float own = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row.Expert(p, i) == expert) order[p][i] = 0, own = row.at[p][i];
    }
  }
  *score = __shfl_sync(0xffffffffu, own, (static_cast<int>(threadIdx.x) % 32 & ~(kGroup - 1)) + expert / 4 % kGroup);
  return expert;
}

template <bool kSigmoid, int kGroup, int kPacks> __global__ void __launch_bounds__(ChooseThreads(kPacks)) Choose(Choice a) {
  constexpr int kThreads = ChooseThreads(kPacks), kGroups = kThreads / kGroup;
  SHOAL_DYNAMIC_SHARED(double, shared);  // Of sums [warps, experts], if wanted, then [kGroups, k] weights and choices, [experts] counts.
  const int group = static_cast<int>(threadIdx.x) / kGroup, lane = static_cast<int>(threadIdx.x) % kGroup;
  auto* all_weights = reinterpret_cast<float*>(shared + (a.sums == nullptr ? 0 : kThreads / 32 * a.experts));
  auto* all_choices = reinterpret_cast<int32_t*>(all_weights + kGroups * a.k);
  float* weights = all_weights + group * a.k;
  int32_t *choices = all_choices + group * a.k, *counts = all_choices + kGroups * a.k;
  if (a.counts != nullptr) {
    for (int expert = static_cast<int>(threadIdx.x); expert < a.experts; expert += kThreads) counts[expert] = 0;
    __syncthreads();
  }
  [[maybe_unused]] ChoiceSums<kPacks> sums;
  const TokenRange tokens = TokensOfBlock(a.tokens, a.pieces, static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x));
  for (int64_t base = tokens.begin; base < tokens.end; base += kGroups) {
    const bool own = base + group < tokens.end;
    const int64_t token = own ? base + group : tokens.end - 1;
    Row<kGroup, kPacks> row;
    uint32_t order[kPacks][4];
    row.Fill(-INFINITY);
    row.LoadFrom(a.logits + token * a.experts, a.experts, a.packed);
    [[maybe_unused]] const float logz = ScoreRow<kSigmoid>(a, row, order);
    if (own) row.StoreTo(a.scores + token * a.experts, a.experts, a.packed);
    if constexpr (!kSigmoid) {
      if (own && lane == 0) a.logz[token] = logz;
      if (own && a.sums != nullptr) sums.Add(row, logz);
    }
    float chosen_sum = 0;
    for (int k = 0; k < a.k; ++k) {
      float score = 0;
      const int expert = TakeBest(row, order, &score);
      chosen_sum += score;
      if (lane == k % kGroup) weights[k] = score, choices[k] = expert;
    }
    __syncwarp();
    for (int k = lane; own && k < a.k; k += kGroup) {
      float weight = weights[k];
      if constexpr (kSigmoid) {
        weight *= a.scale / chosen_sum;
      } else {
        if (a.renormalize) weight /= chosen_sum;
      }
      a.weights[token * a.k + k] = weight, a.chosen[token * a.k + k] = choices[k];
      if (a.counts != nullptr) atomicAdd(&counts[choices[k]], 1);
    }
    __syncwarp();
  }
  if (a.counts == nullptr) return;
  __syncthreads();
  for (int expert = static_cast<int>(threadIdx.x); expert < a.experts; expert += kThreads) {
    a.counts[static_cast<int64_t>(blockIdx.x) * a.experts + expert] = counts[expert];
  }
  if constexpr (!kSigmoid) {
    if (a.sums != nullptr) StoreSums<kGroup>(a, sums, shared);
  }
}

struct ChoiceGradient {
  const float* scores;
  const int32_t* chosen;
  const float* weights;
  const float* dweights;
  const float* dscores;  // By all scores (softmax) or shares (sigmoid) of each token, one row for tokens_per_dscores; null: none.
  int64_t tokens_per_dscores;
  const float* logz;  // Of softmax.
  float z_scale, scale;
  bool renormalize;
  float* dlogits;
  int64_t tokens;
  int experts, k;
  bool packed;
};

// row += the gradient by the scores of the chosen, by their weights.
template <bool kSigmoid, int kGroup, int kPacks>
__device__ __forceinline__ void AddByChosen(const ChoiceGradient& a, int64_t token, Row<kGroup, kPacks>& row) {
  const int32_t* chosen = a.chosen + token * a.k;
  const float* dweights = a.dweights + token * a.k;
  float sum = 0, along = 0;
  for (int k = row.Lane(); k < a.k; k += kGroup) {
    sum += a.scores[token * a.experts + chosen[k]];
    along += dweights[k] * a.weights[token * a.k + k];
  }
  sum = GroupSum<kGroup>(sum), along = GroupSum<kGroup>(along);
  for (int k = 0; k < a.k; ++k) {
    float d = dweights[k];
    if (kSigmoid || a.renormalize) d = ((kSigmoid ? a.scale * d : d) - along) / sum;
    row.ForEach(a.experts, [&](int expert, float& value) { value += expert == chosen[k] ? d : 0.0f; });
  }
}

template <bool kSigmoid, int kGroup, int kPacks> __global__ void __launch_bounds__(kBackwardThreads) ChooseBackward(ChoiceGradient a) {
  constexpr int kGroups = kBackwardThreads / kGroup;
  const int group = static_cast<int>(threadIdx.x) / kGroup;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kGroups; base < a.tokens; base += static_cast<int64_t>(gridDim.x) * kGroups) {
    const bool own = base + group < a.tokens;
    const int64_t token = own ? base + group : a.tokens - 1;
    Row<kGroup, kPacks> score, d;
    score.Fill(0), d.Fill(0);
    score.LoadFrom(a.scores + token * a.experts, a.experts, a.packed);
    if (a.dscores != nullptr) d.LoadFrom(a.dscores + token / a.tokens_per_dscores * a.experts, a.experts, a.packed);
    float sum = 0, dot = 0;
    const auto dot_of_row = [&] {
      sum = dot = 0;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += score.at[p][i], dot += score.at[p][i] * d.at[p][i];
      }
      sum = GroupSum<kGroup>(sum), dot = GroupSum<kGroup>(dot);
    };
    if (kSigmoid && a.dscores != nullptr) {  // By shares, which are scores over their sum.
      dot_of_row();
      const float along = dot / sum;
      d.ForEach(a.experts, [&](int, float& value) { value = (value - along) / sum; });
    }
    if (a.k > 0) AddByChosen<kSigmoid>(a, token, d);
    float shift = 0;
    if constexpr (!kSigmoid) {
      dot_of_row();
      shift = (a.z_scale == 0 ? 0.0f : 2 * a.z_scale * a.logz[token]) - dot;
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float s = score.at[p][i];
        d.at[p][i] = kSigmoid ? d.at[p][i] * (s * (1 - s)) : s * (d.at[p][i] + shift);
      }
    }
    if (own) d.StoreTo(a.dlogits + token * a.experts, a.experts, a.packed);
  }
}

constexpr int kExpertsMax = 2048;

// Calls body(Width<lanes of a group>, Width<packs of a lane>) for rows of that many experts.
template <typename Body> DeviceResult WithGroup(int64_t experts, const Body& body) {
  if (experts <= 16) return body(Width<4>{}, Width<1>{});
  if (experts <= 32) return body(Width<8>{}, Width<1>{});
  if (experts <= 64) return body(Width<16>{}, Width<1>{});
  if (experts <= 128) return body(Width<32>{}, Width<1>{});
  if (experts <= 256) return body(Width<32>{}, Width<2>{});
  if (experts <= 512) return body(Width<32>{}, Width<4>{});
  if (experts <= 1024) return body(Width<32>{}, Width<8>{});
  if (experts <= kExpertsMax) return body(Width<32>{}, Width<16>{});
  return {DeviceResult::Code::kFailed, "a router of more than 2048 experts"};
}

// `blocks` of the tally, 0: there is none.
template <bool kSigmoid> DeviceResult ChooseRows(const Choice& a, int64_t blocks, StreamArg stream) {
  return WithGroup(a.experts, [&](auto group, auto packs) {
    constexpr int kThreads = ChooseThreads(packs()), kGroups = kThreads / group();
    LaunchShape shape = {.blocks = blocks, .threads = kThreads, .shared_bytes = int64_t{8} * kGroups * a.k};
    if (blocks == 0) shape.blocks = WalkingBlocks(a.tokens * group(), kThreads);
    if (a.counts != nullptr) shape.shared_bytes += int64_t{4} * a.experts;
    if (a.sums != nullptr) shape.shared_bytes += int64_t{8} * (kThreads / 32) * a.experts;
    return Launch(shape, stream, Choose<kSigmoid, group(), packs()>, a);
  });
}

template <bool kSigmoid> DeviceResult ChooseRowsBackward(const ChoiceGradient& a, StreamArg stream) {
  if (a.tokens == 0) return {};
  return WithGroup(a.experts, [&](auto group, auto packs) {
    return Launch({.blocks = WalkingBlocks(a.tokens * group(), kBackwardThreads), .threads = kBackwardThreads}, stream,
                  ChooseBackward<kSigmoid, group(), packs()>, a);
  });
}

}  // namespace

DeviceResult TopKSoftmax(TensorArg logits, bool renormalize, TensorArg probs, TensorArg chosen, TensorArg weights,
                         TensorArg logz, int32_t pieces, TensorArg counts, TensorArg sums, StreamArg stream) {
  return ChooseRows<false>({.logits = Data<float>(logits), .renormalize = renormalize, .scores = Data<float>(probs),
                            .chosen = Data<int32_t>(chosen), .weights = Data<float>(weights), .logz = Data<float>(logz),
                            .tokens = logits.shape[0], .experts = static_cast<int>(logits.shape[1]),
                            .k = static_cast<int>(chosen.shape[1]), .packed = CanPack(4, logits.shape[1], logits, probs), .pieces = pieces,
                            .counts = Data<int32_t>(counts), .sums = Data<double>(sums)},
                           counts.shape[0], stream);
}

DeviceResult TopKSoftmaxBackward(TensorArg probs, TensorArg chosen, TensorArg weights, TensorArg logz, bool renormalize,
                                 TensorArg dweights, TensorArg dprob, float z_scale, TensorArg dlogits, StreamArg stream) {
  const int64_t tokens = probs.shape[0];
  return ChooseRowsBackward<false>(
      {.scores = Data<float>(probs), .chosen = Data<int32_t>(chosen), .weights = Data<float>(weights), .dweights = Data<float>(dweights),
       .dscores = Data<float>(dprob), .tokens_per_dscores = tokens, .logz = Data<float>(logz), .z_scale = z_scale,
       .renormalize = renormalize, .dlogits = Data<float>(dlogits), .tokens = tokens, .experts = static_cast<int>(probs.shape[1]),
       .k = static_cast<int>(chosen.shape[1]), .packed = CanPack(4, probs.shape[1], probs, dprob, dlogits)},
      stream);
}

DeviceResult Softmax(TensorArg logits, TensorArg probs, TensorArg logz, StreamArg stream) {
  return TopKSoftmax(logits, /*renormalize=*/false, probs, /*chosen=*/{}, /*weights=*/{}, logz, /*pieces=*/1, /*counts=*/{}, /*sums=*/{},
                     stream);
}

DeviceResult SoftmaxBackward(TensorArg probs, TensorArg logz, TensorArg dprobs, float z_scale, TensorArg dlogits,
                             StreamArg stream) {
  return ChooseRowsBackward<false>(
      {.scores = Data<float>(probs), .dscores = Data<float>(dprobs), .tokens_per_dscores = 1, .logz = Data<float>(logz), .z_scale = z_scale,
       .dlogits = Data<float>(dlogits), .tokens = probs.shape[0], .experts = static_cast<int>(probs.shape[1]),
       .packed = CanPack(4, probs.shape[1], probs, dprobs, dlogits)},
      stream);
}

DeviceResult TopKSigmoid(TensorArg logits, TensorArg bias, float scale, TensorArg scores, TensorArg chosen, TensorArg weights,
                         int32_t pieces, TensorArg counts, StreamArg stream) {
  return ChooseRows<true>({.logits = Data<float>(logits), .bias = Data<float>(bias), .scale = scale, .scores = Data<float>(scores),
                           .chosen = Data<int32_t>(chosen), .weights = Data<float>(weights), .tokens = logits.shape[0],
                           .experts = static_cast<int>(logits.shape[1]), .k = static_cast<int>(chosen.shape[1]),
                           .packed = CanPack(4, logits.shape[1], logits, scores), .pieces = pieces, .counts = Data<int32_t>(counts)},
                          counts.shape[0], stream);
}

DeviceResult TopKSigmoidBackward(TensorArg scores, TensorArg chosen, TensorArg weights, float scale, TensorArg dweights,
                                 TensorArg dshare, TensorArg dlogits, StreamArg stream) {
  const int64_t tokens = scores.shape[0], sequences = dshare.elements == 0 ? 1 : dshare.shape[0];
  return ChooseRowsBackward<true>(
      {.scores = Data<float>(scores), .chosen = Data<int32_t>(chosen), .weights = Data<float>(weights), .dweights = Data<float>(dweights),
       .dscores = Data<float>(dshare), .tokens_per_dscores = tokens / sequences, .scale = scale, .dlogits = Data<float>(dlogits),
       .tokens = tokens, .experts = static_cast<int>(scores.shape[1]), .k = static_cast<int>(chosen.shape[1]),
       .packed = CanPack(4, scores.shape[1], scores, dshare, dlogits)},
      stream);
}

}  // namespace shoal::cuda
