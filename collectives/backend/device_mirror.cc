#include "collectives/backend/device_mirror.h"

#include <utility>
#include <vector>

#include "collectives/backend/operation_group.h"
#include "collectives/engine/work_state.h"
#include "runtime/base/check.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/device/stream.h"

namespace shoal {
namespace {

std::byte* Begin(const Tensor& tensor) { return static_cast<std::byte*>(tensor.raw()); }

class DeviceMirror final : public OperationGroup {
 public:
  DeviceMirror(Communicator& group, std::unique_ptr<Stream> stream) : group_(group), stream_(std::move(stream)) {}

  int index() const override { return group_.index(); }
  int size() const override { return group_.size(); }
  Epoch epoch() const override { return group_.epoch(); }
  absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype) override { return Zeros(std::move(shape), dtype); }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(absl::Span<const int>) override {
    return absl::UnimplementedError("split the group beneath");
  }
  void Abort(const absl::Status& cause) override { group_.Abort(cause); }
  absl::Status status() const override { return group_.status(); }
  void OnAbort(std::function<void(const absl::Status&)> callback) override { group_.OnAbort(std::move(callback)); }

 private:
  struct Pair {
    Tensor host, device;
    bool written = false;
  };

  Work Issue(Operation op, const OpOptions& options) override {
    auto pairs = std::make_shared<std::vector<Pair>>();
    {
      const MutexLock lock(&mutex_);
      ReplaceTensors(&op, index(), [&](const Tensor& tensor, bool, bool writes) { return OnDevice(tensor, writes, pairs.get()); });
      SHOAL_CHECK(stream_->Wait().ok()) << stream_->status().ToString();
    }
    auto state = std::make_shared<QueuedWork>(std::weak_ptr<WorkRunner>());
    IssueOn(group_, op, options.deadline).OnDone([this, pairs, state](const absl::Status& result) {
      absl::Status status = result;
      if (status.ok()) {
        const MutexLock lock(&mutex_);
        for (const Pair& pair : *pairs) {
          if (pair.written) Copy(pair.device, pair.host, *stream_);
        }
        status = stream_->Wait();
      }
      pairs->clear();
      state->Finish(status);
    });
    return Work(state);
  }

  Tensor OnDevice(const Tensor& tensor, bool writes, std::vector<Pair>* pairs) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (tensor.empty()) return tensor;
    for (const Pair& pair : *pairs) {
      const int64_t offset = Begin(tensor) - Begin(pair.host);
      if (offset < 0 || offset + tensor.bytes() > pair.host.bytes()) continue;
      const Tensor part = pair.device.Elements(offset / SizeOf(tensor.dtype()), tensor.shape());
      pairs->push_back({tensor, part, writes});
      return part;
    }
    const Tensor device = Empty(tensor.shape(), tensor.dtype(), *stream_);
    Copy(tensor, device, *stream_);
    pairs->push_back({tensor, device, writes});
    return device;
  }

  Communicator& group_;
  Mutex mutex_;
  const std::unique_ptr<Stream> stream_;  // Used under the mutex.
};

}  // namespace

std::unique_ptr<Communicator> MirrorOnDevice(Communicator& group, Device& device) {
  absl::StatusOr<std::unique_ptr<Stream>> stream = device.NewStream();
  SHOAL_CHECK(stream.ok()) << stream.status().ToString();
  return std::make_unique<DeviceMirror>(group, *std::move(stream));
}

}  // namespace shoal
