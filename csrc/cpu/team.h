// Threads that share tasks.
#pragma once

#include "float_control.h"
#include "workspace.h"

namespace fused_resnet {

// What a team does: a few phases, one after the other, each of many tasks, in any order and on any thread. A task does not begin a job.
class Job {
 public:
  virtual int phases() const noexcept = 0;
  virtual i64 tasks(int phase) const noexcept = 0;
  virtual bool alone(int phase) const noexcept = 0;  // whether one thread does the whole phase
  // Tasks begin <= i < end of a phase, at least one, by the thread of this number, 0 <= thread < threads. False: no later phase is begun.
  virtual bool run(int phase, i64 begin, i64 end, int thread) const noexcept = 0;

 protected:
  ~Job() = default;
};

// Who helps the calling thread. `openmp`: the threads of the OpenMP runtime, which PyTorch's operators use as well. They wait by spinning
// for milliseconds, so they are there at once for the next operator, whoever's it is, and keep a core from everyone else. `own`:
// threads that sleep soon. Where OpenMP's have just been used and spin, they come late.
enum class Helpers { openmp, own };

// For a program on so many threads, between whose calls PyTorch's operators do little: `own` where the machine is crowded.
Helpers helpers_between_calls(int threads);

// For a single step, which may be one of many operators of PyTorch's: `own` only if a program of this thread has just been told so, for
// changing from one to the other costs more than either.
Helpers helpers_as_before(int threads);

// All phases of `job` on the calling thread, whose number is 0, and at most threads - 1 helpers, as many as the system gives. What a
// helper that is late does not do, the others do; only at the end OpenMP waits for each of its own. False: a task returned false. Throws
// std::bad_alloc, before any work.
bool run_on_team(const Job& job, int threads, Helpers helpers);

// A step, a program or a part of one, with its operands and its memory: shared_bytes() for all threads together, behind them
// thread_bytes() for each.
template <class Work, class Operands>
class WorkJob final : public Job {
 public:
  WorkJob(const Work& work, const Operands& operands, char* workspace)
      : work_(work), operands_(operands), shared_(workspace), own_(workspace + work.shared_bytes()), thread_bytes_(work.thread_bytes()) {}

  int phases() const noexcept override { return work_.phases(); }
  i64 tasks(int phase) const noexcept override { return work_.tasks(phase); }
  bool alone(int phase) const noexcept override { return work_.alone(phase); }
  bool run(int phase, i64 begin, i64 end, int thread) const noexcept override {
    bool finite = true;
    for (i64 i = begin; i < end; ++i) finite = work_.run_task(phase, i, operands_, shared_, own_ + thread * thread_bytes_) && finite;
    return finite;
  }

 private:
  const Work& work_;
  const Operands& operands_;
  char *shared_, *own_;
  i64 thread_bytes_;
};

// All phases of `work` on so many threads, in a workspace of its workspace_bytes(). False: as of Step::run_task.
template <class Work, class Operands>
bool run_phases(const Work& work, const Operands& operands, int threads, Helpers helpers, char* workspace) {
  return run_on_team(WorkJob<Work, Operands>(work, operands, workspace), threads, helpers);
}

// The same in a workspace of the call's own. Throws std::bad_alloc, before any work.
template <class Work, class Operands>
bool run_phases(const Work& work, const Operands& operands, int threads, Helpers helpers) {
  const Workspace workspace(work.workspace_bytes());
  return run_phases(work, operands, threads, helpers, workspace.data());
}

// f(i) for 0 <= i < count on so many of OpenMP's threads, of which each has the same part each time, as in PyTorch's operators: what
// the one before has written is in the cache of the thread that reads it. `f` does not throw.
template <class F>
void parallel_for(i64 count, int threads, const F& f) {
  const FloatControl control = FloatControl::now();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FloatControlScope scope(control);
#pragma omp for schedule(static)
    for (i64 i = 0; i < count; ++i) f(i);
  }
}

}  // namespace fused_resnet
