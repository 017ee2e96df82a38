#include "collectives/transport/handshake.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr uint32_t kMagic = 0x4b414853;  // "SHAK"
constexpr size_t kHeaderBytes = 16;
constexpr size_t kNonceBytes = 32, kProofBytes = 32;
constexpr size_t kHelloBytes = 8 + kNonceBytes;  // Before the job.
constexpr size_t kBodyMax = 512;
constexpr size_t kReasonBytesMax = 200;
constexpr uint32_t kHasSecret = 1;

// The dialler's, when it is refused.
enum Reason : uint32_t { kOtherVersion = 1, kOtherJob = 2, kWrongSecret = 3, kNonsense = 4 };

struct Header {
  uint32_t magic, version, kind, length;
};
static_assert(sizeof(Header) == kHeaderBytes);

std::string U32(uint32_t value) { return std::string(reinterpret_cast<const char*>(&value), sizeof value); }

uint32_t ReadU32(std::string_view bytes) {
  uint32_t value = 0;
  std::memcpy(&value, bytes.data(), sizeof value);
  return value;
}

std::string Text(const Handshake::Nonce& nonce) {
  return std::string(reinterpret_cast<const char*>(nonce.data()), nonce.size());
}

// What a stranger sent, fit for a log line.
std::string Printable(std::string_view text) {
  std::string result(text.substr(0, kReasonBytesMax));
  for (char& c : result) {
    if (c < ' ' || c > '~') c = '?';
  }
  return result;
}

absl::Status NotShoal() { return absl::DataLossError("it does not speak Shoal's protocol"); }

Reason ReasonOf(const absl::Status& status, bool version) {
  if (version) return kOtherVersion;
  if (absl::IsFailedPrecondition(status)) return kOtherJob;
  return absl::IsPermissionDenied(status) ? kWrongSecret : kNonsense;
}

}  // namespace

Handshake::Handshake(const Credentials& credentials, const Nonce& fresh, State state)
    : credentials_(credentials), state_(state) {
  SHOAL_CHECK(credentials.job_id.size() <= kJobIdBytesMax)
      << "job id of " << credentials.job_id.size() << " bytes";
  (state == State::kAwaitHello ? acceptor_nonce_ : dialler_nonce_) = Text(fresh);
}

Handshake Handshake::Dialler(const Credentials& credentials, const Nonce& fresh) {
  Handshake result(credentials, fresh, State::kAwaitChallenge);
  const uint32_t flags = credentials.secret.empty() ? 0 : kHasSecret;
  result.Say(Kind::kHello, U32(static_cast<uint32_t>(credentials.purpose)) + U32(flags) +
                               result.dialler_nonce_ + credentials.job_id);
  return result;
}

Handshake Handshake::Acceptor(const Credentials& credentials, const Nonce& fresh) {
  return Handshake(credentials, fresh, State::kAwaitHello);
}

std::string Handshake::TakeOutput() { return std::exchange(output_, ""); }

size_t Handshake::Wanted() const {
  if (state_ == State::kDone || state_ == State::kFailed) return 0;
  if (input_.size() < kHeaderBytes) return kHeaderBytes - input_.size();
  return kHeaderBytes + ReadU32(std::string_view(input_).substr(12)) - input_.size();
}

void Handshake::Say(Kind kind, std::string_view body) {
  const Header header = {kMagic, kProtocolVersion, static_cast<uint32_t>(kind),
                         static_cast<uint32_t>(body.size())};
  output_.append(reinterpret_cast<const char*>(&header), sizeof header);
  output_.append(body);
}

absl::Status Handshake::Refuse(const absl::Status& status) {
  // What does not speak the protocol would not understand an answer either.
  const bool version = absl::IsFailedPrecondition(status) && input_.size() >= kHeaderBytes &&
                       ReadU32(std::string_view(input_).substr(4)) != kProtocolVersion;
  if (!absl::IsDataLoss(status)) {
    Say(Kind::kRefused,
        U32(ReasonOf(status, version)) + std::string(StdSv(status.message()).substr(0, kReasonBytesMax)));
  }
  state_ = State::kFailed;
  return status;
}

absl::Status Handshake::Take(std::string_view bytes) {
  SHOAL_CHECK(bytes.size() <= Wanted()) << bytes.size() << " bytes";
  input_.append(bytes);
  const size_t known = std::min(input_.size(), sizeof kMagic);
  if (std::memcmp(input_.data(), &kMagic, known) != 0) return Refuse(NotShoal());
  if (input_.size() < kHeaderBytes) return absl::OkStatus();
  Header header;
  std::memcpy(&header, input_.data(), sizeof header);
  const auto kind = static_cast<Kind>(header.kind);
  if (header.length > kBodyMax) return Refuse(NotShoal());
  // A refusal reads the same in every version.
  if (header.version != kProtocolVersion && kind != Kind::kRefused) {
    return Refuse(absl::FailedPreconditionError(
        absl::StrCat("protocol version ", header.version, ", want ", kProtocolVersion)));
  }
  if (Wanted() > 0) return absl::OkStatus();
  const std::string body = input_.substr(kHeaderBytes);
  const absl::Status status = OnMessage(kind, body);
  if (!status.ok()) return kind == Kind::kRefused ? status : Refuse(status);
  input_.clear();
  return absl::OkStatus();
}

absl::Status Handshake::OnMessage(Kind kind, std::string_view body) {
  const auto proves = [&](std::string_view role) {
    return body.size() == kProofBytes && CRYPTO_memcmp(body.data(), Proof(role).data(), kProofBytes) == 0;
  };
  if (kind == Kind::kRefused && state_ != State::kAwaitHello) {
    state_ = State::kFailed;
    return OnRefused(body);
  }
  switch (state_) {
    case State::kAwaitHello:
      return kind == Kind::kHello ? OnHello(body) : NotShoal();
    case State::kAwaitChallenge:
      if (kind != Kind::kChallenge || body.size() != kNonceBytes) return NotShoal();
      acceptor_nonce_ = std::string(body);
      Say(Kind::kProof, Proof("dialler"));
      state_ = State::kAwaitWelcome;
      return absl::OkStatus();
    case State::kAwaitProof:
      if (kind != Kind::kProof) return NotShoal();
      if (!proves("dialler")) return absl::PermissionDeniedError("wrong secret");
      Say(Kind::kWelcome, Proof("acceptor"));
      state_ = State::kDone;
      return absl::OkStatus();
    case State::kAwaitWelcome:
      if (kind != Kind::kWelcome) return NotShoal();
      if (!proves("acceptor"))
        return absl::PermissionDeniedError("who answers does not know the job's secret");
      state_ = State::kDone;
      return absl::OkStatus();
    case State::kDone:
    case State::kFailed:
      break;
  }
  return NotShoal();
}

absl::Status Handshake::OnHello(std::string_view body) {
  if (body.size() < kHelloBytes || body.size() > kHelloBytes + kJobIdBytesMax) return NotShoal();
  const uint32_t purpose = ReadU32(body), flags = ReadU32(body.substr(4));
  const std::string_view job = body.substr(kHelloBytes);
  if (purpose < static_cast<uint32_t>(Purpose::kBootstrap) ||
      purpose > static_cast<uint32_t>(Purpose::kData)) {
    return NotShoal();
  }
  if (job != credentials_.job_id) {
    return absl::FailedPreconditionError(
        absl::StrCat("job '", Printable(job), "', want '", credentials_.job_id, "'"));
  }
  const bool secret = (flags & kHasSecret) != 0;
  if (secret && credentials_.secret.empty())
    return absl::PermissionDeniedError("it has a secret, this job has none");
  if (!secret && !credentials_.secret.empty())
    return absl::PermissionDeniedError("it has no secret, this job has one");
  credentials_.purpose = static_cast<Purpose>(purpose);
  dialler_nonce_ = std::string(body.substr(8, kNonceBytes));
  Say(Kind::kChallenge, acceptor_nonce_);
  state_ = State::kAwaitProof;
  return absl::OkStatus();
}

absl::Status Handshake::OnRefused(std::string_view body) const {
  if (body.size() < 4) return NotShoal();
  const std::string text = absl::StrCat("refused: ", Printable(body.substr(4)));
  switch (ReadU32(body)) {
    case kOtherVersion:
    case kOtherJob:
      return absl::FailedPreconditionError(text);
    case kWrongSecret:
      return absl::PermissionDeniedError(text);
    default:
      return absl::DataLossError(text);
  }
}

std::string Handshake::Proof(std::string_view role) const {
  // Fixed lengths but for the job, which is last: no two different contents make the same bytes. The role
  // keeps a proof from being reflected, the nonces keep it from being replayed.
  std::string text = "shoal handshake ";
  text.append(role).append(16 - role.size(), '\0');
  text += U32(kProtocolVersion) + U32(static_cast<uint32_t>(credentials_.purpose));
  text += dialler_nonce_ + acceptor_nonce_ + credentials_.job_id;
  std::string proof(kProofBytes, '\0');
  unsigned int length = 0;
  SHOAL_CHECK(HMAC(EVP_sha256(), credentials_.secret.data(), static_cast<int>(credentials_.secret.size()),
                   reinterpret_cast<const uint8_t*>(text.data()), text.size(),
                   reinterpret_cast<uint8_t*>(proof.data()), &length) != nullptr &&
              length == kProofBytes);
  return proof;
}

Handshake::Nonce FreshNonce() {
  Handshake::Nonce nonce;
  ssize_t got = -1;
  while (got < 0) {
    got = getrandom(nonce.data(), nonce.size(), 0);
    SHOAL_CHECK(got >= 0 || errno == EINTR) << "getrandom: " << std::strerror(errno);
  }
  SHOAL_CHECK(got == static_cast<ssize_t>(nonce.size()));
  return nonce;
}

absl::Status Authenticate(int fd, const Credentials& credentials, int64_t deadline_ns) {
  Handshake handshake = Handshake::Dialler(credentials, FreshNonce());
  while (true) {
    const std::string output = handshake.TakeOutput();
    SHOAL_RETURN_IF_ERROR(SendAll(fd, output.data(), output.size(), deadline_ns));
    if (handshake.Done()) return absl::OkStatus();
    std::string input(handshake.Wanted(), '\0');
    SHOAL_RETURN_IF_ERROR(ReceiveAll(fd, input.data(), input.size(), deadline_ns));
    SHOAL_RETURN_IF_ERROR(handshake.Take(input));
  }
}

absl::StatusOr<Fd> DialAuthenticated(const SocketAddress& address, const Credentials& credentials,
                                     int64_t deadline_ns) {
  SHOAL_ASSIGN_OR_RETURN(Fd fd, Dial(address, deadline_ns));
  SHOAL_RETURN_IF_ERROR(Authenticate(fd.get(), credentials, deadline_ns), "dial ", address.ToString());
  return fd;
}

}  // namespace shoal
