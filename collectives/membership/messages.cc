// Bytes of the membership protocol's messages (see view_wire.h for members and views), each in a frame of its
// own:
//
//   member to coordinator                                    coordinator to member
//   kHello:      1, member, view, promised                   kHeartbeat: 1
//   kHeartbeat:  2                                           kPropose:   2, view
//   kReady:      3, epoch, accusations                       kCommit:    3, lineage, epoch
//   kConnected:  4, epoch                                    kExcluded:  4, cause
//   kFailed:     5, epoch, accusations                       kRefused:   5, cause
//   kLeave:      6                                           kWaiting:   6, cause
//                                                            kJoiners:   7, number
//   accusations: how many, then id, cause and 1 (dead) or 0 of each
#include "collectives/membership/messages.h"

#include "collectives/membership/view_wire.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr uint64_t kAccusationsMax = 16384;
constexpr size_t kCauseBytesMax = 4096;

std::string_view Shortened(std::string_view cause) { return cause.substr(0, kCauseBytesMax); }

absl::Status ReadCause(WireReader& in, std::string* cause) {
  *cause = in.String();
  if (!in.ok()) return absl::DataLossError("too short for a cause");
  if (cause->size() > kCauseBytesMax)
    return absl::DataLossError(absl::StrCat("a cause of ", cause->size(), " bytes"));
  return absl::OkStatus();
}

void Write(const std::vector<Accusation>& accusations, WireWriter& out) {
  out.U64(accusations.size());
  for (const Accusation& accusation : accusations) {
    out.U64(accusation.id).String(Shortened(accusation.cause)).U64(accusation.died ? 1 : 0);
  }
}

absl::Status Read(WireReader& in, std::vector<Accusation>* accusations) {
  const uint64_t count = in.U64();
  if (count > kAccusationsMax) return absl::DataLossError(absl::StrCat(count, " accusations"));
  for (uint64_t i = 0; i < count; ++i) {
    Accusation& accusation = accusations->emplace_back();
    accusation.id = in.U64();
    SHOAL_RETURN_IF_ERROR(ReadCause(in, &accusation.cause));
    const uint64_t died = in.U64();
    if (died > 1) return absl::DataLossError("an accusation is neither of a death nor of something else");
    accusation.died = died == 1;
  }
  return absl::OkStatus();
}

absl::Status End(const WireReader& in) {
  if (!in.ok()) return absl::DataLossError("too short");
  if (!in.AtEnd()) return absl::DataLossError("more bytes after its end");
  return absl::OkStatus();
}

absl::Status Read(WireReader& in, MemberMessage* message) {
  switch (message->type) {
    case MemberMessage::kHello:
      SHOAL_RETURN_IF_ERROR(Read(in, &message->info));
      SHOAL_RETURN_IF_ERROR(Read(in, &message->committed));
      message->promised = Epoch{in.U64()};
      if (message->promised < message->committed.epoch)
        return absl::DataLossError("a promise below the epoch of the sender");
      return End(in);
    case MemberMessage::kReady:
    case MemberMessage::kFailed:
      message->epoch = Epoch{in.U64()};
      SHOAL_RETURN_IF_ERROR(Read(in, &message->accusations));
      return End(in);
    case MemberMessage::kConnected:
      message->epoch = Epoch{in.U64()};
      return End(in);
    case MemberMessage::kHeartbeat:
    case MemberMessage::kLeave:
      return End(in);
  }
  return absl::DataLossError("of no known type");
}

absl::Status Read(WireReader& in, CoordinatorMessage* message) {
  switch (message->type) {
    case CoordinatorMessage::kHeartbeat:
      return End(in);
    case CoordinatorMessage::kPropose:
      SHOAL_RETURN_IF_ERROR(Read(in, &message->view));
      if (message->view.members.empty()) return absl::DataLossError("nobody is in the view");
      return End(in);
    case CoordinatorMessage::kCommit:
      message->view.lineage = in.U64();
      message->view.epoch = Epoch{in.U64()};
      return End(in);
    case CoordinatorMessage::kExcluded:
    case CoordinatorMessage::kRefused:
    case CoordinatorMessage::kWaiting:
      SHOAL_RETURN_IF_ERROR(ReadCause(in, &message->cause));
      return End(in);
    case CoordinatorMessage::kJoiners:
      message->joiners = in.U64();
      return End(in);
  }
  return absl::DataLossError("of no known type");
}

template <typename Message>
absl::StatusOr<Message> Decode(std::string_view bytes, std::string_view what) {
  WireReader in(bytes);
  const uint64_t type = in.U64();
  if (type > UINT8_MAX) return absl::DataLossError(absl::StrCat(AbslSv(what), ": of no known type"));
  Message message;
  message.type = static_cast<typename Message::Type>(type);
  SHOAL_RETURN_IF_ERROR(Read(in, &message), AbslSv(what), " of type ", type);
  return message;
}

}  // namespace

std::string Encode(const MemberMessage& message) {
  WireWriter out;
  out.U64(message.type);
  switch (message.type) {
    case MemberMessage::kHello:
      Write(message.info, out);
      Write(message.committed, out);
      out.U64(static_cast<uint64_t>(message.promised));
      break;
    case MemberMessage::kReady:
    case MemberMessage::kFailed:
      out.U64(static_cast<uint64_t>(message.epoch));
      Write(message.accusations, out);
      break;
    case MemberMessage::kConnected:
      out.U64(static_cast<uint64_t>(message.epoch));
      break;
    case MemberMessage::kHeartbeat:
    case MemberMessage::kLeave:
      break;
  }
  return out.Take();
}

std::string Encode(const CoordinatorMessage& message) {
  WireWriter out;
  out.U64(message.type);
  switch (message.type) {
    case CoordinatorMessage::kPropose:
      Write(message.view, out);
      break;
    case CoordinatorMessage::kCommit:
      out.U64(message.view.lineage).U64(static_cast<uint64_t>(message.view.epoch));
      break;
    case CoordinatorMessage::kExcluded:
    case CoordinatorMessage::kRefused:
    case CoordinatorMessage::kWaiting:
      out.String(Shortened(message.cause));
      break;
    case CoordinatorMessage::kJoiners:
      out.U64(message.joiners);
      break;
    case CoordinatorMessage::kHeartbeat:
      break;
  }
  return out.Take();
}

absl::StatusOr<MemberMessage> DecodeMemberMessage(std::string_view bytes) {
  return Decode<MemberMessage>(bytes, "a member's message");
}

absl::StatusOr<CoordinatorMessage> DecodeCoordinatorMessage(std::string_view bytes) {
  return Decode<CoordinatorMessage>(bytes, "a coordinator's message");
}

}  // namespace shoal
