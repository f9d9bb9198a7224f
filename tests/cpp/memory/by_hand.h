// The tasks of a convolution or a block, run without OpenMP: ThreadSanitizer does not see how GCC's OpenMP synchronises.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/team.h"
#include "../../../csrc/cpu/workspace.h"
#include "check.h"
#include "guarded.h"

namespace memory {

// How many phases with several tasks by_hand has run on several threads; and how many of them are not their work's only phase.
struct SharedPhases {
  int all = 0, of_several = 0;
};
inline SharedPhases& shared_phases() {
  static SharedPhases counts;
  return counts;
}

// Each phase's tasks in a random order (case_seed() gives it), dealt out to real threads. Nothing orders two tasks of one
// phase: the deal is fixed beforehand, for a queue's lock would be an order that ThreadSanitizer takes for the tasks' own. Every
// workspace has exactly the bytes asked for, starts as NaN, and is guarded; returns whether the guard bytes are intact and every task
// found its values finite, as those of the operands are: a task that looks at memory that nobody has written finds NaN.
// Any number of threads may share a phase's tasks, however many `work` was planned for.
template <class Work, class Operands>
bool by_hand(const Work& work, const Operands& operands) {
  constexpr std::size_t threads = 3;
  const auto workspace = [](i64 bytes) {
    auto made = std::make_unique<Guarded>(bytes);
    made->fill(0xff);
    return made;
  };
  const auto shared = workspace(work.shared_bytes());
  std::vector<std::unique_ptr<Guarded>> mine;
  for (std::size_t t = 0; t < threads; ++t) mine.push_back(workspace(work.thread_bytes()));
  std::atomic<bool> finite{true};
  std::mt19937 random(case_seed());
  for (int phase = 0; phase < work.phases(); ++phase) {
    std::vector<i64> order(std::size_t(work.tasks(phase)));
    std::iota(order.begin(), order.end(), i64(0));
    std::shuffle(order.begin(), order.end(), random);
    const auto deal = [&](std::size_t t) {
      bool all = true;  // of this thread's tasks: an atomic written by every task would be an order between them
      for (std::size_t i = t; i < order.size(); i += threads) {
        all = work.run_task(phase, order[i], operands, shared->get(), mine[t]->get()) && all;
      }
      if (!all) finite = false;
    };
    shared_phases().all += order.size() > 1;
    shared_phases().of_several += order.size() > 1 && work.phases() > 1;
    std::vector<std::thread> others;
    for (std::size_t t = 1; t < std::min(threads, order.size()); ++t) others.emplace_back(deal, t);
    deal(0);
    for (std::thread& thread : others) thread.join();
  }
  return finite && shared->intact() && std::all_of(mine.begin(), mine.end(), [](const auto& m) { return m->intact(); });
}

// All phases by a team of our own threads: ThreadSanitizer sees how they meet. Otherwise as by_hand.
template <class Work, class Operands>
bool by_team(const Work& work, const Operands& operands) {
  constexpr int threads = 3;
  class GuardedJob final : public fused_resnet::Job {
   public:
    GuardedJob(const Work& work, const Operands& operands) : work_(work), operands_(operands) {
      for (int t = 0; t <= threads; ++t) {
        memory_.push_back(std::make_unique<Guarded>(t == threads ? work.shared_bytes() : work.thread_bytes()));
        memory_.back()->fill(0xff);
      }
    }
    int phases() const noexcept override { return work_.phases(); }
    i64 tasks(int phase) const noexcept override { return work_.tasks(phase); }
    bool alone(int phase) const noexcept override { return work_.alone(phase); }
    bool run(int phase, i64 begin, i64 end, int thread) const noexcept override {
      bool finite = true;
      for (i64 i = begin; i < end; ++i) {
        finite = work_.run_task(phase, i, operands_, memory_[threads]->get(), memory_[std::size_t(thread)]->get()) && finite;
      }
      return finite;
    }
    bool intact() const {
      return std::all_of(memory_.begin(), memory_.end(), [](const auto& m) { return m->intact(); });
    }

   private:
    const Work& work_;
    const Operands& operands_;
    std::vector<std::unique_ptr<Guarded>> memory_;
  };
  const GuardedJob job(work, operands);
  const bool finite = fused_resnet::run_on_team(job, threads, fused_resnet::Helpers::own);
  return finite && job.intact();
}

// work.run(operands) with a workspace of exactly the size that it asks for, full of NaN. Workspaces are kept from call to call: one as
// large as the largest so far would hide from AddressSanitizer that a run leaves it, and one that a run before has filled would hide
// that a value is never written. Returns what the run does.
template <class Work, class Operands>
bool run_afresh(const Work& work, const Operands& operands) {
  fused_resnet::Workspace::release();
  {
    const fused_resnet::Workspace next(work.workspace_bytes());
    if (work.workspace_bytes() > 0) std::memset(next.data(), 0xff, std::size_t(work.workspace_bytes()));
  }
  return work.run(operands);
}

}  // namespace memory
