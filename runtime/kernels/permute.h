// Token rows to slot order and back. A pair is one (token, expert) of a token's choices; pairs lie by token, those of token t at
// [offset[t], offset[t + 1]) of the list: offset_T1 (i32) has T + 1 elements, starts at 0 and does not fall. A token may have no
// pair. A slot is a row in the order in which experts read them: slot_S (i32) has the row of each pair, all different. T tokens,
// D width, S pairs, R >= S rows. "act" is f32 or bf16.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// rows_RD[r] = x_TD[token_R[r]]. Both act, alike.
void GatherRows(const Tensor& x, const Tensor& token, const Tensor& rows, Stream& stream);
// Gradient of GatherRows: dx_TD (act or f32, overwritten) = sum over the token's pairs, in their order, of drows_RD[slot_S].
void SumSlots(const Tensor& drows, const Tensor& offset, const Tensor& slot, const Tensor& dx, Stream& stream);

// out_TD (f32) = residual_TD (f32) + sum over the token's pairs, in their order, of weight_S (f32) * y_RD[slot_S]. out may be
// residual.
void CombineSlots(const Tensor& residual, const Tensor& y, const Tensor& offset, const Tensor& slot, const Tensor& weight,
                  const Tensor& out, Stream& stream);
// dy_RD (act) [slot_S] = weight_S * dout_TD of the pair's token; dweight_S (f32) = dot(dout_TD, y_RD[slot_S]). dout is f32. dy
// may be y. Rows of dy that are no pair's slot stay as they are.
void CombineSlotsBackward(const Tensor& dout, const Tensor& y, const Tensor& offset, const Tensor& slot, const Tensor& weight,
                          const Tensor& dy, const Tensor& dweight, Stream& stream);

namespace ref {
void GatherRows(const Tensor& x, const Tensor& token, const Tensor& rows, Stream& stream);
void SumSlots(const Tensor& drows, const Tensor& offset, const Tensor& slot, const Tensor& dx, Stream& stream);
void CombineSlots(const Tensor& residual, const Tensor& y, const Tensor& offset, const Tensor& slot, const Tensor& weight,
                  const Tensor& out, Stream& stream);
void CombineSlotsBackward(const Tensor& dout, const Tensor& y, const Tensor& offset, const Tensor& slot, const Tensor& weight,
                          const Tensor& dy, const Tensor& dweight, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
