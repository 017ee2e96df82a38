#include "runtime/kernels/cuda/device_testing.h"

#include <cstdlib>
#include <cstring>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime/device/fake_device.h"
#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/matmul.h"

namespace shoal::kernels::testing {
namespace {

// What runs, and the table that puts it on a fake stream.
DeviceKernels g_own = {};
DeviceKernels g_queued = {};

// Tensors are kept by value: the caller's are gone when the work runs.
template <auto kKernel, class... Params> DeviceResult Queue(Params... params) {
  std::tuple<std::decay_t<Params>...> arguments(params...);
  DeviceStream* const stream = std::get<sizeof...(Params) - 1>(arguments);
  return FakeDevice::Current().Submit(stream, [arguments = std::move(arguments)] { return std::apply(g_own.*kKernel, arguments); });
}

template <auto kKernel, class... Params> void SetQueued(DeviceResult (*DeviceKernels::*)(Params...)) {
  g_queued.*kKernel = &Queue<kKernel, Params...>;
}
template <auto... kKernels> void SetAllQueued() { (SetQueued<kKernels>(kKernels), ...); }

DeviceResult QueueSumTensors(const DeviceTensor* from, int32_t count, const DeviceTensor& to, DeviceStream* stream) {
  return FakeDevice::Current().Submit(stream, [own = std::vector<DeviceTensor>(from, from + count), count, to, stream] {
    return g_own.sum_tensors(own.data(), count, to, stream);
  });
}

DeviceResult QueueQuantiseWeights(const DeviceTensor* weights, int32_t count, const DeviceTensor& codes, const DeviceTensor& transposed,
                                  const DeviceTensor& scales, DeviceStream* stream) {
  return FakeDevice::Current().Submit(
      stream, [own = std::vector<DeviceTensor>(weights, weights + count), count, codes, transposed, scales, stream] {
        return g_own.quantise_weights(own.data(), count, codes, transposed, scales, stream);
      });
}

DeviceResult MatMulOnCpu(const DeviceTensor& a, bool transpose_a, const DeviceTensor& b, bool transpose_b, const DeviceTensor& addend,
                         const DeviceTensor& c, DeviceStream*) {
  const auto host = [](const DeviceTensor& tensor) { return Tensor(tensor.data, {tensor.shape[0], tensor.shape[1]}, tensor.dtype); };
  const auto transpose = [](bool wanted) { return wanted ? Transpose::kYes : Transpose::kNo; };
  Stream cpu;
  MatMul(host(a), transpose(transpose_a), host(b), transpose(transpose_b), host(addend), host(c), cpu);
  return {};
}

const DeviceKernels* EmulatedKernels() {
  using K = DeviceKernels;
  g_own = cuda::OwnKernels();
  g_own.matmul = MatMulOnCpu;
  SetAllQueued<&K::convert, &K::add_to, &K::fill_normal, &K::embedding, &K::embedding_backward, &K::rms_norm, &K::rms_norm_backward,
               &K::rope, &K::swiglu, &K::swiglu_backward, &K::adamw, &K::clip_gradients, &K::sum_of_squares, &K::cross_entropy, &K::gather_rows,
               &K::sum_slots, &K::combine_slots, &K::combine_slots_backward, &K::topk_softmax, &K::topk_softmax_backward, &K::softmax,
               &K::softmax_backward, &K::topk_sigmoid, &K::topk_sigmoid_backward, &K::sum_shares, &K::top_tokens, &K::normalize_rows,
               &K::normalize_rows_backward, &K::sum_over_tokens, &K::sum_tally, &K::order_by_expert, &K::order_by_shares, &K::gradient_of_counts,
               &K::sequence_loads, &K::add_sequence_loss, &K::divide_by, &K::divide_by_backward, &K::matmul, &K::grouped_matmul,
               &K::grouped_matmul_grad_input, &K::grouped_matmul_grad_weight, &K::quantise_rows, &K::fp8_matmul, &K::grouped_matmul_swiglu,
               &K::document_starts, &K::attention, &K::attention_backward>();
  g_queued.quantise_weights = QueueQuantiseWeights;
  g_queued.sum_tensors = QueueSumTensors;
  return &g_queued;
}

Device* MakeDevice() {
  if (OnRealDevice()) {
    const absl::StatusOr<Device*> device = LoadDevice("cuda", 0);
    SHOAL_CHECK(device.ok()) << device.status().ToString();
    return *device;
  }
  auto* const fake = new FakeDevice({.kernels = EmulatedKernels()});
  absl::StatusOr<std::unique_ptr<Device>> device = Device::Create(fake->api(), 0);
  SHOAL_CHECK(device.ok()) << device.status().ToString();
  return device->release();
}

}  // namespace

bool OnRealDevice() {
  const char* wanted = std::getenv("SHOAL_TEST_DEVICE");
  SHOAL_CHECK(wanted == nullptr || std::string_view(wanted) == "cuda") << "SHOAL_TEST_DEVICE=" << wanted << ", want cuda";
  return wanted != nullptr;
}

Device& TestDevice() {
  static Device* const device = MakeDevice();
  return *device;
}

std::unique_ptr<Stream> TestStream() {
  absl::StatusOr<std::unique_ptr<Stream>> stream = TestDevice().NewStream();
  SHOAL_CHECK(stream.ok()) << stream.status().ToString();
  return *std::move(stream);
}

Tensor ToHostFunction::operator()(const Tensor& tensor, Stream& stream) const {
  const absl::StatusOr<Tensor> host = Download(tensor, stream);
  if (host.ok()) return *host;
  ADD_FAILURE() << host.status().ToString();
  const Tensor nothing = Empty(tensor.shape(), tensor.dtype());
  if (nothing.bytes() > 0) std::memset(nothing.raw(), 0xff, static_cast<size_t>(nothing.bytes()));
  return nothing;
}

Tally TallyOf(const Tensor& chosen, int64_t experts, int pieces, Stream& stream) {
  const int64_t K = chosen.dim(1);
  Tally tally = MakeTally(chosen.dim(0), experts, pieces, TallySums::kNo, stream);
  const int64_t each = tally.counts.dim(0) / pieces;
  const Tensor counts = Zeros(tally.counts.shape(), DType::kI32);
  const int32_t* choice = chosen.data<int32_t>();
  // Even parts, the first ones one longer.
  const auto part = [](int64_t total, int64_t parts, int64_t index) { return total / parts + (index < total % parts ? 1 : 0); };
  for (int64_t block = 0; block < counts.dim(0); ++block) {
    const int64_t tokens = part(part(chosen.dim(0), pieces, block / each), each, block % each);
    for (int64_t i = 0; i < tokens * K; ++i) ++counts.data<int32_t>()[block * experts + *choice++];
  }
  tally.counts = Upload(counts, stream);
  return tally;
}

}  // namespace shoal::kernels::testing
