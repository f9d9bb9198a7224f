// Whether others want the cores that a thread runs on.
#pragma once

#include <chrono>

#include "../types.h"

#if defined(__linux__)
#include <sys/resource.h>
#endif

namespace fused_resnet {

// Judged by how often the system took the core from the thread while it had work: a thread that is alone on its core loses it to the
// system's own work some 20 times in a second of computing, one that shares it with another process 150 to 400 times.
class Crowding {
 public:
  using Duration = std::chrono::nanoseconds;

  struct Reading {
    Duration wall{0};   // of a clock that never goes back
    Duration cpu{0};    // in which the thread had a core
    i64 preempted = 0;  // how often it lost one while it had work
  };

  static Duration now() { return std::chrono::steady_clock::now().time_since_epoch(); }

  // What the calling thread's state is now; a system that does not tell leaves all but the clock at 0, which is never crowded.
  static Reading read() {
    Reading now;
    now.wall = Crowding::now();
#if defined(__linux__)
    rusage used;
    if (getrusage(RUSAGE_THREAD, &used) == 0) {
      now.cpu = std::chrono::seconds(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                std::chrono::microseconds(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
      now.preempted = used.ru_nivcsw;
    }
#endif
    return now;
  }

  // The verdict after this reading of one thread: false at first; renewed after each kWindow of its computing, but that a verdict
  // "crowded" holds for kHold and then falls, for with the threads that are chosen by it the signs would be others.
  bool update(const Reading& now) {
    if (holds(now.wall)) return true;
    if (!crowded_ && now.cpu - since_.cpu < kWindow) return false;
    crowded_ = !crowded_ && (now.preempted - since_.preempted) * kEach > now.cpu - since_.cpu;
    since_ = now;
    return crowded_;
  }

  // Whether the last verdict was "crowded" and still holds.
  bool holds(Duration now) const { return crowded_ && now - since_.wall < kHold; }

  static constexpr Duration kWindow = std::chrono::milliseconds(100), kHold = std::chrono::seconds(2);
  static constexpr Duration kEach = std::chrono::milliseconds(12);  // of computing for each loss of the core: fewer, and it is crowded

 private:
  Reading since_ = read();
  bool crowded_ = false;
};

}  // namespace fused_resnet
