#include "models/layers/moe.h"

#include <numeric>

#include "parallel/placement/placement.h"
#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/permute.h"
#include "runtime/kernels/router.h"
#include "runtime/kernels/swiglu.h"

namespace shoal {
namespace {

using kernels::Accumulate;
using Direction = DispatchPlan::Direction;
using Use = TokenExchange::Use;

// The pairs of the tokens of one chunk, with offsets that begin at 0.
struct PairsOfChunk {
  Range tokens;
  Tensor offset, slot, weight, dweight;
};

PairsOfChunk PairsOf(const MoeLayer::Saved& saved, Direction direction, int chunk, const Tensor& dweight, Stream& stream) {
  const int64_t tokens = saved.offset.elements() - 1;
  const int chunks = saved.rows->chunks(direction);
  if (chunks == 1) return {{0, tokens}, saved.offset, saved.slot, saved.routed.weight, dweight};
  const int pieces = saved.rows->plan().pieces(), each = pieces / chunks;
  const Range first = EvenPart(tokens, pieces, chunk * each), last = EvenPart(tokens, pieces, (chunk + 1) * each - 1);
  PairsOfChunk pairs{{first.begin, last.begin + last.count - first.begin}, {}, {}, {}, {}};
  int64_t begin = 0, count = 0;
  if (saved.routed.offset.empty()) {  // Every token has as many pairs: those of the first ones begin where those of any others would.
    const int64_t each = tokens == 0 ? 0 : saved.slot.elements() / tokens;
    begin = pairs.tokens.begin * each, count = pairs.tokens.count * each;
    pairs.offset = saved.offset.Rows(0, pairs.tokens.count + 1);
  } else {
    const int32_t* offset = saved.routed.offset.data<int32_t>() + pairs.tokens.begin;
    const Tensor own = Empty({pairs.tokens.count + 1}, DType::kI32);
    for (int64_t t = 0; t <= pairs.tokens.count; ++t) own.data<int32_t>()[t] = offset[t] - offset[0];
    pairs.offset = ToDevice(own, stream);
    begin = offset[0], count = offset[pairs.tokens.count] - offset[0];
  }
  pairs.slot = saved.slot.Rows(begin, count);
  pairs.weight = saved.routed.weight.Rows(begin, count);
  if (dweight.elements() > 0) pairs.dweight = dweight.Rows(begin, count);
  return pairs;
}

// All experts on one rank that knows of no other.
ExpertPlacement Alone(int experts) { return ExpertPlacement(static_cast<size_t>(experts)); }

}  // namespace

bool RoutesOnStream(const ModelConfig& config, const ExpertContext& context, const Stream& stream) {
  return stream.device() != nullptr && context.control == nullptr && context.topology.ranks() == 1 &&
         context.numerics == Numerics::kFast && !config.has_capacity();
}

Tensor NewRoutingSums(const ModelConfig& config, const ExpertContext& context, int64_t layers, Stream& stream) {
  const Shape shape = {layers, RoutingSums::Width(config.num_local_experts)};
  return RoutesOnStream(config, context, stream) ? Zeros(shape, DType::kF64, stream) : Zeros(shape, DType::kF64);
}

MoeLayer::MoeLayer(const ModelConfig& config, int layer, ParameterStore& store, const ExpertContext& context)
    : config_(config),
      layer_(layer),
      store_(&store),
      context_(&context),
      epsilon_(static_cast<float>(config.rms_norm_eps)),
      norm_(absl::StrCat("model.layers.", layer, ".post_attention_layernorm.weight")),
      router_(MakeRouter(config, layer, store)),
      gate_up_(store),
      down_(store) {
  if (config.shared_intermediate_size > 0) {
    shared_.emplace(absl::StrCat("model.layers.", layer, ".mlp.shared_experts."), config.hidden_size,
                    config.shared_intermediate_size, store);
  }
}

// ---- Forward.

void MoeLayer::Route(const Tensor& x, const Tensor& delta, Router::Batch batch, Chunks chunks, Saved* saved,
                     const RoutingSums* sums, Stream& stream) {
  SHOAL_CHECK(context_->numerics == Numerics::kFast || (saved->wave == 0 && chunks.forward == 1 && chunks.backward == 1))
      << "the pinned order of sums is that of one wave and one chunk";
  saved->chunks = chunks;
  saved->batch = std::move(batch);
  const bool on_stream = RoutesOnStream(config_, *context_, stream);
  saved->batch.pieces = on_stream ? 1 : PiecesFor(chunks.forward, chunks.backward);
  saved->batch.rank = context_->rank;
  if (context_->control == nullptr) {
    saved->batch.tokens_of_rank = {x.dim(0)};
    saved->batch.rank = 0;
  }
  saved->x = Empty(x.shape(), DType::kF32, stream);
  saved->normed = Empty(x.shape(), delta.dtype(), stream);
  saved->rstd = Empty({x.dim(0)}, DType::kF32, stream);
  kernels::RmsNorm(x, delta, store_->Weight(norm_, {config_.hidden_size}), epsilon_, saved->x, saved->normed, saved->rstd,
                   stream);
  // Computing the layer again, the host has the counts of all ranks; with capacities it needs the choices, too.
  const bool counted = !saved->summaries.empty() && !config_.has_capacity();
  saved->summary = on_stream || counted
                       ? Tensor()
                       : Empty({router_->SummaryElements(x.dim(0), saved->batch.pieces)}, router_->SummaryType());
  saved->routing = router_->Score(saved->normed, saved->batch, saved->summary, sums, stream);
}

absl::StatusOr<int64_t> MoeLayer::Exchange(Saved* saved) {
  if (context_->control == nullptr) return 0;
  std::vector<int64_t> counts;
  for (int64_t tokens : saved->batch.tokens_of_rank) counts.push_back(router_->SummaryElements(tokens, saved->batch.pieces));
  saved->summaries = Empty({std::accumulate(counts.begin(), counts.end(), int64_t{0})}, router_->SummaryType());
  SHOAL_RETURN_IF_ERROR(
      context_->control->AllGather(saved->summary, counts, saved->summaries, {.label = "routing"}).Await(),
      "exchanging routing summaries");
  return saved->summaries.bytes();
}

absl::StatusOr<Tensor> MoeLayer::Rows(Use use, int64_t rows, const Saved& saved, Stream& stream) {
  if (saved.rows->all_stay()) return Empty({rows, config_.hidden_size}, saved.normed.dtype(), stream);
  return context_->exchange->SendBuffer(use, saved.wave, rows, config_.hidden_size, saved.normed.dtype());
}

absl::Status MoeLayer::Arrange(Saved* saved, const RoutingSums* sums, Stream& stream) {
  SHOAL_RETURN_IF_ERROR(stream.status());  // The counts of a device that failed are those of nothing.
  const bool alone = context_->control == nullptr;
  // Computing the layer again, its ranks need not ask each other again.
  const Tensor& summaries = alone ? saved->summary : saved->summaries;
  saved->routed = router_->Choose(summaries, saved->batch, *saved->routing, sums, stream);
  if (saved->routed.segments.empty()) {
    if (!alone && saved->first && context_->calibrate != nullptr) Calibrate(*saved);
    PlanRows(saved, stream);
  } else {
    saved->rows.emplace(saved->routed);
    saved->slot = saved->routed.slot;
    saved->token = saved->routed.token;
    saved->offset = saved->routed.offset;
  }
  const ExpertRows& rows = *saved->rows;
  const DType act = saved->normed.dtype();
  SHOAL_ASSIGN_OR_RETURN(saved->sent, Rows(Use::kDispatch, rows.sent(), *saved, stream));
  SHOAL_ASSIGN_OR_RETURN(saved->results, Rows(Use::kReturn, rows.arrived(), *saved, stream));
  saved->arrived = rows.all_stay() ? saved->sent : Empty({rows.arrived(), config_.hidden_size}, act, stream);
  saved->y = rows.all_stay() ? saved->results : Empty({rows.sent(), config_.hidden_size}, act, stream);
  saved->gate_up = Empty({rows.arrived(), 2 * config_.intermediate_size}, act, stream);
  return stream.status();
}

void MoeLayer::PlanRows(Saved* saved, Stream& stream) const {
  const bool alone = context_->control == nullptr;
  const ExpertPlacement& placement =
      alone ? Alone(config_.num_local_experts) : store_->experts().placement()[static_cast<size_t>(layer_)];
  saved->rows.emplace(DispatchPlan::Make(
      alone ? Topology::OneHost(1) : context_->topology, placement, LocalExperts(placement, alone ? 0 : context_->rank),
      saved->routed.rows,
      {.rank = alone ? 0 : context_->rank,
       .forward_chunks = saved->chunks.forward,
       .backward_chunks = saved->chunks.backward,
       .rule = context_->rule}));
  const DispatchPlan& plan = saved->rows->plan();
  if (saved->routed.offset.empty()) {
    const int64_t tokens = saved->x.dim(0);
    SHOAL_CHECK_EQ(saved->routed.expert.elements(), plan.sent()) << "every choice stays";
    saved->slot = Empty({plan.sent()}, DType::kI32, stream);
    saved->token = Empty({plan.sent()}, DType::kI32, stream);
    saved->offset = Empty({tokens + 1}, DType::kI32, stream);
    kernels::OrderByShares(saved->routed.expert.Reshape({tokens, config_.num_experts_per_tok}), saved->routed.tally,
                           ToDevice(plan.Shares(), stream), saved->offset, saved->slot, saved->token, stream);
    for (const Tensor* used : {&saved->routed.expert, &saved->routed.tally.counts}) UsedOn(*used, stream);
    saved->routed.tally = {};
    return;
  }
  const Tensor slot = Empty({plan.sent()}, DType::kI32), token = Empty({plan.sent()}, DType::kI32);
  plan.OrderRows(saved->routed.offset, saved->routed.expert, slot, token);
  saved->slot = ToDevice(slot, stream);
  saved->token = ToDevice(token, stream);
  saved->offset = ToDevice(saved->routed.offset, stream);
}

void MoeLayer::Calibrate(const Saved& saved) {
  ExpertStore& experts = store_->experts();
  std::vector<int64_t> rows;
  AddRows(saved, &rows);
  experts.AddHolders(layer_, context_->calibrate(experts.placement()[static_cast<size_t>(layer_)], rows));
}

void MoeLayer::AddRows(const Saved& saved, std::vector<int64_t>* rows) const {
  if (context_->control == nullptr) return;
  const size_t ranks = static_cast<size_t>(context_->topology.ranks()), pieces = static_cast<size_t>(saved.batch.pieces);
  const size_t experts = saved.routed.rows.size() / (ranks * pieces);
  rows->resize(ranks * experts);
  for (size_t i = 0; i < saved.routed.rows.size(); ++i) {
    (*rows)[i / (pieces * experts) * experts + i % experts] += saved.routed.rows[i];
  }
}

int64_t MoeLayer::Pack(int chunk, Saved* saved, Stream& stream) {
  int64_t rows = 0;
  for (const ExpertRows::Run& run : saved->rows->Rows(Direction::kForward, chunk, /*sends=*/true)) {
    kernels::GatherRows(saved->normed, saved->token.Rows(run.begin, run.rows), saved->sent.Rows(run.begin, run.rows), stream);
    rows += run.rows;
  }
  return rows;
}

std::vector<Tensor> MoeLayer::Matrices(const std::vector<Tensor>& experts, bool down) const {
  const int64_t width = config_.hidden_size, inner = config_.intermediate_size;
  std::vector<Tensor> matrices;
  for (const Tensor& flat : experts) {
    matrices.push_back(down ? flat.Elements(2 * inner * width, {width, inner}) : flat.Elements(0, {2 * inner, width}));
  }
  return matrices;
}

std::vector<Tensor> MoeLayer::LocalWeights(bool down) const {
  std::vector<Tensor> weights;
  for (int expert : store_->experts().Local(layer_)) weights.push_back(store_->experts().Weights(layer_, expert));
  return Matrices(weights, down);
}

std::vector<Tensor> MoeLayer::LocalGradients(bool down) const {
  std::vector<Tensor> gradients;
  for (int expert : store_->experts().Local(layer_)) gradients.push_back(store_->experts().Gradients(layer_, expert));
  return Matrices(gradients, down);
}

int64_t MoeLayer::Experts(int chunk, Saved* saved, Stream& stream) {
  int64_t rows = 0;
  for (const ExpertRows::Run& run : saved->rows->Rows(Direction::kForward, chunk, /*sends=*/false)) {
    const Tensor gate_up = saved->gate_up.Rows(run.begin, run.rows);
    const Tensor h = Empty({run.rows, config_.intermediate_size}, gate_up.dtype(), stream);
    saved->rows->ForwardSwiGlu(gate_up_, chunk, run, saved->arrived.Rows(run.begin, run.rows), LocalWeights(/*down=*/false), gate_up, h,
                               context_->numerics, stream);
    saved->rows->Forward(down_, chunk, run, h, LocalWeights(/*down=*/true), saved->results.Rows(run.begin, run.rows),
                         context_->numerics, stream);
    rows += run.rows;  // A forward chunk is one run.
  }
  return rows;
}

void MoeLayer::Shared(Saved* saved, Stream& stream) {
  saved->out = Empty(saved->x.shape(), DType::kF32, stream);
  shared_->Forward(saved->normed, saved->x, &saved->shared_gate_up, saved->out, stream);
}

int64_t MoeLayer::Combine(int chunk, Saved* saved, Stream& stream) {
  if (saved->out.rank() == 1) saved->out = Empty(saved->x.shape(), DType::kF32, stream);
  if (saved->rows->IsEmpty(chunk)) return 0;
  const PairsOfChunk pairs = PairsOf(*saved, Direction::kForward, chunk, Tensor(), stream);
  const Range tokens = pairs.tokens;
  const Tensor out = saved->out.Rows(tokens.begin, tokens.count);
  kernels::CombineSlots(shared_.has_value() ? out : saved->x.Rows(tokens.begin, tokens.count), saved->y, pairs.offset,
                        pairs.slot, pairs.weight, out, stream);
  return pairs.slot.elements();
}

// ---- Backward.

absl::StatusOr<int64_t> MoeLayer::PackBackward(int chunk, const Tensor& gradient, Saved* saved, Stream& stream) {
  const ExpertRows& rows = *saved->rows;
  if (rows.IsEmpty(chunk)) return 0;
  const DType act = saved->normed.dtype();
  if (chunk == 0) {
    saved->sent = Tensor();
    saved->dweight = Empty({rows.sent()}, DType::kF32, stream);
    SHOAL_ASSIGN_OR_RETURN(saved->dy_home, Rows(Use::kDispatch, rows.sent(), *saved, stream));
    SHOAL_ASSIGN_OR_RETURN(saved->dx, Rows(Use::kReturn, rows.arrived(), *saved, stream));
    saved->dy = rows.all_stay() ? saved->dy_home : Empty({rows.arrived(), config_.hidden_size}, act, stream);
    saved->dx_home = rows.all_stay() ? saved->dx : Empty({rows.sent(), config_.hidden_size}, act, stream);
    saved->dh = Empty({rows.arrived(), config_.intermediate_size}, act, stream);
  }
  const PairsOfChunk pairs = PairsOf(*saved, Direction::kBackward, chunk, saved->dweight, stream);
  kernels::CombineSlotsBackward(gradient.Rows(pairs.tokens.begin, pairs.tokens.count), saved->y, pairs.offset, pairs.slot,
                                pairs.weight, saved->dy_home, pairs.dweight, stream);
  if (chunk + 1 == rows.chunks(Direction::kBackward)) saved->y = saved->results = Tensor();
  return pairs.slot.elements();
}

int64_t MoeLayer::ExpertsBackward(int chunk, Saved* saved, Stream& stream) {
  const ExpertRows& rows = *saved->rows;
  if (rows.IsEmpty(chunk)) return 0;
  rows.BackwardInput(down_, chunk, saved->dy, LocalWeights(/*down=*/true), saved->dh, context_->numerics, stream);
  for (const ExpertRows::Run& run : rows.Rows(Direction::kBackward, chunk, /*sends=*/false)) {
    const Tensor dh = saved->dh.Rows(run.begin, run.rows), gate_up = saved->gate_up.Rows(run.begin, run.rows);
    kernels::SwiGluBackward(dh, gate_up, gate_up, dh, stream);  // gate_up: its gradient; dh: h.
  }
  rows.BackwardInput(gate_up_, chunk, saved->gate_up, LocalWeights(/*down=*/false), saved->dx, context_->numerics, stream);
  return rows.Count(chunk);
}

int64_t MoeLayer::ExpertsWeight(int chunk, int part, Saved* saved, Stream& stream) {
  const ExpertRows& rows = *saved->rows;
  if (rows.IsEmpty(chunk)) return 0;
  if (context_->numerics == Numerics::kPinned) {
    PinnedWeight(part, *saved, stream);
  } else {
    const Accumulate accumulate =
        chunk == 0 && saved->wave == 0 ? store_->experts().BeginGradients(layer_, part, stream) : Accumulate::kAdd;
    rows.BackwardWeight(chunk, saved->dy, saved->dh, accumulate, LocalGradients(/*down=*/true), &down_gradients_, stream);
    rows.BackwardWeight(chunk, saved->gate_up, saved->arrived, accumulate, LocalGradients(/*down=*/false), &gate_up_gradients_, stream);
  }
  if (chunk + 1 == rows.chunks(Direction::kBackward)) saved->dy = saved->dh = saved->arrived = saved->gate_up = Tensor();
  return rows.Count(chunk);
}

void MoeLayer::PinnedWeight(int part, const Saved& saved, Stream& stream) {
  ExpertStore& experts = store_->experts();
  const std::vector<int>& local = experts.Local(layer_);
  const DispatchPlan& plan = saved.rows->plan();
  experts.BeginPartials(layer_, part, plan.shares(), stream);
  for (int source = 0; source < static_cast<int>(plan.shares().size()); ++source) {
    std::vector<kernels::Segment> segments = plan.SegmentsFrom(source);
    std::vector<int> chosen;
    std::vector<Tensor> partials;
    for (kernels::Segment& segment : segments) {
      chosen.push_back(local[static_cast<size_t>(segment.expert)]);
      segment.expert = static_cast<int>(partials.size());
      partials.push_back(Empty({experts.expert_elements()}, DType::kF32, stream));
    }
    kernels::GroupedMatMulGradWeight(saved.dy, saved.dh, segments, Accumulate::kOverwrite, Matrices(partials, /*down=*/true), stream);
    kernels::GroupedMatMulGradWeight(saved.gate_up, saved.arrived, segments, Accumulate::kOverwrite,
                                     Matrices(partials, /*down=*/false), stream);
    for (size_t i = 0; i < partials.size(); ++i) experts.AddPartial(layer_, chosen[i], source, std::move(partials[i]), stream);
  }
}

void MoeLayer::SharedBackward(const Tensor& gradient, Accumulate accumulate, Saved* saved, Stream& stream) {
  Tensor dy = gradient;
  if (saved->normed.dtype() != DType::kF32) {
    dy = Empty(gradient.shape(), saved->normed.dtype(), stream);
    kernels::Convert(gradient, dy, stream);
  }
  shared_->Backward(dy, saved->normed, saved->shared_gate_up, accumulate, stream);
}

void MoeLayer::RouteBackward(const RoutingGradient& routing, Accumulate accumulate, const Tensor& gradient, Saved* saved,
                             Stream& stream) {
  const Tensor dnormed = Empty(gradient.shape(), DType::kF32, stream);
  kernels::SumSlots(saved->dx_home, saved->offset, saved->slot, dnormed, stream);
  if (shared_.has_value()) shared_->BackwardInput(saved->shared_gate_up, Accumulate::kAdd, dnormed, stream);
  router_->Backward(*saved->routing, saved->dweight, routing, accumulate, dnormed, stream);
  const Shape shape = {config_.hidden_size};
  kernels::RmsNormBackward(dnormed, saved->x, store_->Weight(norm_, shape), saved->rstd, gradient,
                           store_->Gradient(norm_, shape), stream);
}

// ---- Rows on their way.

MoeLayer::Ends MoeLayer::EndsOf(Phase phase, TokenExchange::Way way, const Saved& saved) {
  const bool there = way == TokenExchange::Way::kThere;
  if (phase == Phase::kBackward) return there ? Ends{saved.dy_home, saved.dy} : Ends{saved.dx, saved.dx_home};
  return there ? Ends{saved.sent, saved.arrived} : Ends{saved.results, saved.y};
}

absl::StatusOr<int64_t> MoeLayer::Travel(const Task& task, Saved* saved) {
  const auto way = task.op == Op::kDispatch ? TokenExchange::Way::kThere : TokenExchange::Way::kBack;
  const Direction direction = task.phase == Phase::kBackward ? Direction::kBackward : Direction::kForward;
  const Ends ends = EndsOf(task.phase, way, *saved);
  return context_->exchange->Travel(saved->rows->plan(), {direction, task.chunk, way}, task.lane, ends.from, ends.to);
}

int64_t MoeLayer::Stay(const Task& task, Saved* saved, Stream& stream) {
  const auto way = task.back ? TokenExchange::Way::kBack : TokenExchange::Way::kThere;
  const Direction direction = task.phase == Phase::kBackward ? Direction::kBackward : Direction::kForward;
  const Ends ends = EndsOf(task.phase, way, *saved);
  return context_->exchange->Stay(saved->rows->plan(), {direction, task.chunk, way}, ends.from, ends.to, stream);
}

}  // namespace shoal
