#include "runtime/device/device.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/check.h"
#include "runtime/base/log.h"

namespace shoal {
namespace {

// What the calling thread has chosen, so that choosing it again costs nothing.
thread_local const DeviceApi* t_api = nullptr;
thread_local int t_ordinal = -1;

absl::StatusCode CodeOf(DeviceResult::Code code) {
  switch (code) {
    case DeviceResult::Code::kOk: return absl::StatusCode::kOk;
    case DeviceResult::Code::kOutOfMemory: return absl::StatusCode::kResourceExhausted;
    case DeviceResult::Code::kUnavailable: return absl::StatusCode::kUnavailable;
    case DeviceResult::Code::kNotReady:
    case DeviceResult::Code::kFailed: break;
  }
  return absl::StatusCode::kInternal;
}

absl::Status ToStatus(std::string_view device, const DeviceResult& result, std::string_view what) {
  if (result.code == DeviceResult::Code::kOk) return absl::OkStatus();
  return absl::Status(CodeOf(result.code), absl::StrCat(AbslSv(device), ": ", AbslSv(what), ": ",
                                                        result.message == nullptr ? "" : result.message));
}

}  // namespace

Device::Device(const DeviceApi& api, int ordinal)
    : api_(api), ordinal_(ordinal), name_(absl::StrCat(api.name, ":", ordinal)), memory_(this), pinned_(this) {}

absl::StatusOr<std::unique_ptr<Device>> Device::Create(const DeviceApi& api, int ordinal) {
  if (api.version != kDeviceApiVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("the device plug-in has version ", api.version, ", this program needs ", kDeviceApiVersion));
  }
  int32_t devices = 0;
  SHOAL_RETURN_IF_ERROR(ToStatus(api.name, api.count(&devices), "looking for devices"));
  if (ordinal < 0 || ordinal >= devices) {
    return absl::UnavailableError(absl::StrCat(api.name, ": no device ", ordinal, " among ", devices));
  }
  std::unique_ptr<Device> device(new Device(api, ordinal));
  SHOAL_RETURN_IF_ERROR(device->StatusOf(api.use(ordinal), "choosing the device"));
  SHOAL_RETURN_IF_ERROR(device->StatusOf(api.properties(ordinal, &device->properties_), "asking for its properties"));
  return device;
}

Device::~Device() {
  memory_.Close();
  pinned_.Close();
  Use();
  MutexLock lock(&mutex_);
  SHOAL_CHECK(streams_.empty()) << name_ << " ends before " << streams_.size() << " of its streams";
  for (std::vector<DeviceEvent*>& events : spare_events_) {
    for (DeviceEvent* event : events) api_.destroy_event(event);
    events.clear();
  }
}

void Device::Use() const {
  if (t_api == &api_ && t_ordinal == ordinal_) return;
  if (api_.use(ordinal_).code != DeviceResult::Code::kOk) return;
  t_api = &api_;
  t_ordinal = ordinal_;
}

absl::Status Device::StatusOf(const DeviceResult& result, std::string_view what) const { return ToStatus(name_, result, what); }

absl::StatusOr<std::unique_ptr<Stream>> Device::NewStream() {
  auto stream = std::make_unique<Stream>();
  Use();
  SHOAL_RETURN_IF_ERROR(StatusOf(api_.create_stream(&stream->handle_), "creating a stream"));
  stream->device_ = this;
  stream->id_ = NewOwner();
  MutexLock lock(&mutex_);
  streams_[stream->id_] = {.handle = stream->handle_};
  return stream;
}

// The stream's work is done: what it has freed is anybody's.
void Device::Remove(Stream* stream) {
  {
    MutexLock lock(&mutex_);
    streams_.erase(stream->id_);
  }
  memory_.HandOver(stream->id_, BlockTable::kNobody);
  Use();
  api_.destroy_stream(stream->handle_);
}

absl::Status Device::Record(DeviceStream* stream, Timing timing, DeviceResult (*record)(DeviceEvent*, DeviceStream*),
                            Event* event) {
  Use();
  DeviceEvent* handle = nullptr;
  {
    MutexLock lock(&mutex_);
    std::vector<DeviceEvent*>& spare = spare_events_[static_cast<int>(timing)];
    if (!spare.empty()) {
      handle = spare.back();
      spare.pop_back();
    }
  }
  if (handle == nullptr) {
    SHOAL_RETURN_IF_ERROR(StatusOf(api_.create_event(timing == Timing::kYes, &handle), "creating an event"));
  }
  const absl::Status status = StatusOf(record(handle, stream), "recording an event");
  if (!status.ok()) {
    Recycle(handle, timing);
    return status;
  }
  *event = Event();
  event->device_ = this;
  event->handle_ = handle;
  event->timing_ = timing;
  return absl::OkStatus();
}

absl::Status Device::RecordOn(int stream, Event* event) {
  DeviceStream* handle = nullptr;
  {
    MutexLock lock(&mutex_);
    const auto found = streams_.find(stream);
    if (found != streams_.end()) {
      if (found->second.capture != nullptr && found->second.capture->open) {
        return absl::FailedPreconditionError("the stream records a graph");
      }
      handle = found->second.handle;
    }
  }
  if (handle != nullptr) return Record(handle, Timing::kNo, api_.record, event);
  *event = Event();
  return absl::OkStatus();
}

void Device::SetCapture(int stream, std::shared_ptr<StreamCapture> capture) {
  MutexLock lock(&mutex_);
  streams_.at(stream).capture = std::move(capture);
}

void Device::HandOver(const std::vector<int>& owners, int stream) {
  for (const int owner : owners) {
    memory_.HandOver(owner, stream);
    pinned_.HandOver(owner, stream);
  }
}

void Device::Recycle(DeviceEvent* event, Timing timing) {
  MutexLock lock(&mutex_);
  spare_events_[static_cast<int>(timing)].push_back(event);
}

}  // namespace shoal
