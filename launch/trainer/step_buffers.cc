#include "launch/trainer/step_buffers.h"

#include <cstring>

#include "models/zoo/decoder.h"

namespace shoal {
namespace {

// On the CPU the same tensor.
Tensor TwinOf(const Tensor& tensor, Stream& stream) {
  return stream.device() == nullptr ? tensor : EmptyHost(tensor.shape(), tensor.dtype(), stream);
}

void CopyBytes(const Tensor& from, void* to) {
  if (!from.empty()) std::memcpy(to, from.raw(), static_cast<size_t>(from.bytes()));
}

}  // namespace

StepBuffers::StepBuffers(int64_t blocks, int parts, int waves, int64_t rows, int64_t seq, Stream& stream)
    : blocks_(blocks),
      parts_(parts),
      waves_(waves),
      rows_(rows),
      seq_(seq),
      stream_(&stream),
      tokens_(Empty({parts, 2, rows, seq}, DType::kI32, stream)),
      host_tokens_(TwinOf(tokens_, stream)),
      sums_(Empty({blocks + parts * waves}, DType::kF64, stream)),
      host_sums_(TwinOf(sums_, stream)),
      numbers_(Empty({kernels::kAdamWNumbers}, DType::kF64, stream)),
      host_numbers_(TwinOf(numbers_, stream)) {}

bool StepBuffers::Fits(const std::vector<Tensor>& parts, int waves) const {
  if (waves != waves_ || static_cast<int>(parts.size()) != parts_) return false;
  for (const Tensor& part : parts) {
    if (part.dim(0) != rows_ || part.dim(1) != seq_ + 1) return false;
  }
  return true;
}

void StepBuffers::Send(const Tensor& host, const Tensor& to) {
  if (stream_->device() != nullptr) Copy(host, to, *stream_);
}

void StepBuffers::Put(const std::vector<Tensor>& parts, const kernels::AdamWStep& update) {
  SHOAL_CHECK(Fits(parts, waves_)) << "tokens of another shape";
  if (!stream_->status().ok()) return;  // There may be no memory.
  for (int part = 0; part < parts_; ++part) {
    CopyBytes(Decoder::IdsAndTargets(parts[static_cast<size_t>(part)]), host_tokens_.Rows(part, 1).raw());
  }
  CopyBytes(kernels::AdamWNumbersOf(update), host_numbers_.raw());
  Send(host_tokens_, tokens_);
  SendNumbers();
}

Tensor StepBuffers::tokens(int part) const { return tokens_.Rows(part, 1).Reshape({2, rows_, seq_}); }
Tensor StepBuffers::losses(int part) const { return sums_.Rows(blocks_ + part * waves_, waves_); }
Tensor StepBuffers::squares() const { return sums_.Rows(0, blocks_); }

void StepBuffers::Clip(double clip) {
  kernels::ClipGradients(squares(), sums_.Rows(blocks_, parts_ * waves_), clip, numbers_, *stream_);
}

void StepBuffers::FetchSums() {
  if (stream_->device() != nullptr) Copy(sums_, host_sums_, *stream_);
}

Tensor StepBuffers::HostSums() {
  double* const losses = host_sums_.data<double>() + blocks_;
  double all = 0;
  for (int part = 0; part < parts_; ++part) {
    double of_part = 0;
    for (int wave = 0; wave < waves_; ++wave) of_part += losses[part * waves_ + wave];
    all += of_part;
  }
  losses[0] = all;
  return host_sums_.Rows(0, blocks_ + 1);
}

double StepBuffers::ClipOnHost(const Tensor& sums, double clip) {
  Stream cpu;
  kernels::ClipGradients(sums.Rows(0, blocks_), sums.Rows(blocks_, 1), clip, host_numbers_, cpu);
  return host_numbers_.data<double>()[kernels::kGradNorm];
}

}  // namespace shoal
