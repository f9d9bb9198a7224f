// Running a program: which memory a step reads and writes, and the threads.
#include <atomic>

#include "team.h"
#include "program.h"

namespace fused_resnet {
namespace {

// For a guard that reads less, threads that come together take longer than one of them alone.
constexpr i64 kGuardAlone = 1 << 16;

// A program whose first phase looks at a guard: where that does not hold, as little is computed as where a result is not finite.
class Guarded {
 public:
  Guarded(const Program& program, const Guard& guard) : program_(program), guard_(guard), alone_(guard.bytes_read() < kGuardAlone) {}

  int phases() const { return 1 + program_.phases(); }
  i64 tasks(int phase) const { return phase == 0 ? guard_.size() : program_.tasks(phase - 1); }
  bool alone(int phase) const { return phase == 0 ? alone_ : program_.alone(phase - 1); }
  i64 shared_bytes() const { return program_.shared_bytes(); }
  i64 thread_bytes() const { return program_.thread_bytes(); }
  i64 workspace_bytes() const { return program_.workspace_bytes(); }
  bool run_task(int phase, i64 index, const ProgramOperands& operands, char* shared, char* mine) const noexcept {
    if (phase > 0) return program_.run_task(phase - 1, index, operands, shared, mine);
    if (guard_.holds(index)) return true;
    changed_.store(true, std::memory_order_relaxed);
    return false;
  }
  bool changed() const { return changed_.load(std::memory_order_relaxed); }

 private:
  const Program& program_;
  const Guard& guard_;
  bool alone_;
  mutable std::atomic<bool> changed_{false};
};

// Some of a program's phases.
class Part {
 public:
  Part(const Program& program, std::size_t begin, std::size_t end) : program_(program), begin_(int(begin)), end_(int(end)) {}

  int phases() const { return end_ - begin_; }
  i64 tasks(int phase) const { return program_.tasks(begin_ + phase); }
  bool alone(int phase) const { return program_.alone(begin_ + phase); }
  i64 shared_bytes() const { return program_.shared_bytes(); }
  i64 thread_bytes() const { return program_.thread_bytes(); }
  bool run_task(int phase, i64 index, const ProgramOperands& operands, char* shared, char* mine) const noexcept {
    return program_.run_task(begin_ + phase, index, operands, shared, mine);
  }

 private:
  const Program& program_;
  int begin_, end_;
};

}  // namespace

Operands Program::operands_of(const Planned& planned, const ProgramOperands& operands, i64 image, char* arena, char* own) const noexcept {
  const auto at = [&](const Place& place) -> char* {
    switch (place.kind) {
      case Place::input: return static_cast<char*>(const_cast<void*>(operands.inputs[place.operand])) + image * place.image;
      case Place::output: return static_cast<char*>(operands.y) + image * place.image;
      case Place::arena: return arena + place.offset + image * place.image;
      case Place::own: return own + place.offset;
      default: return nullptr;
    }
  };
  Operands o;
  o.x = at(planned.in);
  o.shortcut = at(planned.shortcut);
  o.joined = at(planned.joined);
  o.y = at(planned.out);
  if (planned.weight != Network::kNone) {
    o.weight = operands.weight[planned.weight];
    o.bias = operands.bias[planned.weight];
  }
  return o;
}

// In the memory for all: the arena, then what a step shares. In a thread's own: depth first, the values of its group, then what a step
// shares, then what a step takes for itself; else the last alone.
bool Program::run_task(int phase, i64 index, const ProgramOperands& operands, char* shared, char* mine) const noexcept {
  const Phase& at = phases_[std::size_t(phase)];
  const Section& section = sections_[at.section];
  if (!section.depth_first) {
    const Planned& planned = section.plans.front().steps[at.step];
    return planned.step->run_task(at.phase, index, operands_of(planned, operands, 0, shared, nullptr), shared + arena_, mine);
  }
  const i64 image = index * section.images;
  const Plan& plan = network_.images_ - image < section.images ? section.plans.back() : section.plans.front();
  char* const scratch = mine + plan.values;
  bool finite = true;
  for (const Planned& planned : plan.steps) {
    const Step& step = *planned.step;
    const Operands o = operands_of(planned, operands, image, shared, mine);
    for (int p = 0; p < step.phases(); ++p) {
      for (i64 i = 0; i < step.tasks(p); ++i) finite = step.run_task(p, i, o, scratch, scratch + plan.shared) && finite;
    }
  }
  return finite;
}

bool Program::run(const ProgramOperands& operands) const {
  return phases_.empty() || run_phases(*this, operands, threads_, helpers_between_calls(threads_));
}

bool Program::run_stage(std::size_t i, const ProgramOperands& operands, char* workspace) const {
  const Stage& stage = stages_.at(i);
  return run_phases(Part(*this, stage.begin, stage.end), operands, threads_, helpers_between_calls(threads_), workspace);
}

std::optional<bool> Program::run_if(const Guard& guard, const ProgramOperands& operands) const {
  const Guarded guarded(*this, guard);
  const bool finite = run_phases(guarded, operands, threads_, helpers_between_calls(threads_));
  if (guarded.changed()) return std::nullopt;
  return finite;
}

}  // namespace fused_resnet
