// The inside of ShmChannel: one thread's view of the messages between this process and its peers.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "collectives/engine/shm/shm_answers.h"
#include "collectives/engine/shm/shm_channel.h"
#include "collectives/engine/shm/shm_ring.h"
#include "collectives/engine/shm/spin.h"

namespace shoal {
namespace shm {

constexpr uint64_t kUnordered = uint64_t{1} << 63;  // Of MessageId::op: a Send/Receive pair.
constexpr uint32_t kProbeTag = ~uint32_t{0};        // Not a message: Channel::Probe.
// Of a tag: what was lent by copying comes back in a message of its own.
constexpr uint32_t kReturnBit = uint32_t{1} << 31;
// Staged messages go in fragments of this size: both cores' second-level caches keep them.
constexpr int64_t kFragmentBytes = 128 << 10;
constexpr int kStagingSlots = 8;
// So many slots are kept for messages that were asked for, whose fragments leave at once. Otherwise messages
// that nobody wants yet could take all and block those that are waited for.
constexpr int kReservedSlots = 2;
// One Poll copies about so much, so that the caller sees what else has ended.
constexpr int64_t kCopyPerPoll = 512 << 10;
// A peer that is so many messages ahead is read no further.
constexpr size_t kArrivedMax = 65536;

struct Key {
  uint64_t op;
  uint32_t tag;
  bool operator==(const Key& other) const { return op == other.op && tag == other.tag; }
  template <class H>
  friend H AbslHashValue(H h, const Key& key) {
    return H::combine(std::move(h), key.op, key.tag);
  }
};

// What this rank posted to receive.
struct Posted {
  std::byte* into = nullptr;  // Null: a view is wanted.
  int64_t bytes = 0;
  uint32_t signature = 0;
  uint64_t token = 0;
  bool borrows = false;
};

// A message that is coming in.
struct Arrival {
  RecordKind kind = RecordKind::kInline;
  int64_t bytes = 0;
  uint32_t signature = 0;
  uint32_t request = 0;
  uint64_t segment = 0;
  int64_t offset = 0;
  bool lent = false;
  std::unique_ptr<std::byte[]> payload;  // Of an inline one.
};

// A message to a peer.
struct Outgoing {
  enum class Mode : uint8_t {
    kPlain,
    kLent,      // In place.
    kLentCopy,  // Ends when its return has been received.
    kReturn,    // What was lent so.
  };
  uint64_t token = 0;
  const std::byte* data = nullptr;
  int64_t bytes = 0;
  MessageId id;
  int64_t staged = 0;  // Bytes that were put into slots.
  Mode mode = Mode::kPlain;

  bool IsInline() const { return bytes <= Record::kInlineMax && mode != Mode::kLent; }
};

// A question to a peer that it has not answered.
struct Request {
  enum class Kind : uint8_t { kNone, kDirect, kOffer, kFragment };
  Kind kind = Kind::kNone;
  int slot = 0;  // Of a fragment.
  Outgoing message;
};

// A copy from a peer's buffer that has begun.
struct Copying {
  int seat = 0;
  std::shared_ptr<const Segment> segment;  // Keeps `from` mapped.
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  int64_t bytes = 0;
  int64_t done = 0;
  uint32_t request = 0;
  uint64_t token = 0;
};

// A message whose fragments are coming in.
struct Assembly {
  std::byte* into = nullptr;
  int64_t bytes = 0;
  int64_t done = 0;
  uint64_t token = 0;
  std::unique_ptr<std::byte[]> buffer;  // Where it goes when a view is wanted.
  uint32_t signature = 0;
};

// What Release and GiveBack give back.
struct View {
  // In the sender's buffer, or a slot of it: `request` is answered, and this keeps it mapped. Null: in `buffer`.
  std::shared_ptr<const Segment> segment;
  uint32_t request = 0;
  std::unique_ptr<std::byte[]> buffer;
  // Of the receive.
  uint64_t token = 0;
  uint32_t signature = 0;
  int64_t bytes = 0;
};

struct Peer {
  Peer(const GroupLayout& layout, GroupPage* own, int own_seat, GroupPage* page, int seat)
      : seat(seat),
        out(layout.ring(own, seat), layout.ring_units(), &layout.consumed(page, own_seat)->units),
        in(layout.ring(page, own_seat), layout.ring_units(), &layout.consumed(own, seat)->units),
        questions(layout.answers(page, own_seat)),
        replies(layout.answers(own, seat)) {}

  // Room for a record that asks something.
  bool MayAsk() { return out.Fits(0) && !questions.Full(); }
  bool MayStart(const Outgoing& message) { return message.IsInline() ? out.Fits(message.bytes) : MayAsk(); }

  const int seat;
  RingWriter out;
  RingReader in;
  bool written = false;  // Something that it may sleep for, since its bell was last rung.
  uint64_t reached = 0;  // The latest collective of which something has come.
  MessageId probe;       // The operation that it is in, of one that has not begun here.
  absl::flat_hash_map<Key, Posted> posted;
  absl::flat_hash_map<Key, Arrival> arrived;
  absl::flat_hash_map<Key, Assembly> assembling;
  absl::flat_hash_map<Key, View> views;
  absl::flat_hash_map<Key, View> returning;  // Whose bytes are on their way.
  Questions questions;
  Replies replies;
  std::vector<Request> requests;                         // By number.
  std::deque<Outgoing> waiting;                          // Those that found no room in the ring.
  std::vector<std::shared_ptr<const Segment>> segments;  // Those used lately, the last one in front.
};

inline std::byte g_nothing[kLine];  // Where empty views point.

}  // namespace shm

struct ShmChannel::State {
  explicit State(std::shared_ptr<HostGroup> host_group);

  // Posting.
  shm::Peer& PeerOf(int member) { return *peers[group->SeatOf(member)]; }
  void NoteOperation(MessageId id);
  void Post(int member, MessageId id, const shm::Posted& posted);
  // Out.
  void SendNow(shm::Peer& peer, const shm::Outgoing& message);
  bool Start(shm::Peer& peer, shm::Outgoing message);
  void EndSend(shm::Peer& peer, const shm::Outgoing& message);
  bool IsShared(const shm::Outgoing& message, Record* record);
  bool HaveStaging();
  uint32_t Ask(shm::Peer& peer, shm::Request request);
  static Record Describe(const shm::Outgoing& message, RecordKind kind);
  bool WriteFragment(shm::Peer& peer, shm::Outgoing* message, bool eager);
  void StageGranted();
  void CollectAnswers(shm::Peer& peer);
  void RingBells();
  // In.
  void Drain(shm::Peer& peer);
  void TakeMessage(shm::Peer& peer, const Record& record);
  void TakeProbe(shm::Peer& peer, MessageId theirs);
  bool TakeFragment(shm::Peer& peer, const Record& record);
  void Match(shm::Peer& peer, const shm::Key& key, const shm::Posted& posted, shm::Arrival arrival);
  bool MatchInPlace(shm::Peer& peer, const shm::Key& key, const shm::Posted& posted,
                    const shm::Arrival& arrival);
  // The segment is the front one of the peer's then. Null: it is not known yet, or nonsense (`final`).
  const std::byte* Find(shm::Peer& peer, uint64_t segment, int64_t offset, int64_t bytes);
  void RetryUnresolved();
  void RunCopies();
  void Reply(shm::Peer& peer, Answer answer, uint32_t request);
  // Errors.
  void Fail(const absl::Status& status) {
    if (final.ok()) final = status;
  }
  void FailMismatch(const shm::Peer& peer, MessageId ours, int64_t our_bytes, MessageId theirs,
                    int64_t their_bytes);
  void FailNonsense(const shm::Peer& peer, std::string_view what);
  bool HasNews();

  const std::shared_ptr<HostGroup> group;
  std::vector<std::unique_ptr<shm::Peer>> peers;  // By seat; null for this process.
  std::vector<Event> ended;
  std::deque<shm::Copying> copies;
  struct Unresolved {
    int seat;
    shm::Key key;
    shm::Posted posted;
    shm::Arrival arrival;
  };
  bool unknown_memory = false;         // So is that of a fragment.
  std::vector<Unresolved> unresolved;  // Matched, but the sender's memory is not known yet.
  uint64_t removed = 0;                // SharedMemory::Removed() when `segments` were last right.

  SharedMemory::Extent last_extent;  // Right while `forgotten` is.
  uint64_t forgotten = 0;
  std::shared_ptr<Segment> staging;
  std::vector<int> free_slots;
  std::deque<std::pair<int, shm::Outgoing>> granted;  // With fragments left, by seat.

  uint64_t last_op = shm::kUnordered;                  // Of NoteOperation.
  absl::flat_hash_map<uint64_t, uint32_t> signatures;  // Of this rank's operations that are not finished.
  MessageId finished;

  absl::Status final;
  Mismatch mismatch;
  Spinner spinner;
  std::atomic<bool> woken{false};
};

}  // namespace shoal
