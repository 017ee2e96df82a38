// Slurm's compressed lists, as srun exports them. Pure. INVALID_ARGUMENT repeats the text and says what is
// wrong in it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace shoal {

// SLURM_STEP_TASKS_PER_NODE: "2(x3),1" gives {2, 2, 2, 1}.
absl::StatusOr<std::vector<int>> ExpandTasksPerNode(std::string_view text);

// SLURM_STEP_NODELIST: "a[1-2,08-10],login" gives {a1, a2, a08, a09, a10, login}; several brackets in one
// name multiply.
absl::StatusOr<std::vector<std::string>> ExpandNodeList(std::string_view text);

}  // namespace shoal
