#include "collectives/membership/etcd.h"

#include <algorithm>
#include <optional>
#include <thread>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "collectives/membership/http_client.h"
#include "collectives/transport/clock.h"
#include "nlohmann/json.hpp"
#include "runtime/base/log.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using Json = nlohmann::json;

constexpr int64_t kRequestNs = 1'000'000'000;
constexpr int kTriesPerLease = 5;  // A leader renews, a follower looks, so often in the time of a lease.

std::string LeaderKey(const std::string& job_id) { return absl::StrCat("/shoal/", job_id, "/coordinator"); }

// The member at `path`; null where there is none. The gateway leaves out what is false, 0 or empty.
const Json& At(const Json& json, std::initializer_list<const char*> path) {
  static const Json null;
  const Json* at = &json;
  for (const char* name : path) {
    if (at->is_array() && !at->empty()) at = &at->front();
    if (!at->is_object() || !at->contains(name)) return null;
    at = &(*at)[name];
  }
  return *at;
}

// 64-bit integers travel as strings.
int64_t NumberAt(const Json& json, std::initializer_list<const char*> path) {
  const Json& at = At(json, path);
  int64_t number = 0;
  if (at.is_number_integer()) return at.get<int64_t>();
  return at.is_string() && absl::SimpleAtoi(at.get<std::string>(), &number) ? number : 0;
}

std::string BytesAt(const Json& json, std::initializer_list<const char*> path) {
  const Json& at = At(json, path);
  std::string bytes;
  return at.is_string() && absl::Base64Unescape(at.get<std::string>(), &bytes) ? bytes : "";
}

struct Holder {
  std::string address;
  int64_t lease = 0;
};

class EtcdClient {
 public:
  explicit EtcdClient(const std::vector<std::string>& endpoints) : http_(endpoints) {}

  absl::StatusOr<int64_t> GrantLease(int64_t seconds, int64_t deadline_ns) {
    SHOAL_ASSIGN_OR_RETURN(const Json reply,
                           Call("/v3/lease/grant", {{"TTL", std::to_string(seconds)}}, deadline_ns));
    const int64_t lease = NumberAt(reply, {"ID"});
    if (lease == 0) return absl::DataLossError("etcd grants a lease without an id");
    return lease;
  }
  // NOT_FOUND: it has expired.
  absl::Status KeepAlive(int64_t lease, int64_t deadline_ns) {
    SHOAL_ASSIGN_OR_RETURN(const Json reply,
                           Call("/v3/lease/keepalive", {{"ID", std::to_string(lease)}}, deadline_ns));
    if (NumberAt(reply, {"result", "TTL"}) <= 0) return absl::NotFoundError("the lease has expired");
    return absl::OkStatus();
  }
  absl::Status Revoke(int64_t lease, int64_t deadline_ns) {
    return Call("/v3/lease/revoke", {{"ID", std::to_string(lease)}}, deadline_ns).status();
  }
  // Who holds the key afterwards.
  absl::StatusOr<Holder> PutIfAbsent(const std::string& key, const Holder& own, int64_t deadline_ns) {
    const std::string name = absl::Base64Escape(key);
    const Json compare = {
        {"key", name}, {"target", "CREATE"}, {"result", "EQUAL"}, {"create_revision", "0"}};
    const Json put = {
        {"key", name}, {"value", absl::Base64Escape(own.address)}, {"lease", std::to_string(own.lease)}};
    const Json body = {{"compare", Json::array({compare})},
                       {"success", Json::array({{{"request_put", put}}})},
                       {"failure", Json::array({{{"request_range", {{"key", name}}}}})}};
    SHOAL_ASSIGN_OR_RETURN(const Json reply, Call("/v3/kv/txn", body, deadline_ns));
    const Json& succeeded = At(reply, {"succeeded"});
    if (succeeded.is_boolean() && succeeded.get<bool>()) return own;
    return HolderIn(At(reply, {"responses", "response_range", "kvs"}));
  }
  absl::StatusOr<Holder> Get(const std::string& key, int64_t deadline_ns) {
    SHOAL_ASSIGN_OR_RETURN(const Json reply,
                           Call("/v3/kv/range", {{"key", absl::Base64Escape(key)}}, deadline_ns));
    return HolderIn(At(reply, {"kvs"}));
  }

 private:
  static Holder HolderIn(const Json& kvs) { return {BytesAt(kvs, {"value"}), NumberAt(kvs, {"lease"})}; }

  absl::StatusOr<Json> Call(const std::string& path, const Json& body, int64_t deadline_ns) {
    absl::StatusOr<std::string> text = http_.Post(path, body.dump(), deadline_ns);
    SHOAL_RETURN_IF_ERROR(text.status(), "etcd");
    Json reply = Json::parse(*text, /*cb=*/nullptr, /*allow_exceptions=*/false);
    if (!reply.is_object()) return absl::DataLossError(absl::StrCat("etcd answers ", text->substr(0, 200)));
    return reply;
  }

  HttpClient http_;
};

}  // namespace

absl::StatusOr<std::string> FindLeader(const std::vector<std::string>& etcd, const std::string& job_id,
                                       int64_t deadline_ns) {
  SHOAL_ASSIGN_OR_RETURN(const Holder holder, EtcdClient(etcd).Get(LeaderKey(job_id), deadline_ns));
  if (holder.address.empty()) {
    return absl::NotFoundError(absl::StrCat("no coordinator leads job '", job_id, "' now, says etcd"));
  }
  return holder.address;
}

class Election::Candidate {
 public:
  Candidate(const ElectionOptions& options, std::function<void(bool)> changed)
      : options_(options),
        lease_ns_(absl::ToInt64Nanoseconds(options.lease)),
        changed_(std::move(changed)),
        etcd_(options.etcd),
        thread_([this] { Run(); }) {}

  ~Candidate() {
    {
      MutexLock lock(&mutex_);
      stop_ = true;
      stopped_.NotifyAll();
    }
    thread_.join();
  }

 private:
  void Run() {
    while (!Pause(lease_ns_ / kTriesPerLease)) {
      const absl::Status status = Step();
      if (!status.ok() && status.message() != trouble_) {
        SHOAL_LOG(kWarning) << "election of the coordinator: " << status.message();
      }
      trouble_ = std::string(status.message());
      if (leads_ && NowNs() >= renewed_ns_ + lease_ns_) Become(false);
    }
    if (lease_ != 0) (void)etcd_.Revoke(lease_, NowNs() + kRequestNs);
  }

  // Waits, but not the first time; whether it is over.
  bool Pause(int64_t pause_ns) {
    const int64_t until_ns = first_ ? 0 : NowNs() + pause_ns;
    first_ = false;
    MutexLock lock(&mutex_);
    while (!stop_ && NowNs() < until_ns) (void)stopped_.WaitUntil(&mutex_, SteadyTime(until_ns));
    return stop_;
  }

  absl::Status Step() {
    // The lease counts from before the question.
    const int64_t asked_ns = NowNs();
    int64_t deadline_ns = asked_ns + kRequestNs;
    if (leads_) deadline_ns = std::min(deadline_ns, renewed_ns_ + lease_ns_);
    if (lease_ == 0) {
      SHOAL_ASSIGN_OR_RETURN(lease_, etcd_.GrantLease(lease_ns_ / 1'000'000'000, deadline_ns));
    } else if (const absl::Status kept = etcd_.KeepAlive(lease_, deadline_ns); !kept.ok()) {
      if (!absl::IsNotFound(kept)) return kept;
      lease_ = 0;
      if (leads_) Become(false);
      return kept;
    }
    SHOAL_ASSIGN_OR_RETURN(
        const Holder holder,
        etcd_.PutIfAbsent(LeaderKey(options_.job_id), {options_.address, lease_}, deadline_ns));
    renewed_ns_ = asked_ns;
    if (const bool mine = holder.lease == lease_; mine != leads_) Become(mine);
    return absl::OkStatus();
  }

  void Become(bool leader) {
    leads_ = leader;
    changed_(leader);
  }

  const ElectionOptions options_;
  const int64_t lease_ns_;
  const std::function<void(bool)> changed_;
  // The thread's own.
  EtcdClient etcd_;
  bool first_ = true;
  bool leads_ = false;
  int64_t lease_ = 0;
  int64_t renewed_ns_ = 0;
  std::string trouble_;

  Mutex mutex_;
  CondVar stopped_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

Election::Election(const ElectionOptions& options, std::function<void(bool)> changed)
    : candidate_(std::make_unique<Candidate>(options, std::move(changed))) {}
Election::~Election() = default;

}  // namespace shoal
