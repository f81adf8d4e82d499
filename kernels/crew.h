// Many small stages in one parallel region.
#pragma once

#include "vec.h"

#include <atomic>
#include <memory>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace clipfast {

// Linux wakes a thread that slept on the core of the one that wakes it, and may leave it there, behind that one, until the next
// tick of its clock: 4 ms, half a text. The one gives way once, and the other moves to another core that it is allowed.
inline int core() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

inline void leave([[maybe_unused]] int taken) {
#ifdef __linux__
  cpu_set_t allowed, others;
  if (taken < 0 || sched_getcpu() != taken || sched_getaffinity(0, sizeof allowed, &allowed)) return;
  others = allowed;
  CPU_CLR(taken, &others);
  if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others)) sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

// One stage's tasks, which go to whichever thread is free.
struct alignas(64) Stage {
  std::atomic<int64_t> taken{0}, done{0};
};

// A thread on its way through the stages: it takes tasks of each until none is left, and waits until those of others are done.
// A region of OpenMP's for each stage costs 2 µs, and waits for every thread; here a thread that was displaced while it had no
// task is not missed. Threads that torch does not start, or starts one after the other, are not missed either.
class Member {
 public:
  explicit Member(Stage* first) : stage_(first) {}

  template <class F>
  void each(int64_t tasks, const F& task) {
    Stage& stage = *stage_++;
    for (int64_t t; (t = stage.taken.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      task(t);
      stage.done.fetch_add(1, std::memory_order_release);
    }
    for (int64_t turns = 0; stage.done.load(std::memory_order_acquire) < tasks; ++turns)
      turns < kTurns ? rest() : std::this_thread::yield();
  }

 private:
  static constexpr int64_t kTurns = 1000;  // some 20 µs: longer than a task, shorter than a displaced thread is away
  static void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    asm volatile("yield");
#endif
  }
  Stage* stage_;
};

// program(member) by each of at most `threads` threads, all of which walk through the same stages.
template <class Program>
void together(int64_t threads, int64_t stages, const Program& program) {
  const std::unique_ptr<Stage[]> all(new Stage[stages]);
  const auto first = std::this_thread::get_id();
  const int taken = core();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    std::this_thread::get_id() == first ? std::this_thread::yield() : leave(taken);
    program(Member(all.get()));
  });
}

}  // namespace clipfast
