// Where the words of one rank go: all of them into its log file, those that matter to the launcher's stderr,
// and the last ones are kept for the verdict. Bounded whatever a rank prints. One thread.
#pragma once

#include <deque>
#include <string>
#include <string_view>
#include <vector>

namespace shoal {

enum class RankStream { kStdout, kStderr };

class RankOutput {
 public:
  // `log_fd` (-1: none) is owned, `terminal_fd` borrowed.
  RankOutput(int rank, int log_fd, int terminal_fd);
  ~RankOutput();
  RankOutput(const RankOutput&) = delete;
  RankOutput& operator=(const RankOutput&) = delete;

  // What was read from the rank. Writes to both files, blocking. Rank 0's stderr reaches the terminal byte
  // for byte and at once; of the others' every whole line but information lines ("I 12:34:56..."), after
  // "[rank N] ".
  void Take(RankStream stream, std::string_view bytes);
  // The rank has ended: a last line without its end counts too.
  void Finish();

  // At most 20, without their line ends; of a line that was rewritten with '\r', what a terminal would still
  // show.
  std::vector<std::string> LastLines() const;

 private:
  void TakeLine(RankStream stream, std::string_view line);  // Without its '\n'.
  void WriteLog(std::string_view bytes);

  int rank_;
  int log_fd_;
  int terminal_fd_;
  std::string partial_[2];  // By stream: a line that has not ended.
  std::deque<std::string> last_lines_;
};

// All of `bytes`, blocking. False: the file takes no more (errno says why).
bool WriteFully(int fd, std::string_view bytes);

}  // namespace shoal
