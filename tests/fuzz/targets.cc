#include "tests/fuzz/targets.h"

#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "collectives/engine/tcp/tcp_channel.h"
#include "collectives/membership/frame.h"
#include "collectives/membership/message_link.h"
#include "collectives/membership/messages.h"
#include "collectives/transport/control_link.h"
#include "collectives/transport/data_frame.h"
#include "collectives/transport/handshake.h"
#include "collectives/transport/wire.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

// Two ends of one connection, neither blocks.
std::pair<Fd, Fd> Connection() {
  int fds[2];
  SHOAL_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
  return {Fd(fds[0]), Fd(fds[1])};
}

// Sends all of `bytes`, letting the reader read whenever the socket is full. It may stop reading for good.
template <class Reader>
void Feed(int fd, std::string_view bytes, const Reader& read) {
  for (int idle = 0; !bytes.empty() && idle < 3;) {
    const ssize_t sent = send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    idle = sent > 0 ? 0 : idle + 1;
    if (sent > 0) bytes.remove_prefix(sent);
    read();
  }
  read();
}

template <class Header>
std::string Raw(const Header& header) {
  return std::string(reinterpret_cast<const char*>(&header), sizeof header);
}

// ---- The handshake. The first byte: which side, and the size of the pieces.

Handshake::Nonce FixedNonce(uint8_t value) {
  Handshake::Nonce nonce;
  nonce.fill(value);
  return nonce;
}
const Credentials kCredentials = {"job", "secret", Purpose::kControl};
Handshake Side(bool dialler) {
  return dialler ? Handshake::Dialler(kCredentials, FixedNonce(1))
                 : Handshake::Acceptor(kCredentials, FixedNonce(2));
}

void RunHandshake(std::string_view bytes) {
  if (bytes.empty()) return;
  Handshake side = Side((bytes[0] & 1) != 0);
  const size_t piece = 1 + (static_cast<uint8_t>(bytes[0]) >> 1);
  bytes.remove_prefix(1);
  while (!bytes.empty() && side.Wanted() > 0) {
    SHOAL_CHECK_LE(side.Wanted(), 1024u);
    const size_t take = std::min({piece, side.Wanted(), bytes.size()});
    const absl::Status status = side.Take(bytes.substr(0, take));
    SHOAL_CHECK_LE(side.TakeOutput().size(), 1024u);
    SHOAL_CHECK(status.ok() || (side.Wanted() == 0 && !side.Done()));
    bytes.remove_prefix(take);
  }
}

std::vector<std::string> HandshakeSeeds() {
  Handshake dialler = Side(true), acceptor = Side(false);
  const std::string hello = dialler.TakeOutput();
  SHOAL_CHECK_OK(acceptor.Take(hello.substr(0, 16)));
  SHOAL_CHECK_OK(acceptor.Take(hello.substr(16)));
  const std::string challenge = acceptor.TakeOutput();
  SHOAL_CHECK_OK(dialler.Take(challenge.substr(0, 16)));
  SHOAL_CHECK_OK(dialler.Take(challenge.substr(16)));
  const std::string proof = dialler.TakeOutput();
  SHOAL_CHECK_OK(acceptor.Take(proof.substr(0, 16)));
  SHOAL_CHECK_OK(acceptor.Take(proof.substr(16)));
  const std::string welcome = acceptor.TakeOutput();
  Handshake other = Handshake::Acceptor({"another", "secret"}, FixedNonce(3));
  SHOAL_CHECK_OK(other.Take(hello.substr(0, 16)));
  SHOAL_CHECK(!other.Take(hello.substr(16)).ok());
  return {"\x20" + hello + proof, "\x41" + challenge + welcome, "\x41" + other.TakeOutput()};
}

// ---- Frames of the bootstrap.

void RunFrame(std::string_view bytes) {
  FrameReader reader(/*body_bytes_max=*/4096);
  while (!bytes.empty() && reader.Wanted() > 0) {
    const size_t take = std::min(reader.Wanted(), bytes.size());
    if (!reader.Take(bytes.substr(0, take)).ok()) return;
    SHOAL_CHECK_LE(reader.Wanted(), 4096u);
    bytes.remove_prefix(take);
  }
  if (reader.Wanted() > 0) return;
  const Frame frame = reader.TakeFrame();
  WireReader body(frame.body);
  while (body.ok() && !body.AtEnd()) (void)body.String();
}

std::vector<std::string> FrameSeeds() {
  auto [ours, theirs] = Connection();
  const std::string body = WireWriter().String("job").U64(1).U64(2).Take();
  SHOAL_CHECK_OK(SendFrame(ours.get(), FrameType::kHello, body, 0));
  char bytes[512];
  const ssize_t got = recv(theirs.get(), bytes, sizeof bytes, 0);
  return {std::string(bytes, got)};
}

// ---- Control connections between ranks.

void RunControlLink(std::string_view bytes) {
  auto [ours, theirs] = Connection();
  ControlLink link(std::move(theirs));
  bool open = true;
  std::vector<ControlMessage> messages;
  Feed(ours.get(), bytes, [&] { open = open && link.Read(&messages).ok(); });
  for (const ControlMessage& message : messages) {
    WireReader reader(message.body);
    (void)reader.U64();
    (void)reader.String();
  }
}

std::vector<std::string> ControlLinkSeeds() {
  std::string bytes;
  for (const char type : {1, 2, 3, 5}) {
    const std::string body = WireWriter().U64(7).String("all_reduce \"grads\" #17").Take();
    const uint32_t length = body.size();
    bytes += Raw(length) + type + body;
  }
  return {bytes};
}

// ---- Connections between members and the coordinator, and what travels on them.

void RunMessageLink(std::string_view bytes) {
  auto [ours, theirs] = Connection();
  MessageLink link(std::move(theirs));
  bool open = true;
  std::vector<std::string> messages;
  Feed(ours.get(), bytes, [&] { open = open && link.Read(&messages).ok(); });
}

template <class Message, class Decoder>
void RunDecoder(std::string_view bytes, const Decoder& decode) {
  const absl::StatusOr<Message> message = decode(bytes);
  if (!message.ok()) return;
  // What was understood survives the way back.
  const std::string again = Encode(*message);
  const absl::StatusOr<Message> read = decode(again);
  SHOAL_CHECK_OK(read.status());
  SHOAL_CHECK(Encode(*read) == again);
}
void RunMemberMessage(std::string_view bytes) { RunDecoder<MemberMessage>(bytes, DecodeMemberMessage); }
void RunCoordinatorMessage(std::string_view bytes) {
  RunDecoder<CoordinatorMessage>(bytes, DecodeCoordinatorMessage);
}
void RunView(std::string_view bytes) { RunDecoder<View>(bytes, DecodeView); }

View SomeView() {
  View view;
  view.lineage = 9;
  view.epoch = Epoch{3};
  for (uint64_t id : {4, 5, 6}) {
    view.members.push_back(
        {id, 71, "host", "boot", "door", {"10.0.0.1:80", "[::1]:81"}, static_cast<int>(id) - 4});
  }
  return view;
}

std::vector<std::string> MemberMessageSeeds() {
  std::vector<std::string> seeds;
  for (int type = MemberMessage::kHello; type <= MemberMessage::kLeave; ++type) {
    MemberMessage message;
    message.type = static_cast<MemberMessage::Type>(type);
    message.info = SomeView().members[0];
    message.committed = SomeView();
    message.epoch = Epoch{3};
    message.accusations = {{5, "connection closed"}, {6, "silent for 1 s"}};
    seeds.push_back(Encode(message));
  }
  return seeds;
}

std::vector<std::string> CoordinatorMessageSeeds() {
  std::vector<std::string> seeds;
  for (int type = CoordinatorMessage::kHeartbeat; type <= CoordinatorMessage::kJoiners; ++type) {
    CoordinatorMessage message;
    message.type = static_cast<CoordinatorMessage::Type>(type);
    message.view = SomeView();
    message.cause = "rank 1 did not answer";
    seeds.push_back(Encode(message));
  }
  return seeds;
}

std::vector<std::string> ViewSeeds() { return {Encode(SomeView())}; }

std::vector<std::string> MessageLinkSeeds() {
  std::string bytes;
  for (const std::string& message : MemberMessageSeeds()) {
    const uint32_t length = message.size();
    bytes += Raw(length) + message;
  }
  return {bytes};
}

// ---- Data connections: headers alone, and a mesh with some messages under way.

constexpr uint64_t kEpoch = 7, kGroup = 3;

void RunDataHeader(std::string_view bytes) {
  if (bytes.size() < sizeof(DataHeader)) return;
  DataHeader header;
  if (!ParseDataHeader(reinterpret_cast<const std::byte*>(bytes.data()), kEpoch, &header).ok()) return;
  SHOAL_CHECK(header.bytes <= static_cast<uint64_t>(kSliceBytesMax) &&
              header.offset + header.bytes <= std::max(header.total, header.bytes));
}

class FuzzLife final : public GroupLife {
 public:
  FuzzLife() : GroupLife(kGroup, {0, 1}, 0) {}
  absl::Status status() const override { return absl::OkStatus(); }
  absl::Status End(const std::string&) override { return absl::OkStatus(); }
};

DataHeader SeedHeader(DataType type, uint32_t tag, uint64_t bytes, uint64_t total) {
  DataHeader header = {};
  header.magic = kDataMagic;
  header.type = type;
  header.signature = 5;
  header.tag = tag;
  header.epoch = kEpoch;
  header.group = kGroup;
  header.op = 1;
  header.bytes = bytes;
  header.total = total;
  return header;
}

// Behind an odd first byte every frame gets the right magic and epoch and a payload that is there, so that
// mutations reach what lies behind those checks.
std::string Mended(std::string_view bytes) {
  std::string result(bytes.substr(1));
  if ((bytes[0] & 1) == 0) return result;
  for (size_t at = 0; at + sizeof(DataHeader) <= result.size();) {
    DataHeader header;
    std::memcpy(&header, result.data() + at, sizeof header);
    header.magic = kDataMagic;
    header.epoch = kEpoch;
    std::memset(header.zero, 0, sizeof header.zero);
    header.bytes = std::min<uint64_t>(header.bytes, result.size() - at - sizeof header);
    std::memcpy(result.data() + at, &header, sizeof header);
    at += sizeof header + header.bytes;
  }
  return result;
}

void RunDataMesh(std::string_view bytes) {
  if (bytes.empty()) return;
  auto connection = Connection();
  const Fd& ours = connection.first;
  std::vector<DataPeer> peers(2);
  peers[1].name = "rank 1";
  peers[1].flows.push_back(std::move(connection.second));
  const auto mesh = *DataMesh::Create(kEpoch, std::move(peers));
  FuzzLife life;
  TcpChannel channel(mesh.get(), &life);
  std::vector<std::byte> into(100'000), out(100'000);
  std::byte small[8];
  channel.Receive(1, {1, 1, 5}, small, sizeof small, 1);
  channel.Receive(1, {1, 2, 5}, into.data(), into.size(), 2);
  channel.ReceiveView(1, {1, 3, 5}, 50, 3);
  channel.ReceiveView(1, {1, 4, 5}, 40'000, 4);
  channel.Send(1, {1, 5, 5}, out.data(), out.size(), 5);
  channel.Send(1, {1, 6, 5}, out.data(), 20, 6);
  std::vector<Channel::Event> events;
  Feed(ours.get(), Mended(bytes), [&] {
    (void)channel.Poll(&events);
    char answer[4096];
    while (recv(ours.get(), answer, sizeof answer, MSG_DONTWAIT) > 0) {
    }
  });
  SHOAL_CHECK_LE(events.size(), 6u);
  for (const Channel::Event& event : events) {
    if (event.view != nullptr) channel.Release(1, {}, event.view);
  }
  channel.ReceiveView(1, {1, 9, 5}, 100, 9);  // Maybe it is there already.
  channel.Finish({1, 0, 5});
  (void)channel.Poll(&events);
}

std::vector<std::string> DataMeshSeeds() {
  std::string bytes;
  bytes += Raw(SeedHeader(DataType::kEager, 1, 8, 8)) + std::string(8, 'a');
  bytes += Raw(SeedHeader(DataType::kReady, 5, 0, 100'000));
  bytes += Raw(SeedHeader(DataType::kEager, 3, 50, 50)) + std::string(50, 'b');
  bytes += Raw(SeedHeader(DataType::kSlice, 2, 300, 100'000)) + std::string(300, 'c');
  DataHeader second = SeedHeader(DataType::kSlice, 2, 200, 100'000);
  second.offset = 300;
  bytes += Raw(second) + std::string(200, 'd');
  bytes += Raw(SeedHeader(DataType::kAnnounce, 9, 0, 100));
  bytes += Raw(SeedHeader(DataType::kProbe, 0, 0, 0));
  bytes += Raw(SeedHeader(DataType::kCredit, 0, 0, 84));
  bytes += Raw(SeedHeader(DataType::kEager, 10, 20, 20)) + std::string(20, 'e');
  bytes += Raw(SeedHeader(DataType::kSlice, 4, 400, 40'000)) + std::string(400, 'f');
  return {"0" + bytes, "1" + bytes};
}

std::vector<std::string> DataHeaderSeeds() {
  return {Raw(SeedHeader(DataType::kEager, 1, 8, 8)), Raw(SeedHeader(DataType::kSlice, 2, 300, 100'000)),
          Raw(SeedHeader(DataType::kReady, 5, 0, 100'000))};
}

}  // namespace

const std::vector<FuzzTarget>& FuzzTargets() {
  static const std::vector<FuzzTarget> targets = {
      {"handshake", RunHandshake, HandshakeSeeds},
      {"frame", RunFrame, FrameSeeds},
      {"control_link", RunControlLink, ControlLinkSeeds},
      {"message_link", RunMessageLink, MessageLinkSeeds},
      {"member_message", RunMemberMessage, MemberMessageSeeds},
      {"coordinator_message", RunCoordinatorMessage, CoordinatorMessageSeeds},
      {"view", RunView, ViewSeeds},
      {"data_header", RunDataHeader, DataHeaderSeeds},
      {"data_mesh", RunDataMesh, DataMeshSeeds},
  };
  return targets;
}

}  // namespace shoal
