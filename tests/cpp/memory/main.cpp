// The kernels without Python: every buffer has guard bytes on both sides and the exact size that its strides reach, outputs
// start as NaN, and integer data make every sum exact, so that results are compared for equality (Winograd F(4x4, 3x3), whose
// fractions round, within a bound). Convolutions and blocks also run by hand, task by task in a random order on real threads, in
// workspaces of exactly the size that they ask for. Built three times by tests/kernels/test_memory.py: as it is, under AddressSanitizer
// and UndefinedBehaviorSanitizer, and under ThreadSanitizer.
//
// Prints a line for each failure and a summary; exit status 1 if anything failed. Arguments: run one case in so many (1); the seed of
// the orders of tasks (1), which a failure names.
#include <algorithm>
#include <cstdlib>

#include "../../../csrc/cpu/dispatch.h"
#include "by_hand.h"
#include "cases.h"
#include "check.h"

int main(int arguments, char** argument) {
  const auto number = [&](int i) { return arguments > i ? unsigned(std::max(std::atoi(argument[i]), 1)) : 1u; };
  memory::start(number(1), number(2));
  const auto& shared = memory::shared_phases();
  memory::convolutions();
  const int direct = shared.all;
  memory::winograd();
  const int winograd = shared.of_several;
  memory::gradients();
  const int gradients = shared.of_several - winograd;
  memory::blocks();
  const int blocks = shared.of_several - winograd - gradients;
  memory::programs();
  memory::passes();
  memory::pooling();
  memory::teams();
  memory::arithmetic();
  memory::describe("all cases together: of %d phases of direct convolutions, %d of Winograd's two, %d of gradients, %d of blocks", direct, winograd,
                   gradients, blocks);
  const int tables = int(fused_resnet::available_tables().size());
  memory::expect(direct >= 10 * tables, "direct convolutions' tasks were run on several threads");
  memory::expect(winograd >= 4 * tables, "the tasks of Winograd's two phases were run on several threads");
  memory::expect(gradients >= 4 * tables, "the tasks of the phases of gradients were run on several threads");
  memory::expect(blocks >= 20 * tables, "the tasks of the phases of blocks were run on several threads");
  return memory::finish();
}
