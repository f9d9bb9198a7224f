// The team of a calling thread: how its phases follow one another, and who helps.
#include "team.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "crowding.h"

namespace fused_resnet {
namespace {

using Clock = std::chrono::steady_clock;

constexpr i64 kShares = 32;  // of a phase, for each thread, where there are so many tasks: fewer, and one thread waits longer

#if defined(FUSED_RESNET_TEST_DELAYS)
// A build of tests/cpp/memory: threads are late at the places where that matters, and soon asleep.
constexpr Clock::duration kWithin = std::chrono::microseconds(3), kBetween = std::chrono::microseconds(5);
void delay() {
  thread_local std::uint32_t random = std::uint32_t(std::hash<std::thread::id>()(std::this_thread::get_id())) | 1;
  random = random * 1664525u + 1013904223u;
  if (random >> 30 != 0) return;
  const Clock::time_point end = Clock::now() + std::chrono::microseconds(random >> 24 & 0x1f);
  while (Clock::now() < end) std::this_thread::yield();
}
#else
// So long a thread looks for work before it sleeps: within a job longer than most tasks take; between two jobs longer than
// the caller's Python; both much shorter than a time slice, for others may want the core.
constexpr Clock::duration kWithin = std::chrono::microseconds(50), kBetween = std::chrono::microseconds(200);
inline void delay() {}
#endif

// What may be taken of a job: `left` chunks of the phase that is under way, by threads whose number is less than `threads`; 0 threads where
// no job is. `sequence` changes with each phase of each job. All are in one word, so that whoever takes a chunk takes it of
// the phase that it has seen. `left` goes below 0 by one for each thread that has had chunks and finds no more.
struct Ticket {
  static constexpr int kMostThreads = (1 << 12) - 1;
  static constexpr std::uint64_t kThreadsMask = kMostThreads, kLeftMask = (1 << 20) - 1;
  static constexpr i64 kLeftZero = kMostThreads;  // what stands for 0: as far below as it may go
  static_assert(2 * kShares * kMostThreads + kLeftZero <= i64(kLeftMask));

  Ticket(std::uint32_t sequence, int threads, i64 left) : sequence(sequence), threads(threads), left(left) {}
  explicit Ticket(std::uint64_t word)
      : sequence(std::uint32_t(word >> 32)), threads(int(word >> 20 & kThreadsMask)), left(i64(word & kLeftMask) - kLeftZero) {}
  std::uint64_t word() const {
    return std::uint64_t(sequence) << 32 | std::uint64_t(threads) << 20 | std::uint64_t(left + kLeftZero);
  }

  std::uint32_t sequence;
  int threads;
  i64 left;
};

// One calling thread's: it alone begins jobs, one after the other.
//
// A phase is cut into chunks, so many consecutive tasks each. A chunk is taken by lowering the ticket. Whoever finishes a phase's last
// chunk publishes the next phase, or that there is no job. So the fields that describe a phase are written while nobody has a chunk, and
// read by those who have one. A thread without a chunk reads only the atomics, which live as long as the team: it may be late for as
// long as it likes, also into the next job.
class Team {
 public:
  Team() = default;
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() { dismiss(1); }

  bool run(const Job& job, int threads, Helpers helpers) {
    if (helpers == Helpers::own) {
      threads = hire(threads);
    } else {
      dismiss(1);  // OpenMP's have the same numbers
    }
    job_ = &job;
    threads_ = threads;
    phase_ = -1;
    control_ = FloatControl::now();
    failed_.store(false, std::memory_order_relaxed);
    next_phase();
    if (helpers == Helpers::own) {
      take_part(0);
    } else {
#pragma omp parallel num_threads(threads)
      help(omp_get_thread_num());
    }
    return !failed_.load(std::memory_order_relaxed);
  }

  Crowding& crowding() { return crowding_; }

 private:
  // So many threads there are then, or as many as the system gives, the calling one among them.
  int hire(int threads) {
    dismiss(threads);
    staff_.store(threads, std::memory_order_relaxed);
    try {
      own_.reserve(std::size_t(threads) - 1);
      while (int(own_.size()) + 1 < threads) own_.emplace_back(&Team::serve, this, int(own_.size()) + 1);
    } catch (const std::system_error&) {  // no more threads
    }
    return int(own_.size()) + 1;
  }

  void dismiss(int threads) {
    if (int(own_.size()) + 1 <= threads) return;
    staff_.store(threads, std::memory_order_relaxed);
    publish(0, 0);
    for (; int(own_.size()) + 1 > threads; own_.pop_back()) own_.back().join();
  }

  void serve(int number) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "fused_resnet");
#endif
    for (;;) {
      const Ticket ticket(ticket_.load(std::memory_order_acquire));
      if (number >= staff_.load(std::memory_order_relaxed)) return;  // read behind the ticket, which is published behind it
      if (!take(ticket, number)) wait(ticket, ticket.threads == 0 ? kBetween : kWithin);
    }
  }

  // A thread of OpenMP's, which computes for others afterwards. (All leave the parallel region together, so control_ is this job's.)
  void help(int number) {
    const FloatControlScope scope(control_);
    take_part(number);
  }

  // Until the job is done.
  void take_part(int number) {
    for (;;) {
      const Ticket ticket(ticket_.load(std::memory_order_acquire));
      if (ticket.threads == 0) return;
      if (!take(ticket, number)) wait(ticket, kWithin);
    }
  }

  // Takes a chunk of the ticket's phase and runs it, and then others while there are some: the phase lasts until the thread has said how
  // many it has done. False: there is nothing to take before the ticket changes. True: look again.
  bool take(Ticket ticket, int number) {
    if (ticket.left <= 0 || number >= ticket.threads) return false;
    std::uint64_t word = ticket.word();
    if (!ticket_.compare_exchange_strong(word, word - 1, std::memory_order_acq_rel)) return true;
    delay();
    if (number > 0) control_.set();
    i64 done = 0;
    do {
      const i64 begin = (chunks_ - ticket.left) * chunk_;
      if (!job_->run(phase_, begin, std::min(begin + chunk_, tasks_), number)) failed_.store(true, std::memory_order_relaxed);
      ++done;
      ticket = Ticket(ticket_.fetch_sub(1, std::memory_order_relaxed));
    } while (ticket.left > 0);
    if (unfinished_.fetch_sub(done, std::memory_order_acq_rel) == done) next_phase();
    return true;
  }

  void next_phase() {
    const int phases = failed_.load(std::memory_order_relaxed) ? 0 : job_->phases();
    do ++phase_;
    while (phase_ < phases && job_->tasks(phase_) == 0);
    if (phase_ >= phases) return publish(0, 0);
    tasks_ = job_->tasks(phase_);
    chunk_ = job_->alone(phase_) ? tasks_ : std::max<i64>(tasks_ / (kShares * threads_), 1);
    chunks_ = (tasks_ + chunk_ - 1) / chunk_;
    unfinished_.store(chunks_, std::memory_order_relaxed);
    publish(threads_, chunks_);
  }

  void publish(int threads, i64 chunks) {
    const Ticket last(ticket_.load(std::memory_order_relaxed));
    ticket_.store(Ticket(last.sequence + 1, threads, chunks).word());
    delay();
    changes_.fetch_add(1);
    delay();
    // Those who sleep are not needed for a single chunk: whoever publishes it comes for it next.
    if (chunks != 1 && asleep_.load() > 0) wake_all();
  }

  // Until the ticket has changed since `seen`: looks for so long, then sleeps. May return early; its callers look again.
  void wait(const Ticket& seen, Clock::duration look) {
    const auto changed = [&](std::memory_order order) { return Ticket(ticket_.load(order)).sequence != seen.sequence; };
    const Clock::time_point end = Clock::now() + look;
    do {
      for (int i = 0; i < 16; ++i) {
        if (changed(std::memory_order_acquire)) return;
        pause();
      }
    } while (Clock::now() < end);
    // In this order, against publish()'s: ticket, changes, who sleeps. One of the two sees the other.
    asleep_.fetch_add(1);
    delay();
    const std::uint32_t changes = changes_.load();
    if (!changed(std::memory_order_seq_cst)) {
      delay();
      sleep(changes);
    }
    asleep_.fetch_sub(1);
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

#if defined(__linux__)
  // The system compares again before it puts the thread to sleep, so a change meanwhile is not missed.
  void sleep(std::uint32_t changes) {
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&changes_), FUTEX_WAIT_PRIVATE, changes, nullptr, nullptr, 0);
  }
  void wake_all() {
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&changes_), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
  }
#else
  void sleep(std::uint32_t) { std::this_thread::yield(); }
  void wake_all() {}
#endif

  alignas(64) std::atomic<std::uint64_t> ticket_{Ticket(0, 0, 0).word()};
  alignas(64) std::atomic<i64> unfinished_{0};         // chunks of this phase
  alignas(64) std::atomic<std::uint32_t> changes_{0};  // of the ticket
  std::atomic<int> asleep_{0};
  std::atomic<int> staff_{1};  // own threads whose number is not less end: they see it before own_ says so
  std::atomic<bool> failed_{false};

  // For those who have a chunk.
  alignas(64) const Job* job_ = nullptr;
  FloatControl control_ = FloatControl::now();
  int threads_ = 0, phase_ = 0;
  i64 tasks_ = 0, chunk_ = 0, chunks_ = 0;

  std::vector<std::thread> own_;
  Crowding crowding_;
};

static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t) && std::atomic<std::uint32_t>::is_always_lock_free);

std::atomic<int> forks{0};
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });

// The calling thread's. Pointers, which have no destructor: a destructor of something else may still want the team.
thread_local Team* team_here = nullptr;
thread_local int team_forks = 0;  // `forks` when it was made

// Ends the team with its thread. The main thread's ends with the process: nothing waits for its helpers, which touch nothing but the heap. A
// child of a fork has its parent's memory but not its threads: there the parent's team is forgotten, not freed.
struct Ender {
  ~Ender() {
#if defined(__linux__)
    if (syscall(SYS_gettid) == getpid()) return;
#endif
    if (team_forks == forks.load()) delete team_here;
    team_here = nullptr;
  }
};

Team& team() {
  const int now = forks.load(std::memory_order_relaxed);
  if (team_here == nullptr || team_forks != now) {
    [[maybe_unused]] thread_local Ender ender;
    team_here = new Team;
    team_forks = now;
  }
  return *team_here;
}

// Where OpenMP's threads are bound to places, they are where they were wanted, and threads made by one of them would share its place. In a
// parallel region a call is alone.
bool openmp_only(int threads) { return threads <= 1 || omp_in_parallel() || omp_get_proc_bind() != omp_proc_bind_false; }

bool run_alone(const Job& job) {
  bool all = true;
  for (int phase = 0; all && phase < job.phases(); ++phase) {
    const i64 tasks = job.tasks(phase);
    if (tasks > 0) all = job.run(phase, 0, tasks, 0);
  }
  return all;
}

}  // namespace

Helpers helpers_between_calls(int threads) {
  if (openmp_only(threads)) return Helpers::openmp;
  return team().crowding().update(Crowding::read()) ? Helpers::own : Helpers::openmp;
}

Helpers helpers_as_before(int threads) {
  if (openmp_only(threads) || team_here == nullptr) return Helpers::openmp;
  return team().crowding().holds(Crowding::now()) ? Helpers::own : Helpers::openmp;
}

bool run_on_team(const Job& job, int threads, Helpers helpers) {
  if (threads > 1) threads = std::min({threads, omp_get_thread_limit(), Ticket::kMostThreads});
  if (threads <= 1 || omp_in_parallel()) return run_alone(job);
  return team().run(job, threads, helpers);
}

}  // namespace fused_resnet
