// Teams: every task once, phases in order, whoever helps, however many, however many call; forks, threads that cannot be had, and
// the settings of floating point.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../../csrc/cpu/crowding.h"
#include "../../../csrc/cpu/team.h"
#include "cases.h"
#include "check.h"

using namespace fused_resnet;

namespace memory {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;  // without OpenMP, and no threads in the child of a fork
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

// Each task reads two values of the phase before and writes one, without any order but the team's.
class Sums final : public Job {
 public:
  Sums(std::mt19937& random, int threads) : threads_(threads) {
    for (std::size_t count = random() % 6; count > 0; --count) {
      const i64 tasks = i64(random() % 4 == 0 ? random() % 3 : random() % 300);
      phases_.push_back({std::vector<i64>(std::size_t(tasks), -1), std::vector<int>(std::size_t(tasks), -1), random() % 4 == 0});
    }
    if (random() % 3 == 0) fails_in_ = int(random() % 6);
  }

  int phases() const noexcept override { return int(phases_.size()); }
  i64 tasks(int phase) const noexcept override { return i64(at(phase).values.size()); }
  bool alone(int phase) const noexcept override { return at(phase).alone; }
  bool run(int phase, i64 begin, i64 end, int thread) const noexcept override {
    if (busy_[std::size_t(thread)].exchange(true)) shared_number_ = true;
    for (i64 i = begin; i < end; ++i) {
      at(phase).values[std::size_t(i)] = value(phase, i) + (at(phase).threads[std::size_t(i)] < 0 ? 0 : 1 << 20);
      at(phase).threads[std::size_t(i)] = thread;
    }
    const auto later = std::chrono::steady_clock::now() + std::chrono::microseconds((phase * 7 + begin) % 8 == 0 ? begin * 5 % 64 : 0);
    while (std::chrono::steady_clock::now() < later) {  // now and then so long that the others sleep
    }
    busy_[std::size_t(thread)] = false;
    return phase != fails_in_ || begin > 0;
  }

  // After run_on_team, which returned `all`.
  bool right(bool all) const {
    const bool failed = fails_in_ < phases() && tasks_in(fails_in_) > 0;
    bool good = all == !failed && !shared_number_;
    for (int phase = 0; phase < phases(); ++phase) {
      const Phase& p = at(phase);
      for (std::size_t i = 0; i < p.values.size(); ++i) {
        if (failed && phase > fails_in_) {
          good = good && p.threads[i] == -1;
        } else {
          good = good && p.threads[i] >= 0 && p.threads[i] < threads_ && p.values[i] == value(phase, i64(i)) &&
                 (!p.alone || p.threads[i] == p.threads[0]);
        }
      }
    }
    return good;
  }

  static constexpr int kMostThreads = 6;

 private:
  struct Phase {
    std::vector<i64> values;
    std::vector<int> threads;
    bool alone;
  };
  Phase& at(int phase) const { return phases_[std::size_t(phase)]; }
  i64 tasks_in(int phase) const { return phase < phases() ? tasks(phase) : 0; }
  i64 value(int phase, i64 i) const {
    if (phase == 0 || at(phase - 1).values.empty()) return i;
    const std::vector<i64>& before = at(phase - 1).values;
    return (before[std::size_t(i * 7) % before.size()] + before[std::size_t(i * 13 + 5) % before.size()] + 1) % 1000;
  }

  mutable std::vector<Phase> phases_;
  int threads_, fails_in_ = 1000;
  mutable std::atomic<bool> busy_[kMostThreads] = {};  // by the thread's number
  mutable std::atomic<bool> shared_number_{false};
};

bool several_jobs(unsigned seed, int count, bool own_only) {
  std::mt19937 random(seed);
  bool good = true;
  for (int i = 0; i < count; ++i) {
    const int threads = int(random() % Sums::kMostThreads) + 1;
    const Sums job(random, threads);
    const Helpers helpers = own_only || random() % 4 ? Helpers::own : Helpers::openmp;
    good = job.right(run_on_team(job, threads, helpers)) && good;
  }
  return good;
}

float half_a_denormal() {
  volatile float denormal = 2e-39f;
  return denormal * 0.5f;
}

// As many tasks as threads, each of which waits until all have begun: only so many threads at once can do it.
class Rendezvous final : public Job {
 public:
  explicit Rendezvous(int threads) : denormals(std::size_t(threads)), threads_(threads) {}
  int phases() const noexcept override { return 1; }
  i64 tasks(int) const noexcept override { return threads_; }
  bool alone(int) const noexcept override { return false; }
  bool run(int, i64 begin, i64, int) const noexcept override {
    ++begun_;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (begun_ < threads_ && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    denormals[std::size_t(begin)] = half_a_denormal();
    return begun_ == threads_;
  }

  mutable std::vector<float> denormals;

 private:
  int threads_;
  mutable std::atomic<int> begun_{0};
};

void everybody_comes(Helpers helpers) {
  for (const int threads : {2, 3, 2, 5}) {
    describe("team: %d threads, helpers %d", threads, int(helpers));
    const Rendezvous job(threads);
    expect(run_on_team(job, threads, helpers), "so many threads work at once");
  }
}

#if defined(__x86_64__)
void settings_are_the_callers(Helpers helpers) {
  describe("team: denormals, helpers %d", int(helpers));
  const unsigned before = _mm_getcsr(), flush = 0x8040;
  const auto computed = [&](unsigned control) {
    const Rendezvous job(2);
    float loop[2] = {};
    _mm_setcsr(control);
    run_on_team(job, 2, helpers);
    parallel_for(2, 2, [&](i64 i) { loop[i] = half_a_denormal(); });
    _mm_setcsr(before);  // the comparison would take a denormal for zero
    std::vector<float> all = job.denormals;
    all.insert(all.end(), loop, loop + 2);
    return all;
  };
  const std::vector<float> kept_all(4, 1e-39f), none(4, 0.0f);
  expect(computed(before) == kept_all, "denormals where the caller has them");
  expect(computed(before | flush) == none, "none where the caller has none");
  expect(computed(before) == kept_all, "denormals again");
  computed(before | flush);
  bool kept = true;
#pragma omp parallel num_threads(2) reduction(&& : kept)
  kept = (_mm_getcsr() & flush) == (before & flush);
  expect(kept, "OpenMP's threads have their own settings afterwards");
}
#endif

void many_callers() {
  describe("team: eight callers, whose threads end");
  std::atomic<int> good{0};
  std::vector<std::thread> callers;
  for (unsigned c = 0; c < 8; ++c) callers.emplace_back([&, c] { good += several_jobs(100 + c, 40, true); });
  for (std::thread& caller : callers) caller.join();
  expect(good == 8, "every task once and in order");
}

// In the child the calling thread is alone, whatever helpers the team had.
void forks() {
  if (kThreadSanitizer) return;
  describe("team: forks");
  several_jobs(7, 20, true);
  // The child ends by the whole of exit(), where it does not look like a leak that the parent's team is forgotten.
  const auto child_does = [](const auto& work) {
    const pid_t child = fork();
    if (child == 0) {
      const int status = work() ? 0 : 1;
      kAddressSanitizer ? _exit(status) : std::exit(status);
    }
    int status = -1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
  };
  const auto uses_threads = [] {
    const Rendezvous job(3);
    return run_on_team(job, 3, Helpers::own) && several_jobs(8, 20, true);
  };
  expect(child_does(uses_threads), "the child has threads of its own");
  expect(child_does([] { return true; }), "a child that calls nothing ends");
  if (kAddressSanitizer) return;  // in the child its allocator may wait for a thread of the parent
  bool from_another = false;
  std::atomic<bool> enough{false};
  std::thread busy([&] {
    while (!enough) several_jobs(10, 5, true);
  });
  std::thread([&] { from_another = child_does(uses_threads); }).join();  // a thread that has no team
  expect(from_another && child_does(uses_threads), "a child whose parent was at work in another thread");
  enough = true;
  busy.join();
  const Rendezvous job(4);
  expect(run_on_team(job, 4, Helpers::own) && several_jobs(9, 20, true), "the parent still has its threads");
}

// Destroyed when its thread ends, after the team, which was made later.
struct Late {
  std::atomic<bool>* good = nullptr;
  ~Late() {
    if (good != nullptr) *good = several_jobs(12, 10, true);
  }
};

void after_the_team() {
  describe("team: a destructor that has work for it");
  std::atomic<bool> good{false};
  std::thread([&] {
    thread_local Late late;
    late.good = &good;
    several_jobs(13, 10, true);
  }).join();
  expect(good, "a team is there whenever it is wanted");
}

// In a thread of its own, whose team has no helpers yet.
void no_threads_left() {
#if defined(__GLIBC__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
  describe("team: no threads can be had");
  bool good = false;
  std::thread caller([&] {
    pthread_attr_t usual, huge;
    pthread_getattr_default_np(&usual);
    pthread_attr_init(&huge);
    pthread_attr_setstacksize(&huge, std::size_t(1) << 46);
    bool refused = false;
    if (pthread_setattr_default_np(&huge) == 0) {
      try {
        std::thread([] {}).join();
      } catch (const std::system_error&) {
        refused = true;
      }
      good = refused && several_jobs(11, 40, true);
      pthread_setattr_default_np(&usual);
      const Rendezvous job(3);
      good = good && run_on_team(job, 3, Helpers::own);
    }
  });
  caller.join();
  expect(good, "the caller does all of it, and has helpers as soon as there are some");
#endif
}

void crowding() {
  using std::chrono::milliseconds;
  describe("crowding");
  const Crowding::Reading start = Crowding::read();
  const auto after = [&](int wall, int cpu, i64 preempted) {
    return Crowding::Reading{start.wall + milliseconds(wall), start.cpu + milliseconds(cpu), start.preempted + preempted};
  };
  Crowding quiet, busy;
  expect(!quiet.update(after(200, 150, 6)), "a thread that has its core to itself");
  expect(!quiet.update(after(400, 300, 12)), "as before");
  expect(!busy.update(after(60, 50, 40)), "too early to say");
  expect(busy.update(after(400, 150, 40)), "a thread that loses its core every few milliseconds");
  expect(busy.update(after(2300, 900, 40)), "it stays for a while");
  expect(busy.holds(after(2300, 0, 0).wall) && !busy.holds(after(2500, 0, 0).wall), "for two seconds");
  expect(!busy.update(after(2500, 1000, 300)), "and is looked at afresh: what was meanwhile does not count");
  expect(!busy.holds(after(2510, 0, 0).wall), "until then nothing is known");
  expect(!busy.update(after(2700, 1200, 304)), "the others have gone");
  expect(busy.update(after(3000, 1350, 340)), "and come back");
}

}  // namespace

void teams() {
  if (!take(true)) return;
  for (unsigned i = 0; i < 8; ++i) {
    describe("team: one job after the other, seed %u", case_seed() + i);
    expect(several_jobs(case_seed() + i, kThreadSanitizer ? 60 : 200, kThreadSanitizer), "every task once and in order");
  }
  everybody_comes(Helpers::own);
  if (!kThreadSanitizer) everybody_comes(Helpers::openmp);
#if defined(__x86_64__)
  settings_are_the_callers(Helpers::own);
  if (!kThreadSanitizer) settings_are_the_callers(Helpers::openmp);
#endif
  many_callers();
  forks();
  after_the_team();
  no_threads_left();
  crowding();
}

}  // namespace memory
