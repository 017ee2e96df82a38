// A network, clock and processes in one thread, from one seed. Links are as TCP connections: both directions
// deliver in order, after random delays, and end with a close behind all that was sent or with a reset that
// loses it. Links are independent of each other. A partition holds back what one node sends to another until
// it heals; a paused node gets nothing until it is resumed, although its links can still be opened; a dead
// node's links end.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace shoal::sim {

using Node = uint32_t;
using Link = uint64_t;

struct Packet {
  int kind = 0;
  uint64_t a = 0, b = 0, c = 0;
  std::vector<char> body;
};

// What runs on a node. Called by the network only.
class Process {
 public:
  virtual ~Process() = default;
  virtual void OnTimer() = 0;
  virtual void OnAccepted(Link link) = 0;
  virtual void OnOpened(Link link) = 0;
  virtual void OnPacket(Link link, Packet packet) = 0;
  // The other side says nothing more, or could not be reached.
  virtual void OnEnd(Link link) = 0;
};

class Network {
 public:
  struct Knobs {
    int64_t delay_ns = 100'000;     // Of most packets, on average.
    int64_t spike_ns = 20'000'000;  // At most, of a few.
    double spikes = 0.01;           // How many.
    int64_t dial_timeout_ns = 1'000'000'000;
  };

  Network(uint64_t seed, Knobs knobs) : knobs_(knobs), random_(seed) {}

  int64_t now() const { return now_; }
  std::mt19937_64& random() { return random_; }
  uint64_t digest() const { return digest_; }
  int64_t events() const { return events_run_; }
  // Goes into the digest: equal runs note equal things.
  void Note(uint64_t value) { digest_ = (digest_ ^ value) * 0x9e3779b97f4a7c15 + (digest_ >> 29); }

  // ---- The world
  void At(int64_t at_ns, std::function<void()> event);
  // Runs one event; false: there is none.
  bool RunOne();

  Node Start(Process* program);  // Borrowed until Kill.
  void Kill(Node node);
  void Pause(Node node);
  void Resume(Node node);
  bool Alive(Node node) const { return nodes_.contains(node); }
  bool Paused(Node node) const { return Alive(node) && nodes_.at(node).paused; }
  void Block(Node from, Node to) { blocked_.insert({from, to}); }
  void Unblock(Node from, Node to);
  void Reset(Link link);
  std::vector<Link> OpenLinks() const;

  // ---- For processes
  Link Dial(Node from, Node to);
  void Send(Node from, Link link, Packet packet);
  void Shut(Node from, Link link);   // Nothing more is sent.
  void Close(Node from, Link link);  // Nor received.
  // OnTimer comes then at the latest, but for pauses.
  void SetTimer(Node node, int64_t at_ns);

 private:
  struct Item {
    enum Type : uint8_t { kDial, kOpened, kPacket, kEnd } type = kPacket;
    Packet packet;
  };
  // One direction of a link.
  struct Pipe {
    std::deque<Item> items;
    int due = 0;  // So many of them have arrived, and wait for the receiver or for a partition to heal.
    int64_t last_ns = 0;
    bool ended = false;   // By the sender.
    bool closed = false;  // The receiver does not listen.
  };
  struct Connection {
    Node nodes[2];  // Who dialled, who was dialled.
    Pipe pipes[2];  // From it.
    bool welcomed = false;
  };
  struct Running {
    Process* program = nullptr;
    bool paused = false;
    int64_t timer_ns = -1;
    bool timer_late = false;
    std::set<Link> links;
  };
  struct Event {
    int64_t at_ns;
    uint64_t number;
    std::function<void()> run;
    bool operator<(const Event& other) const {
      return at_ns != other.at_ns ? at_ns > other.at_ns : number > other.number;
    }
  };

  int64_t Delay();
  void Push(Link link, int side, Item item);
  void Arrive(Link link, int side);
  void Pump(Link link, int side);
  void Deliver(Link link, int side, Item item);
  void End(Link link, int side);
  void Forget(Link link);
  void FireTimer(Node node, int64_t at_ns);

  const Knobs knobs_;
  std::mt19937_64 random_;
  int64_t now_ = 0;
  uint64_t digest_ = 0, numbers_ = 0;
  int64_t events_run_ = 0;
  Node last_node_ = 0;
  Link last_link_ = 0;
  std::priority_queue<Event> events_;
  std::map<Node, Running> nodes_;
  std::map<Link, Connection> links_;
  std::set<std::pair<Node, Node>> blocked_;
};

}  // namespace shoal::sim
