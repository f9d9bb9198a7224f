// Threads that share the tasks of one phase after the other, in one parallel region.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <thread>
#endif

#include "workspace.h"

namespace fused_resnet {

class Crew {
 public:
  // What each thread of the team calls, with its number: all phases of `work`, of whose tasks it takes one after the other. `mine`: its
  // own thread_bytes() of memory. Right for a team of any size, whatever was asked for.
  template <class Work, class Operands>
  void work(const Work& work, const Operands& operands, int number, int team, char* shared, char* mine) {
    const int phases = work.phases();
    for (int phase = 0; phase < phases; ++phase) {
      const bool alone = work.alone(phase);
      if (!alone) {
        share(work, operands, phase, team, shared, mine);
      } else if (number == 0) {
        bool finite = true;
        for (i64 i = 0; i < work.tasks(phase); ++i) finite = work.run_task(phase, i, operands, shared, mine) && finite;
        if (!finite) finite_.store(false, std::memory_order_relaxed);
      }
      if (phase + 1 < phases && !(alone && work.alone(phase + 1))) meet(team);
      if (stop_) return;
    }
  }

  // After all have returned. False: as of Step::run_task; then nothing was begun behind the next meeting.
  bool finite() const { return finite_.load(std::memory_order_relaxed); }

 private:
  static constexpr i64 kShares = 32;  // of a phase, for each thread, where there are so many tasks: fewer, and one thread waits longer

  // So often a waiting thread looks before it sleeps: longer than most tasks take, much shorter than a time slice, for another process
  // may want the core.
  static constexpr int kSpins = 2000;

  template <class Work, class Operands>
  void share(const Work& work, const Operands& operands, int phase, int team, char* shared, char* mine) {
    const i64 count = work.tasks(phase), some = std::max<i64>(count / (kShares * team), 1);
    bool finite = true;
    for (i64 begin = take(some); begin < count; begin = take(some)) {
      for (i64 i = begin; i < std::min(begin + some, count); ++i) {
        finite = work.run_task(phase, i, operands, shared, mine) && finite;
      }
    }
    if (!finite) finite_.store(false, std::memory_order_relaxed);
  }

  i64 take(i64 some) { return next_.fetch_add(some, std::memory_order_relaxed); }

  // Waits until all threads of the team have come.
  void meet(int team) {
    const std::uint32_t before = meetings_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      // Only here, and not before all have read it: whoever looks at finite_ itself may be early or late.
      stop_ = !finite_.load(std::memory_order_relaxed);
      meetings_.store(before + 1);
      if (asleep_.load() > 0) wake_all();
      return;
    }
    for (int i = 0; i < kSpins; ++i) {
      if (meetings_.load(std::memory_order_acquire) != before) return;
      pause();
    }
    asleep_.fetch_add(1);
    while (meetings_.load() == before) sleep(before);
    asleep_.fetch_sub(1);
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

#if defined(__linux__)
  // The kernel compares again before it puts the thread to sleep, so a meeting that ends meanwhile is not missed.
  void sleep(std::uint32_t before) {
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&meetings_), FUTEX_WAIT_PRIVATE, before, nullptr, nullptr, 0);
  }
  void wake_all() {
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&meetings_), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
  }
#else
  void sleep(std::uint32_t) { std::this_thread::yield(); }
  void wake_all() {}
#endif

  alignas(64) std::atomic<i64> next_{0};  // the first task of this phase that nobody has taken
  alignas(64) std::atomic<std::uint32_t> meetings_{0};
  std::atomic<int> arrived_{0}, asleep_{0};
  std::atomic<bool> finite_{true};
  bool stop_ = false;
};

static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t) && std::atomic<std::uint32_t>::is_always_lock_free);

// All phases of `work` on so many threads, in a workspace of its workspace_bytes(). False: as of Step::run_task.
template <class Work, class Operands>
bool run_phases(const Work& work, const Operands& operands, int threads, char* workspace) {
  const i64 shared_bytes = work.shared_bytes(), thread_bytes = work.thread_bytes();
  char* const shared = workspace;
  if (threads == 1) {
    bool finite = true;
    for (int phase = 0; finite && phase < work.phases(); ++phase) {
      const i64 count = work.tasks(phase);
      for (i64 i = 0; i < count; ++i) finite = work.run_task(phase, i, operands, shared, shared + shared_bytes) && finite;
    }
    return finite;
  }
  Crew crew;
#pragma omp parallel num_threads(threads)
  crew.work(work, operands, omp_get_thread_num(), omp_get_num_threads(), shared,
            shared + shared_bytes + omp_get_thread_num() * thread_bytes);
  return crew.finite();
}

// The same in a workspace of the call's own. Throws std::bad_alloc, before any work.
template <class Work, class Operands>
bool run_phases(const Work& work, const Operands& operands, int threads) {
  const Workspace workspace(work.workspace_bytes());
  return run_phases(work, operands, threads, workspace.data());
}

}  // namespace fused_resnet
