// Flags of commands that can train on emulated devices (launch/trainer/emulated_device.h).
#pragma once

#include <optional>

#include "launch/cli/flags.h"
#include "launch/trainer/emulated_device.h"

namespace shoal {

struct EmulationFlags {
  double gflops = 0, task_us = EmulatedDevice().task_us;

  // None: this machine's processors.
  std::optional<EmulatedDevice> Device() const {
    if (gflops == 0) return std::nullopt;
    return EmulatedDevice{gflops, task_us};
  }
};

inline void AddEmulationFlags(FlagSet* flags, EmulationFlags* values) {
  flags->Add({.name = "gflops",
              .value = "G",
              .help = "Emulates devices: matrix products take at least as long as at this rate, the thread sleeps the rest. For more "
                      "ranks than processors (tests/cluster/emulate).",
              .min = 0},
             &values->gflops);
  flags->Add({.name = "task-us", .value = "T", .help = "Of an emulated device: what each of its tasks takes beside that.", .min = 0},
             &values->task_us);
}

}  // namespace shoal
