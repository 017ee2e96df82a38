// An elastic job of real processes on this host, for tests: a coordinator and members, forked from this process (which
// must have no other threads), told what to do and heard line by line.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "collectives/membership/coordinator.h"
#include "collectives/membership/membership.h"

namespace shoal {

// A forked process. Killed and reaped by the destructor.
class Child {
 public:
  // The child's ends: never block, except that Hear waits when `timeout` is not zero.
  class Parent {
   public:
    explicit Parent(int in, int out) : in_(in), out_(out) {}
    void Say(const std::string& line) const;
    // A line that the parent told, or "" when there is none (in time).
    std::string Hear(absl::Duration timeout);

   private:
    int in_, out_;
    std::string bytes_;
  };

  explicit Child(const std::function<void(Parent&)>& body);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int signal_number) const;
  void Tell(const std::string& line) const;
  // The next line that it says; "" when it has ended, or says nothing for `timeout`.
  std::string Line(absl::Duration timeout = absl::Seconds(30));
  // Lines until one begins with `prefix`, which is returned; "" as Line.
  std::string LineWith(const std::string& prefix, absl::Duration timeout = absl::Seconds(30));
  bool Ended() const;  // Without waiting.
  // Waits for its end (at most 30 s) and returns what waitpid(2) said; -1: it runs on.
  int Wait();

 private:
  pid_t pid_ = 0;
  int in_ = -1, out_ = -1;
  std::string bytes_;
  mutable int status_ = 0;
  mutable bool reaped_ = false;
};

class ElasticJob {
 public:
  struct Options {
    int size_min = 1;
    int size_max = 64;
    absl::Duration heartbeat_timeout = absl::Seconds(5);
    std::string transport = "auto";
    std::string coordinator;  // Empty: a unix name.
    std::string secret = "s3cret";
  };

  explicit ElasticJob(const Options& options);

  // At the same address each time. Returns once it listens.
  void StartCoordinator();
  Child& coordinator() { return *coordinator_; }
  // `body` runs in a process of its own.
  std::unique_ptr<Child> StartMember(const std::function<void(Membership&, Child::Parent&)>& body) const;
  MembershipOptions member_options() const;

 private:
  const Options options_;
  const std::string address_;
  std::unique_ptr<Child> coordinator_;
};

// A member's usual life: epoch after epoch it runs checked collectives, on the group of all and on two concurrent groups
// split from it, until the parent tells it what else to do. It says
//   epoch N size M rank R at T            when an epoch's first collective has ended (T: NowNs())
//   aborted at T: CAUSE                   when a collective ended so
//   step S                                when told "steps"
//   wrong: ...                            when a result is not what it must be; then it ends
// and understands
//   steps    say the number of collectives so far
//   leave    leave politely and end
//   cut      break all connections that it has
// Members go on to the next epoch together when somebody waits to join.
void LiveAsMember(Membership& membership, Child::Parent& parent);

}  // namespace shoal
