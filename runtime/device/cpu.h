// What this machine's processor offers, and how many of its threads this process uses.
#pragma once

#include <string>
#include <string_view>

#include "runtime/base/status.h"

namespace shoal {

enum class Isa : int { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// The best level that both the processor and SHOAL_ISA (plain, avx2, avx512; unset: no limit) allow. Constant for the
// life of the process. Kernels of our own dispatch on it; SHOAL_ISA also limits oneDNN.
Isa ActiveIsa();
// The processor multiplies bf16 pairs (AVX512_BF16), and ActiveIsa() is kAvx512.
bool HasBf16Dot();
std::string_view Name(Isa isa);

// Sets the size of the OpenMP team of this process, for our kernels and oneDNN. `threads` >= 1.
void SetThreads(int threads);
int Threads();

// Cores that this process may use (affinity mask and CPU quota of its control group), at least 1.
int UsableCores();

}  // namespace shoal
