// Where the documents begin that sequences are packed from: what attention.h needs to stay within them.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// first[rows * seq] (i32): for each token of tokens[rows, seq] (i32) the number, within its sequence, of its document's first token.
// A document ends with its token `end_of_document`; a sequence begins one, or goes on with one that began before it.
void DocumentStarts(const Tensor& tokens, int32_t end_of_document, const Tensor& first, Stream& stream);

namespace ref {
void DocumentStarts(const Tensor& tokens, int32_t end_of_document, const Tensor& first, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
