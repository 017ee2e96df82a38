#include "runtime/device/stream.h"

#include <utility>

#include "runtime/base/check.h"
#include "runtime/base/log.h"
#include "runtime/device/device.h"

namespace shoal {

Event& Event::operator=(Event&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  std::swap(timing_, other.timing_);
  std::swap(capture_, other.capture_);
  std::swap(status_, other.status_);
  return *this;
}

Event::~Event() {
  if (handle_ != nullptr) device_->Recycle(handle_, timing_);
}

bool Event::Done() const {
  if (handle_ == nullptr) return true;
  device_->Use();
  return device_->api().query_event(handle_).code != DeviceResult::Code::kNotReady;
}

absl::Status Event::Wait() const {
  if (handle_ == nullptr) return status_;
  device_->Use();
  device_->CountWait();
  const absl::Status waited = device_->StatusOf(device_->api().wait_event(handle_), "waiting for an event");
  return status_.ok() ? waited : status_;
}

absl::StatusOr<double> Event::Milliseconds(const Event& begin, const Event& end) {
  if (begin.handle_ == nullptr || end.handle_ == nullptr) return 0.0;
  SHOAL_CHECK(begin.timing_ == Timing::kYes && end.timing_ == Timing::kYes) << "events without times";
  float milliseconds = 0;
  begin.device_->Use();
  SHOAL_RETURN_IF_ERROR(begin.device_->StatusOf(begin.device_->api().elapsed_ms(begin.handle_, end.handle_, &milliseconds),
                                                "reading the time between events"));
  return milliseconds;
}

CapturedGraph& CapturedGraph::operator=(CapturedGraph&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  std::swap(owners_, other.owners_);
  std::swap(stream_, other.stream_);
  return *this;
}

// Launches may still be under way; the driver keeps the graph until they end, and what uses its memory next is behind them.
CapturedGraph::~CapturedGraph() {
  if (handle_ == nullptr) return;
  device_->Use();
  device_->api().destroy_graph(handle_);
  device_->HandOver(owners_, stream_);
}

Stream::~Stream() {
  if (device_ == nullptr) return;
  if (capturing()) (void)EndCapture();
  const absl::Status status = Wait();
  if (!status.ok()) SHOAL_LOG(kWarning) << "a stream ends with: " << std::string(status.message());
  device_->Remove(this);
}

absl::Status Stream::Wait() {
  if (device_ == nullptr) return status_;
  device_->Use();
  device_->CountWait();
  Fail(device_->StatusOf(device_->api().wait_stream(handle_), "waiting for a stream"));
  return status_;
}

Event Stream::Record(Timing timing) {
  Event event;
  const bool by_launches = capturing() && timing == Timing::kYes;
  if (device_ != nullptr) {
    const DeviceApi& api = device_->api();
    Fail(device_->Record(handle_, timing, by_launches ? api.record_in_graph : api.record, &event));
  }
  if (capturing() && !by_launches) event.capture_ = capture_;
  event.status_ = status_;
  return event;
}

void Stream::WaitFor(const Event& event) {
  Fail(event.status_);
  if (event.handle_ == nullptr) return;
  if (device_ == nullptr) {
    Fail(event.Wait());
  } else {
    device_->Use();
    Fail(device_->StatusOf(device_->api().wait_for(handle_, event.handle_), "making a stream wait"));
    if (status_.ok() && event.capture_ != nullptr && !capturing()) Join(event.capture_);
  }
}

void Stream::Join(std::shared_ptr<StreamCapture> capture) {
  capture_ = std::move(capture);
  capture_owner_ = -device_->NewOwner();
  capture_->owners.push_back(capture_owner_);
  device_->SetCapture(id_, capture_);
}

absl::Status Stream::BeginCapture() {
  SHOAL_CHECK(device_ != nullptr && !capturing()) << "recording needs a device's stream that does not record yet";
  SHOAL_RETURN_IF_ERROR(status_);
  device_->Use();
  SHOAL_RETURN_IF_ERROR(device_->StatusOf(device_->api().begin_capture(handle_), "beginning to record a graph"));
  Join(std::make_shared<StreamCapture>());
  return absl::OkStatus();
}

absl::StatusOr<CapturedGraph> Stream::EndCapture() {
  SHOAL_CHECK(capturing()) << "recording has not begun";
  CapturedGraph graph;
  capture_->open = false;
  graph.owners_ = capture_->owners;
  graph.stream_ = id_;
  capture_ = nullptr;
  device_->Use();
  const absl::Status ended = device_->StatusOf(device_->api().end_capture(handle_, &graph.handle_), "recording a graph");
  // Nothing has been done, so the stream can go on.
  const absl::Status failed = std::exchange(status_, absl::OkStatus());
  if (!ended.ok()) {
    device_->HandOver(graph.owners_, id_);
    return failed.ok() ? ended : failed;
  }
  graph.device_ = device_;
  SHOAL_RETURN_IF_ERROR(failed);
  return graph;
}

void Stream::Launch(const CapturedGraph& graph) {
  SHOAL_CHECK(graph.device_ == device_ && graph.stream_ == id_) << "a graph of another stream";
  if (!status_.ok()) return;
  device_->Use();
  Fail(device_->StatusOf(device_->api().launch_graph(graph.handle_, handle_), "launching a graph"));
}

}  // namespace shoal
