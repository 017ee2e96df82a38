#include "runtime/device/fake_device.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "runtime/device/fake_memory.h"

namespace shoal {
namespace {

using Code = DeviceResult::Code;

constexpr size_t kPage = 4096;

FakeDevice* g_current = nullptr;
thread_local int t_device = 0;
thread_local std::string t_message;

DeviceResult Say(Code code, std::string message) {
  t_message = std::move(message);
  return {code, t_message.c_str()};
}

// How much of the work of each stream comes before a point of a graph that is recorded.
using Seen = std::map<DeviceStream*, int64_t>;

// A point in the work of a stream.
struct Mark {
  DeviceStream* stream;
  std::shared_ptr<struct Capture> capture;  // Recorded, not done: passes never.
  Seen seen;                                // Then.
  bool passed = false;
  int64_t time = 0;
};

// One of these.
struct Op {
  std::function<DeviceResult()> run;
  std::shared_ptr<Mark> after;   // The stream goes on once this has passed.
  std::shared_ptr<Mark> passes;  // Even if the stream has failed.
};

struct Capture {
  bool open = true;
  std::vector<Op> ops;
  DeviceStream* origin = nullptr;
  std::map<DeviceStream*, Seen> streams;  // What comes before the next work of each.

  void Join(DeviceStream* stream) { ++streams[stream][stream]; }
  // All work of all streams comes before the end of the one that began.
  bool IsJoined() {
    const Seen& end = streams[origin];
    return std::all_of(streams.begin(), streams.end(), [&](const auto& stream) {
      const auto seen = end.find(stream.first);
      return seen != end.end() && seen->second == stream.second.at(stream.first);
    });
  }
};

}  // namespace

struct DeviceStream {
  int device;
  std::deque<Op> ops;
  std::shared_ptr<Capture> capture;
  Code failure = Code::kOk;
  std::string message;
};

struct DeviceEvent {
  bool timed;
  std::shared_ptr<Mark> mark;
};

struct DeviceGraph {
  std::vector<Op> ops;
};

struct FakeDevice::State {
  struct Failure {
    int nth;
    Code code;
    std::string message;
  };

  explicit State(const FakeDeviceOptions& options) : options(options), memory(options.protect) {}

  const FakeDeviceOptions options;
  mutable Mutex mutex;
  FakeMemory memory ABSL_GUARDED_BY(mutex);
  std::map<char*, int64_t> pinned ABSL_GUARDED_BY(mutex);
  std::set<DeviceStream*> streams ABSL_GUARDED_BY(mutex);
  std::map<std::string, int64_t, std::less<>> calls ABSL_GUARDED_BY(mutex);
  std::map<std::string, Failure, std::less<>> failures ABSL_GUARDED_BY(mutex);
  int64_t waits ABSL_GUARDED_BY(mutex) = 0;
  int64_t clock ABSL_GUARDED_BY(mutex) = 0;

  // Counts a call, which may have been told to fail.
  DeviceResult Enter(std::string_view function) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    ++calls[std::string(function)];
    const auto failure = failures.find(function);
    if (failure == failures.end() || --failure->second.nth > 0) return {};
    const DeviceResult result = Say(failure->second.code, failure->second.message);
    failures.erase(failure);
    return result;
  }

  bool RunOne(DeviceStream* stream) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    if (stream->ops.empty()) return false;
    const FakeMemory::Touching touching(&memory);
    const Op op = std::move(stream->ops.front());
    stream->ops.pop_front();
    if (op.after != nullptr) {
      while (!op.after->passed) SHOAL_CHECK(RunOne(op.after->stream)) << "a stream waits for a point that nothing reaches";
    }
    ++clock;
    if (op.passes != nullptr) {
      op.passes->passed = true;
      op.passes->time = clock;
    }
    if (op.run == nullptr || stream->failure != Code::kOk) return true;
    if (const DeviceResult result = op.run(); result.code != Code::kOk) {
      stream->failure = result.code;
      stream->message = result.message;
    }
    return true;
  }
  void RunDry(DeviceStream* stream) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    const FakeMemory::Touching touching(&memory);
    while (RunOne(stream)) {
    }
  }
  void RunAll() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    const FakeMemory::Touching touching(&memory);
    for (DeviceStream* stream : streams) RunDry(stream);
  }

  void Put(DeviceStream* stream, Op op) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    if (stream->capture != nullptr) {
      stream->capture->ops.push_back(std::move(op));
      ++stream->capture->streams[stream][stream];
      return;
    }
    stream->ops.push_back(std::move(op));
    if (options.progress == FakeDeviceOptions::Progress::kAtOnce) RunDry(stream);
  }

  bool Pinned(const void* address) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    auto found = pinned.upper_bound(const_cast<char*>(static_cast<const char*>(address)));
    return found != pinned.begin() && static_cast<const char*>(address) < (--found)->first + found->second;
  }
  DeviceResult CopyNow(void* to, const void* from, int64_t bytes) {
    std::memmove(to, from, static_cast<size_t>(bytes));
    return {};
  }
};

// Of every function of the table: takes the lock, counts the call, and fails if it was told to.
#define SHOAL_FAKE_ENTER(function)                                                     \
  FakeDevice::State& state = FakeDevice::Current().state();                            \
  MutexLock lock(&state.mutex);                                                        \
  if (const DeviceResult told = state.Enter(function); told.code != Code::kOk) return told

namespace {

DeviceResult Capturing() { return Say(Code::kFailed, "not allowed while the stream records"); }

DeviceResult Count(int32_t* devices) {
  SHOAL_FAKE_ENTER("count");
  *devices = state.options.devices;
  if (*devices == 0) return Say(Code::kUnavailable, "no fake devices");
  return {};
}

DeviceResult Properties(int32_t device, DeviceProperties* properties) {
  SHOAL_FAKE_ENTER("properties");
  *properties = {};
  std::strncpy(properties->name, "fake", sizeof(properties->name) - 1);
  std::strncpy(properties->uuid, absl::StrCat("fake-", device).c_str(), sizeof(properties->uuid) - 1);
  properties->compute_major = 9;
  properties->multiprocessors = 3;
  properties->memory_bytes = state.options.memory_bytes;
  return {};
}

DeviceResult Use(int32_t device) {
  SHOAL_FAKE_ENTER("use");
  if (device >= state.options.devices) return Say(Code::kFailed, "no such device");
  t_device = device;
  return {};
}

DeviceResult Allocate(int64_t bytes, void** memory) {
  SHOAL_FAKE_ENTER("allocate");
  ++state.waits;
  if (state.memory.BytesOf(t_device) + bytes > state.options.memory_bytes) return Say(Code::kOutOfMemory, "out of memory");
  *memory = state.memory.Allocate(std::max<int64_t>(bytes, 1), t_device);
  return {};
}

DeviceResult Release(void* memory) {
  SHOAL_FAKE_ENTER("release");
  ++state.waits;
  state.RunAll();
  if (!state.memory.Release(memory)) return Say(Code::kFailed, "not an allocation");
  return {};
}

DeviceResult Memory(int64_t* free_bytes, int64_t* all_bytes) {
  SHOAL_FAKE_ENTER("memory");
  *all_bytes = state.options.memory_bytes;
  *free_bytes = *all_bytes - state.memory.BytesOf(t_device);
  return {};
}

DeviceResult AllocateHost(int64_t bytes, void** memory) {
  SHOAL_FAKE_ENTER("allocate_host");
  ++state.waits;
  *memory = ::operator new(static_cast<size_t>(bytes), std::align_val_t(kPage));
  state.pinned[static_cast<char*>(*memory)] = bytes;
  return {};
}

DeviceResult ReleaseHost(void* memory) {
  SHOAL_FAKE_ENTER("release_host");
  ++state.waits;
  state.RunAll();
  if (state.pinned.erase(static_cast<char*>(memory)) == 0) return Say(Code::kFailed, "not pinned");
  ::operator delete(memory, std::align_val_t(kPage));
  return {};
}

DeviceResult Pin(void* memory, int64_t bytes) {
  SHOAL_FAKE_ENTER("pin");
  state.pinned[static_cast<char*>(memory)] = bytes;
  return {};
}

DeviceResult Unpin(void* memory) {
  SHOAL_FAKE_ENTER("unpin");
  if (state.pinned.erase(static_cast<char*>(memory)) == 0) return Say(Code::kFailed, "not pinned");
  return {};
}

DeviceResult CreateStream(DeviceStream** stream) {
  SHOAL_FAKE_ENTER("create_stream");
  *stream = new DeviceStream{.device = t_device};
  state.streams.insert(*stream);
  return {};
}

DeviceResult DestroyStream(DeviceStream* stream) {
  SHOAL_FAKE_ENTER("destroy_stream");
  state.RunDry(stream);
  state.streams.erase(stream);
  delete stream;
  return {};
}

DeviceResult QueryStream(DeviceStream* stream) {
  SHOAL_FAKE_ENTER("query_stream");
  if (stream->capture != nullptr) return Capturing();
  if (stream->ops.empty()) return Say(stream->failure, stream->message);
  if (state.options.progress == FakeDeviceOptions::Progress::kByQueries) state.RunOne(stream);
  return Say(Code::kNotReady, "");
}

DeviceResult WaitStream(DeviceStream* stream) {
  SHOAL_FAKE_ENTER("wait_stream");
  ++state.waits;
  if (stream->capture != nullptr) return Capturing();
  state.RunDry(stream);
  return Say(stream->failure, stream->message);
}

DeviceResult CreateEvent(bool timed, DeviceEvent** event) {
  SHOAL_FAKE_ENTER("create_event");
  *event = new DeviceEvent{.timed = timed};
  return {};
}

DeviceResult DestroyEvent(DeviceEvent* event) {
  SHOAL_FAKE_ENTER("destroy_event");
  delete event;
  return {};
}

DeviceResult Record(DeviceEvent* event, DeviceStream* stream) {
  SHOAL_FAKE_ENTER("record");
  const auto mark = std::make_shared<Mark>(Mark{.stream = stream, .capture = stream->capture, .seen = {}});
  event->mark = mark;
  if (mark->capture != nullptr) {  // Work of a graph runs in the order in which it was put there.
    mark->seen = mark->capture->streams[stream];
    return {};
  }
  state.Put(stream, {.passes = mark});
  return {};
}

DeviceResult RecordInGraph(DeviceEvent* event, DeviceStream* stream) {
  SHOAL_FAKE_ENTER("record_in_graph");
  if (stream->capture == nullptr || !event->timed) return Say(Code::kFailed, "not a timed event on a stream that records");
  event->mark = std::make_shared<Mark>(Mark{.stream = stream, .capture = nullptr, .seen = {}});
  state.Put(stream, {.passes = event->mark});
  return {};
}

DeviceResult WaitFor(DeviceStream* stream, DeviceEvent* event) {
  SHOAL_FAKE_ENTER("wait_for");
  if (event->mark == nullptr) return {};
  const std::shared_ptr<Capture>& capture = event->mark->capture;
  if (capture == nullptr) {
    if (stream->capture != nullptr) return Say(Code::kFailed, "a stream that records cannot wait for work that is not recorded");
    state.Put(stream, {.after = event->mark});
    return {};
  }
  if (!capture->open) return Say(Code::kFailed, "the event was recorded for a graph that is complete");
  if (stream->capture != nullptr && stream->capture != capture) return Say(Code::kFailed, "two graphs cannot wait for each other");
  if (stream->capture == nullptr) {
    stream->capture = capture;
    capture->Join(stream);
  }
  for (const auto& [other, before] : event->mark->seen) {
    int64_t& known = capture->streams[stream][other];
    known = std::max(known, before);
  }
  return {};
}

DeviceResult QueryEvent(DeviceEvent* event) {
  SHOAL_FAKE_ENTER("query_event");
  if (event->mark == nullptr) return {};
  if (event->mark->capture != nullptr) return Capturing();
  if (event->mark->passed) return {};
  if (state.options.progress == FakeDeviceOptions::Progress::kByQueries) state.RunOne(event->mark->stream);
  return Say(Code::kNotReady, "");
}

DeviceResult WaitEvent(DeviceEvent* event) {
  SHOAL_FAKE_ENTER("wait_event");
  ++state.waits;
  if (event->mark == nullptr) return {};
  if (event->mark->capture != nullptr) return Capturing();
  while (!event->mark->passed && state.RunOne(event->mark->stream)) {
  }
  return Say(event->mark->stream->failure, event->mark->stream->message);
}

DeviceResult ElapsedMs(DeviceEvent* begin, DeviceEvent* end, float* milliseconds) {
  SHOAL_FAKE_ENTER("elapsed_ms");
  const bool passed = begin->mark != nullptr && end->mark != nullptr && begin->mark->passed && end->mark->passed;
  if (!begin->timed || !end->timed || !passed) return Say(Code::kFailed, "events without times");
  *milliseconds = static_cast<float>(end->mark->time - begin->mark->time);
  return {};
}

DeviceResult Copy(void* to, const void* from, int64_t bytes, DeviceStream* stream) {
  SHOAL_FAKE_ENTER("copy");
  const bool pageable = (!state.memory.Contains(to) && !state.Pinned(to)) || (!state.memory.Contains(from) && !state.Pinned(from));
  FakeDevice::State* const at = &state;
  state.Put(stream, {.run = [=] { return at->CopyNow(to, from, bytes); }});
  if (!pageable) return {};
  ++state.waits;
  ++state.calls["pageable_copy"];
  if (stream->capture != nullptr) return Capturing();
  state.RunDry(stream);
  return Say(stream->failure, stream->message);
}

DeviceResult Fill(void* to, int32_t byte, int64_t bytes, DeviceStream* stream) {
  SHOAL_FAKE_ENTER("fill");
  if (!state.memory.Contains(to)) return Say(Code::kFailed, "not device memory");
  state.Put(stream, {.run = [=] {
    std::memset(to, byte, static_cast<size_t>(bytes));
    return DeviceResult{};
  }});
  return {};
}

DeviceResult BeginCapture(DeviceStream* stream) {
  SHOAL_FAKE_ENTER("begin_capture");
  if (stream->capture != nullptr) return Capturing();
  stream->capture = std::make_shared<Capture>();
  stream->capture->origin = stream;
  stream->capture->Join(stream);
  return {};
}

// Ends it also where it fails.
DeviceResult EndCapture(DeviceStream* stream, DeviceGraph** graph) {
  FakeDevice::State& state = FakeDevice::Current().state();
  MutexLock lock(&state.mutex);
  const DeviceResult told = state.Enter("end_capture");
  const std::shared_ptr<Capture> capture = stream->capture;
  if (capture == nullptr || capture->origin != stream) return Say(Code::kFailed, "this stream did not begin to record");
  capture->open = false;
  for (const auto& [joined, seen] : capture->streams) joined->capture = nullptr;
  if (told.code != Code::kOk) return told;
  if (!capture->IsJoined()) return Say(Code::kFailed, "work of another stream that nothing waits for");
  *graph = new DeviceGraph{std::move(capture->ops)};
  return {};
}

DeviceResult LaunchGraph(DeviceGraph* graph, DeviceStream* stream) {
  SHOAL_FAKE_ENTER("launch_graph");
  for (const Op& op : graph->ops) state.Put(stream, op);
  return {};
}

DeviceResult DestroyGraph(DeviceGraph* graph) {
  SHOAL_FAKE_ENTER("destroy_graph");
  delete graph;
  return {};
}

DeviceResult ExportMemory(void* memory, DeviceIpcHandle* handle) {
  SHOAL_FAKE_ENTER("export_memory");
  if (!state.memory.Export(memory, handle)) return Say(Code::kFailed, "not the start of an allocation");
  return {};
}

DeviceResult OpenMemory(const DeviceIpcHandle* handle, void** memory) {
  SHOAL_FAKE_ENTER("open_memory");
  *memory = state.memory.Open(*handle);
  if (*memory == nullptr) return Say(Code::kFailed, "the memory of this handle is gone");
  return {};
}

DeviceResult CloseMemory(void* memory) {
  SHOAL_FAKE_ENTER("close_memory");
  if (!state.memory.Close(memory)) return Say(Code::kFailed, "not opened");
  return {};
}

}  // namespace

FakeDevice::FakeDevice(const FakeDeviceOptions& options)
    : api_{.version = kDeviceApiVersion,
           .name = "fake",
           .count = &Count,
           .properties = &Properties,
           .use = &Use,
           .allocate = &Allocate,
           .release = &Release,
           .memory = &Memory,
           .allocate_host = &AllocateHost,
           .release_host = &ReleaseHost,
           .pin = &Pin,
           .unpin = &Unpin,
           .create_stream = &CreateStream,
           .destroy_stream = &DestroyStream,
           .query_stream = &QueryStream,
           .wait_stream = &WaitStream,
           .create_event = &CreateEvent,
           .destroy_event = &DestroyEvent,
           .record = &Record,
           .record_in_graph = &RecordInGraph,
           .wait_for = &WaitFor,
           .query_event = &QueryEvent,
           .wait_event = &WaitEvent,
           .elapsed_ms = &ElapsedMs,
           .copy = &Copy,
           .fill = &Fill,
           .begin_capture = &BeginCapture,
           .end_capture = &EndCapture,
           .launch_graph = &LaunchGraph,
           .destroy_graph = &DestroyGraph,
           .export_memory = &ExportMemory,
           .open_memory = &OpenMemory,
           .close_memory = &CloseMemory,
           .kernels = options.kernels},
      state_(std::make_unique<State>(options)) {
  SHOAL_CHECK(g_current == nullptr) << "there is a fake device already";
  g_current = this;
}

FakeDevice::~FakeDevice() {
  MutexLock lock(&state_->mutex);
  SHOAL_CHECK(state_->memory.empty() && state_->pinned.empty() && state_->streams.empty())
      << state_->memory.bytes() << " bytes, " << state_->pinned.size() << " pinned ones and " << state_->streams.size()
      << " streams are left";
  g_current = nullptr;
}

FakeDevice& FakeDevice::Current() {
  SHOAL_CHECK(g_current != nullptr) << "there is no fake device";
  return *g_current;
}

DeviceResult FakeDevice::Submit(DeviceStream* stream, std::function<DeviceResult()> work) {
  MutexLock lock(&state_->mutex);
  State* const state = state_.get();
  // The failure of "kernel" shows when it runs.
  state_->Put(stream, {.run = [state, work = std::move(work)]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    const DeviceResult told = state->Enter("kernel");
    return told.code != Code::kOk ? told : work();
  }});
  return {};
}

void FakeDevice::FailCall(std::string_view function, int nth, DeviceResult::Code code, std::string_view message) {
  MutexLock lock(&state_->mutex);
  state_->failures[std::string(function)] = {nth, code, std::string(message)};
}

int64_t FakeDevice::Calls(std::string_view function) const {
  MutexLock lock(&state_->mutex);
  const auto found = state_->calls.find(function);
  return found == state_->calls.end() ? 0 : found->second;
}

int64_t FakeDevice::Waits() const {
  MutexLock lock(&state_->mutex);
  return state_->waits;
}

bool FakeDevice::RunOne(DeviceStream* stream) {
  MutexLock lock(&state_->mutex);
  return state_->RunOne(stream);
}

void FakeDevice::RunAll() {
  MutexLock lock(&state_->mutex);
  state_->RunAll();
}

int64_t FakeDevice::allocated_bytes() const {
  MutexLock lock(&state_->mutex);
  return state_->memory.bytes();
}

}  // namespace shoal
