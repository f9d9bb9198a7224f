// What a check does: count, and name the case that failed. Which cases run: all, or one in so many.
#pragma once

#include <string>

#include "../../../csrc/types.h"

namespace memory {

// From the program's arguments: one case in `every` is run, and `seed` gives the order of the tasks (see by_hand.h).
void start(unsigned every, unsigned seed);
bool all_cases();  // every == 1

// A new case: its number rises, and this says whether it is to be run. Which ones are is a hash of the number, for a fixed step
// would, in nested loops, meet one dtype or one instruction set again and again. `always`: whatever the number, for cases without
// which a build would not see what it is for.
bool take(bool always = false);

// What to print beside a failure.
void describe(const char* format, ...) __attribute__((format(printf, 1, 2)));

void expect(bool ok, const char* what);

// The seed for this case, the same whether or not the cases before it are run.
unsigned case_seed();

int finish();  // prints the summary; the program's exit status

const char* name(fused_resnet::DType dtype);

}  // namespace memory
