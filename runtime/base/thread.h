// What a thread asks of the operating system's scheduler. Each is a wish of the calling thread alone; where it cannot be granted nothing
// changes.
#pragma once

namespace shoal {

// Short turns: where computing threads hold all cores the thread gets one when it is woken, not milliseconds later, and no larger
// share of them. For threads that move bytes and mostly sleep. Linux 6.12; others pay no heed.
void AskForShortTurns();

// Sleeps that end when they should: by default Linux may add 50 us to each.
void AskForExactTimers();

}  // namespace shoal
