#include "tests/sim/network.h"

#include <algorithm>
#include <cmath>

namespace shoal::sim {

void Network::At(int64_t at_ns, std::function<void()> event) {
  events_.push({std::max(at_ns, now_), ++numbers_, std::move(event)});
}

bool Network::RunOne() {
  if (events_.empty()) return false;
  Event event = std::move(const_cast<Event&>(events_.top()));
  events_.pop();
  now_ = event.at_ns;
  ++events_run_;
  event.run();
  return true;
}

// ---- Nodes

Node Network::Start(Process* program) {
  nodes_[++last_node_].program = program;
  return last_node_;
}

void Network::Kill(Node node) {
  if (!Alive(node)) return;
  const std::set<Link> links = nodes_.at(node).links;
  nodes_.erase(node);
  const bool loses = random_() % 2 == 0;
  for (Link link : links) {
    Connection& connection = links_.at(link);
    const int side = connection.nodes[0] == node ? 0 : 1;
    connection.pipes[1 - side].closed = true;
    if (loses) {
      Pipe& pipe = connection.pipes[side];
      pipe.items.resize(std::min<size_t>(pipe.items.size(), pipe.due));
      pipe.ended = false;  // Its end may be among what is lost.
    }
    End(link, side);
  }
}

void Network::Pause(Node node) {
  if (Alive(node)) nodes_.at(node).paused = true;
}

void Network::Resume(Node node) {
  if (!Paused(node)) return;
  Running& process = nodes_.at(node);
  process.paused = false;
  if (process.timer_late) {
    process.timer_late = false;
    At(now_, [this, node, at_ns = process.timer_ns] { FireTimer(node, at_ns); });
  }
  for (Link link : process.links) {
    const int side = links_.at(link).nodes[0] == node ? 1 : 0;
    At(now_ + static_cast<int64_t>(random_() % 100'000), [this, link, side] { Pump(link, side); });
  }
}

void Network::Unblock(Node from, Node to) {
  if (blocked_.erase({from, to}) == 0 || !Alive(to)) return;
  for (Link link : nodes_.at(to).links) {
    const Connection& connection = links_.at(link);
    const int side = connection.nodes[0] == from ? 0 : 1;
    if (connection.nodes[side] != from) continue;
    At(now_ + Delay() * 3, [this, link, side] { Pump(link, side); });
  }
}

void Network::SetTimer(Node node, int64_t at_ns) {
  if (!Alive(node)) return;
  Running& process = nodes_.at(node);
  if (process.timer_late || (process.timer_ns >= now_ && process.timer_ns <= at_ns)) return;
  process.timer_ns = at_ns;
  At(at_ns, [this, node, at_ns] { FireTimer(node, at_ns); });
}

void Network::FireTimer(Node node, int64_t at_ns) {
  if (!Alive(node) || nodes_.at(node).timer_ns != at_ns) return;
  Running& process = nodes_.at(node);
  if (process.paused) {
    process.timer_late = true;
    return;
  }
  process.timer_ns = -1;
  Note(now_ * 31 + node);
  process.program->OnTimer();
}

// ---- Links

int64_t Network::Delay() {
  const double uniform = static_cast<double>(random_() >> 11) * 0x1p-53;
  if (uniform < knobs_.spikes) return static_cast<int64_t>(random_() % (knobs_.spike_ns + 1));
  return static_cast<int64_t>(-std::log(uniform) * static_cast<double>(knobs_.delay_ns)) + 1000;
}

Link Network::Dial(Node from, Node to) {
  Connection& connection = links_[++last_link_];
  connection.nodes[0] = from;
  connection.nodes[1] = to;
  nodes_.at(from).links.insert(last_link_);
  if (Alive(to)) nodes_.at(to).links.insert(last_link_);
  Push(last_link_, 0, {Item::kDial, {}});
  At(now_ + knobs_.dial_timeout_ns, [this, link = last_link_, from] {
    const auto found = links_.find(link);
    if (found == links_.end() || found->second.welcomed || found->second.pipes[1].closed) return;
    Close(from, link);
    if (Alive(from)) nodes_.at(from).program->OnEnd(link);
  });
  return last_link_;
}

void Network::Send(Node from, Link link, Packet packet) {
  const auto found = links_.find(link);
  if (found == links_.end()) return;
  const int side = found->second.nodes[0] == from ? 0 : 1;
  if (!found->second.pipes[side].ended) Push(link, side, {Item::kPacket, std::move(packet)});
}

void Network::Shut(Node from, Link link) {
  const auto found = links_.find(link);
  if (found != links_.end()) End(link, found->second.nodes[0] == from ? 0 : 1);
}

void Network::Close(Node from, Link link) {
  const auto found = links_.find(link);
  if (found == links_.end()) return;
  const int side = found->second.nodes[0] == from ? 0 : 1;
  found->second.pipes[1 - side].closed = true;
  End(link, side);
}

void Network::End(Link link, int side) {
  Pipe& pipe = links_.at(link).pipes[side];
  if (pipe.ended) return;
  pipe.ended = true;
  Push(link, side, {Item::kEnd, {}});
}

void Network::Reset(Link link) {
  const auto found = links_.find(link);
  if (found == links_.end()) return;
  for (int side : {0, 1}) {
    Pipe& pipe = found->second.pipes[side];
    pipe.items.clear();
    pipe.due = 0;
    pipe.ended = true;
    pipe.items.push_back({Item::kEnd, {}});
    pipe.due = 1;
    At(now_, [this, link, side] { Pump(link, side); });
  }
}

std::vector<Link> Network::OpenLinks() const {
  std::vector<Link> open;
  for (const auto& [link, connection] : links_) {
    if (connection.welcomed && !connection.pipes[0].ended && !connection.pipes[1].ended) open.push_back(link);
  }
  return open;
}

void Network::Push(Link link, int side, Item item) {
  Pipe& pipe = links_.at(link).pipes[side];
  pipe.last_ns = std::max(pipe.last_ns, now_ + Delay());
  pipe.items.push_back(std::move(item));
  At(pipe.last_ns, [this, link, side] { Arrive(link, side); });
}

void Network::Arrive(Link link, int side) {
  const auto found = links_.find(link);
  if (found == links_.end()) return;
  Pipe& pipe = found->second.pipes[side];
  if (pipe.due < static_cast<int>(pipe.items.size())) ++pipe.due;
  Pump(link, side);
}

void Network::Pump(Link link, int side) {
  while (true) {
    const auto found = links_.find(link);
    if (found == links_.end()) return;
    Connection& connection = found->second;
    Pipe& pipe = connection.pipes[side];
    const Node from = connection.nodes[side], to = connection.nodes[1 - side];
    if (pipe.due == 0 || blocked_.contains({from, to})) return;
    if (pipe.items.front().type == Item::kDial && !connection.welcomed && Alive(to)) {
      connection.welcomed = true;  // By the system, though the process may be stopped.
      Push(link, 1, {Item::kOpened, {}});
    }
    if (Paused(to)) return;
    Item item = std::move(pipe.items.front());
    pipe.items.pop_front();
    --pipe.due;
    Deliver(link, side, std::move(item));
  }
}

void Network::Deliver(Link link, int side, Item item) {
  Connection& connection = links_.at(link);
  const Node to = connection.nodes[1 - side];
  if (!Alive(to)) {
    End(link, 1 - side);  // Refused, or reset.
    if (item.type == Item::kEnd) Forget(link);
    return;
  }
  Pipe& pipe = connection.pipes[side];
  Process* program = nodes_.at(to).program;
  const bool closed = pipe.closed;
  Note(now_ * 7 + link * 4 + item.type);
  switch (item.type) {
    case Item::kDial:
      if (!closed) program->OnAccepted(link);
      break;
    case Item::kOpened:
      if (!closed) program->OnOpened(link);
      break;
    case Item::kPacket:
      if (!closed) program->OnPacket(link, std::move(item.packet));
      break;
    case Item::kEnd:
      pipe.closed = true;
      if (!closed) program->OnEnd(link);
      Forget(link);
      break;
  }
}

// Once both directions have ended and nothing is under way.
void Network::Forget(Link link) {
  const auto found = links_.find(link);
  if (found == links_.end()) return;
  for (const Pipe& pipe : found->second.pipes) {
    if (!pipe.ended || !pipe.items.empty()) return;
  }
  for (Node node : found->second.nodes) {
    if (Alive(node)) nodes_.at(node).links.erase(link);
  }
  links_.erase(found);
}

}  // namespace shoal::sim
