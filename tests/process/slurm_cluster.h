// A Slurm of two nodes, 127.0.0.1 and 127.0.0.2, made of plain processes with their own ports, keys and
// state, for tests that run srun. Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/harness/subprocess.h"
#include "tests/harness/temp_dir.h"

namespace shoal::testing {

class SlurmCluster {
 public:
  // Blocks until a job could start. FAILED_PRECONDITION: a package is missing, or we are not root.
  static absl::StatusOr<std::unique_ptr<SlurmCluster>> Start();

  // For the environment of srun.
  std::string conf() const { return dir_ / "slurm.conf"; }

 private:
  SlurmCluster() = default;

  void WriteConfiguration() const;
  absl::Status StartDaemons();

  TempDir dir_;
  std::vector<std::unique_ptr<Subprocess>> daemons_;  // The later ones use the earlier ones.
};

}  // namespace shoal::testing
