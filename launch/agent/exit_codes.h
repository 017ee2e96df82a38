// How a process of Shoal ends, for shells, schedulers and the launcher. Documented in `shoal help` and docs/.
#pragma once

namespace shoal {

inline constexpr int kExitOk = 0;
// The job failed: on a rank, the message above says why; from the launcher, some rank did not end with 0.
inline constexpr int kExitFailure = 1;
// Wrong flag, configuration or environment. Starting again with the same words cannot help.
inline constexpr int kExitUsage = 2;
// EX_TEMPFAIL: another rank of the job went away and nothing is wrong with this one. Starting again can help.
// The launcher never blames such a rank while there is another cause.
inline constexpr int kExitPeerLost = 75;
// Plus the signal that asked the process to end: 130 for SIGINT, 143 for SIGTERM. Of a rank: it ended in order, and so shall all.
inline constexpr int kExitSignalBase = 128;

}  // namespace shoal
