// Who may join: what both ends of every connection of a job (unix or TCP) say before anything else. Four
// messages, each one proof of the job secret by HMAC-SHA256 over fresh nonces of both sides, the purpose, the
// job and the version; the stranger proves first, so that an acceptor tells a port scanner nothing. Nothing
// is encrypted: the secret keeps processes of other jobs and people out, it does not hide what the network
// can read. docs/wire.md has the bytes.
//
// `Handshake` is one side as a pure state machine over bytes; `DialAuthenticated` and `Greeter`
// (membership/frame.h) run it on sockets.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "collectives/transport/socket.h"

namespace shoal {

constexpr uint32_t kProtocolVersion = 2;
constexpr size_t kJobIdBytesMax = 256;

// What a connection is for. Part of the proof: a connection cannot be passed off as one of another purpose.
enum class Purpose : uint32_t {
  kBootstrap = 1,    // Rank to rank 0.
  kCoordinator = 2,  // Member to coordinator.
  kControl = 3,      // Between ranks.
  kData = 4,
};

struct Credentials {
  std::string job_id;  // At most kJobIdBytesMax; not secret.
  std::string secret;  // Empty: every process of the job may join. Both ends must agree on that too.
  Purpose purpose = Purpose::kBootstrap;  // Of a dialler; an acceptor takes all and learns which.
};

class Handshake {
 public:
  using Nonce = std::array<uint8_t, 32>;
  static Handshake Dialler(const Credentials& credentials, const Nonce& fresh);
  static Handshake Acceptor(const Credentials& credentials, const Nonce& fresh);

  // To be sent next; taken once.
  std::string TakeOutput();
  // How many bytes to read next: never more than belongs to the handshake. 0 when it has ended.
  size_t Wanted() const;
  // Takes at most Wanted() bytes. Error: the peer is refused (or refuses), final; what TakeOutput has then is
  // a last word that tells it why. PERMISSION_DENIED: the secret is wrong or missing; FAILED_PRECONDITION:
  // another job or version; DATA_LOSS: not Shoal's protocol.
  absl::Status Take(std::string_view bytes);
  // Both ends have proved themselves.
  bool Done() const { return state_ == State::kDone; }
  Purpose purpose() const { return credentials_.purpose; }

 private:
  enum class State : uint8_t { kAwaitHello, kAwaitChallenge, kAwaitProof, kAwaitWelcome, kDone, kFailed };
  enum class Kind : uint32_t { kHello = 1, kChallenge = 2, kProof = 3, kWelcome = 4, kRefused = 5 };

  Handshake(const Credentials& credentials, const Nonce& fresh, State state);
  void Say(Kind kind, std::string_view body);
  absl::Status Refuse(const absl::Status& status);
  absl::Status OnMessage(Kind kind, std::string_view body);
  absl::Status OnHello(std::string_view body);
  absl::Status OnRefused(std::string_view body) const;
  std::string Proof(std::string_view role) const;

  Credentials credentials_;
  State state_;
  std::string dialler_nonce_, acceptor_nonce_;
  std::string input_, output_;
};

// From the system's generator. CHECKs that there is one.
Handshake::Nonce FreshNonce();

// The dialler's part on a connection. Blocks until `deadline_ns` (NowNs()). Errors as Handshake::Take;
// UNAVAILABLE: the acceptor closed before it answered; DEADLINE_EXCEEDED.
absl::Status Authenticate(int fd, const Credentials& credentials, int64_t deadline_ns);

// One attempt to connect and to prove both ends. Blocks. Errors as Dial and Authenticate, with the address.
absl::StatusOr<Fd> DialAuthenticated(const SocketAddress& address, const Credentials& credentials,
                                     int64_t deadline_ns);

}  // namespace shoal
