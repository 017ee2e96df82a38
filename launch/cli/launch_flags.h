// The launcher's flags as every program that starts ranks declares them. Hides torchrun's list of names; what
// their values mean is judged by MakeAgentOptions.
#pragma once

#include "launch/agent/agent_options.h"
#include "launch/cli/flags.h"

namespace shoal {

// Declares torchrun's flags, each also read from PET_<NAME>, so that command lines written for it work.
// Parse() puts what was given into launch->values; `launch` is borrowed until then. Those of elastic jobs are explained
// where launch->may_be_elastic.
void AddLaunchFlags(FlagSet* flags, RawLaunchFlags* launch);

}  // namespace shoal
