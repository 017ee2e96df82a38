#include "collectives/membership/member_core.h"

#include <algorithm>

#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {

struct MemberCore::State {
  State(MemberInfo self, MemberOptions options, int64_t now_ns)
      : self(std::move(self)), options(options), last_call_ns(now_ns), now(now_ns), redial_ns(now_ns + Ns(options.first_dial_delay)) {}

  const MemberInfo self;
  const MemberOptions options;

  // Time in which nobody called was a pause of this process: the clock of all times below stood still then.
  int64_t last_call_ns;
  int64_t paused_ns = 0;
  int64_t now;

  enum { kDown, kDialling, kUp } link = kDown;
  int64_t redial_ns;     // kDown: when to dial.
  int64_t heard_ns = 0;  // When the coordinator, or the attempt to reach it, began or was last heard.
  int64_t beat_ns = 0;   // kUp: when the next heartbeat is due.
  bool over = false;     // Left, excluded or refused.

  View committed;
  uint64_t promised = 0;  // The highest epoch ever proposed to this member.
  View proposed;          // The last proposal, until it is committed; empty: none.
  bool confirmed = false;
  bool ready = false;                   // The application waits for the epoch after `committed`.
  std::vector<Accusation> accusations;  // Since `committed`.
  uint64_t joiners = 0;

  std::vector<Action> out;

  static int64_t Ns(absl::Duration duration) { return absl::ToInt64Nanoseconds(duration); }
  int64_t TickNs() const {
    return std::max<int64_t>(std::min(Ns(options.heartbeat_interval), Ns(options.heartbeat_timeout) / 8), 1);
  }

  void Begin(int64_t now_ns) {
    const int64_t passed = std::max<int64_t>(now_ns - last_call_ns, 0);
    paused_ns += std::max<int64_t>(passed - 2 * TickNs(), 0);
    last_call_ns = std::max(last_call_ns, now_ns);
    now = last_call_ns - paused_ns;
  }

  std::vector<Action> Take() {
    std::vector<Action> taken;
    taken.swap(out);
    return taken;
  }

  Action& Do(Action::Type type) {
    Action& action = out.emplace_back();
    action.type = type;
    return action;
  }

  void Send(MemberMessage::Type type, Epoch epoch = Epoch{0}) {
    if (link != kUp) return;
    MemberMessage& message = Do(Action::kSend).message;
    message.type = type;
    message.epoch = epoch;
    if (type == MemberMessage::kHello) {
      message.info = self;
      message.committed = committed;
      message.promised = Epoch{promised};
    }
    if (type == MemberMessage::kReady) message.accusations = accusations;
    beat_ns = now + Ns(options.heartbeat_interval);
  }

  void Dial() {
    link = kDialling;
    heard_ns = now;
    Do(Action::kDial);
  }

  // Another attempt follows, by default at once.
  void HangUp(const std::string& why) {
    if (link == kDown) return;
    if (!why.empty()) Do(Action::kLog).text = why;
    Do(Action::kHangUp);
    link = kDown;
    redial_ns = now;
  }

  void End(Action::Type type, const std::string& text) {
    over = true;
    if (link != kDown) Do(Action::kHangUp);
    link = kDown;
    Do(type).text = text;
  }

  void Accuse(const std::vector<Accusation>& more) {
    for (const Accusation& accusation : more) {
      const auto known = std::find_if(accusations.begin(), accusations.end(),
                                      [&](const Accusation& old) { return old.id == accusation.id; });
      if (known != accusations.end()) {
        known->died |= accusation.died;
      } else if (accusation.id != self.id) {
        accusations.push_back(accusation);
      }
    }
  }

  void OnPropose(const View& view);
  void OnCommit(const View& view);
};

void MemberCore::State::OnPropose(const View& view) {
  const uint64_t epoch = static_cast<uint64_t>(view.epoch);
  const bool same_job = committed.lineage == 0 || committed.lineage == view.lineage;
  if (!ready || !same_job || epoch <= promised || view.RankOf(self.id) < 0)
    return HangUp(
        absl::StrCat("the coordinator proposes epoch ", epoch, " against what it was told; asking again"));
  promised = epoch;
  proposed = view;
  confirmed = false;
  Do(Action::kConnect).view = view;
}

void MemberCore::State::OnCommit(const View& view) {
  if (!confirmed || view.epoch != proposed.epoch || view.lineage != proposed.lineage) return;
  committed = std::move(proposed);
  proposed = View();
  confirmed = false;
  ready = false;
  accusations.clear();
  Do(Action::kCommit).view = committed;
  if (joiners != 0) Do(Action::kJoiners).joiners = joiners = 0;
}

MemberCore::MemberCore(MemberInfo self, MemberOptions options, int64_t now_ns)
    : state_(std::make_unique<State>(std::move(self), options, now_ns)) {}

MemberCore::~MemberCore() = default;

std::vector<MemberCore::Action> MemberCore::Ready(std::vector<Accusation> accusations, int64_t now_ns) {
  State& state = *state_;
  state.Begin(now_ns);
  if (state.over) return state.Take();
  state.ready = true;
  state.Accuse(accusations);
  state.Send(MemberMessage::kReady, state.committed.epoch);
  return state.Take();
}

std::vector<MemberCore::Action> MemberCore::Leave(int64_t now_ns) {
  State& state = *state_;
  state.Begin(now_ns);
  if (state.over) return state.Take();
  state.Send(MemberMessage::kLeave);
  state.over = true;
  if (state.link != State::kDown) state.Do(Action::kHangUp);
  state.link = State::kDown;
  return state.Take();
}

std::vector<MemberCore::Action> MemberCore::OnCoordinator(bool up, int64_t now_ns) {
  State& state = *state_;
  state.Begin(now_ns);
  if (state.over) return state.Take();
  if (!up) {
    // A connection that was lost is dialled at once, one that could not be had after a while.
    state.redial_ns = state.now + (state.link == State::kUp ? 0 : State::Ns(state.options.redial_interval));
    state.link = State::kDown;
    if (state.redial_ns <= state.now) state.Dial();
    return state.Take();
  }
  state.link = State::kUp;
  state.heard_ns = state.now;
  state.Send(MemberMessage::kHello);
  if (state.ready) state.Send(MemberMessage::kReady, state.committed.epoch);
  return state.Take();
}

std::vector<MemberCore::Action> MemberCore::OnMessage(const CoordinatorMessage& message, int64_t now_ns) {
  State& state = *state_;
  state.Begin(now_ns);
  if (state.over || state.link != State::kUp) return state.Take();
  state.heard_ns = state.now;
  switch (message.type) {
    case CoordinatorMessage::kHeartbeat:
      break;
    case CoordinatorMessage::kPropose:
      state.OnPropose(message.view);
      break;
    case CoordinatorMessage::kCommit:
      state.OnCommit(message.view);
      break;
    case CoordinatorMessage::kExcluded:
      state.End(Action::kExcluded, message.cause);
      break;
    case CoordinatorMessage::kRefused:
      state.End(Action::kRefused, message.cause);
      break;
    case CoordinatorMessage::kWaiting:
      state.Do(Action::kWaiting).text = message.cause;
      break;
    case CoordinatorMessage::kJoiners:
      state.Do(Action::kJoiners).joiners = state.joiners = message.joiners;
      break;
  }
  return state.Take();
}

std::vector<MemberCore::Action> MemberCore::OnConnected(Epoch epoch, int64_t now_ns) {
  State& state = *state_;
  state.Begin(now_ns);
  if (state.over || state.proposed.members.empty() || epoch != state.proposed.epoch) return state.Take();
  state.confirmed = true;
  state.Send(MemberMessage::kConnected, epoch);
  return state.Take();
}

std::vector<MemberCore::Action> MemberCore::OnConnectFailed(Epoch epoch, std::vector<Accusation> accusations,
                                                            int64_t now_ns) {
  State& state = *state_;
  state.Begin(now_ns);
  if (state.over || state.proposed.members.empty() || epoch != state.proposed.epoch) return state.Take();
  state.Accuse(accusations);
  if (state.link != State::kUp) return state.Take();
  state.Send(MemberMessage::kFailed, epoch);
  state.out.back().message.accusations = std::move(accusations);
  return state.Take();
}

std::vector<MemberCore::Action> MemberCore::OnTime(int64_t now_ns) {
  State& state = *state_;
  state.Begin(now_ns);
  if (state.over) return state.Take();
  if (state.link != State::kDown && state.now >= state.heard_ns + State::Ns(state.options.heartbeat_timeout))
    state.HangUp("the coordinator is silent; dialling anew");
  if (state.link == State::kDown && state.now >= state.redial_ns) state.Dial();
  if (state.link == State::kUp && state.now >= state.beat_ns) state.Send(MemberMessage::kHeartbeat);
  return state.Take();
}

int64_t MemberCore::NextTimeNs() const {
  const State& state = *state_;
  if (state.over) return kNeverNs;
  int64_t due = state.now + state.TickNs();
  if (state.link == State::kDown) due = std::min(due, state.redial_ns);
  if (state.link == State::kUp) due = std::min(due, state.beat_ns);
  if (state.link != State::kDown)
    due = std::min(due, state.heard_ns + State::Ns(state.options.heartbeat_timeout));
  return std::max(due, state.now) + state.paused_ns;
}

const View& MemberCore::committed() const { return state_->committed; }

}  // namespace shoal
