// Threads that run one forward pass together and sleep otherwise.
//
// DESIGN
//
// A forward pass is one job: every thread runs the same function from start to end, and the work of
// each operation is shared out by `Team::parallel_for`, which ends in a barrier. So the threads are
// woken once per step, not once per operation.
//
// Items are dealt out in contiguous ranges, one per thread, because neighbouring items lie next to
// each other in memory; whoever is done takes items from the others' ranges. A thread's own counter
// is in its own cache line, so dealing costs nothing until there is something to steal.
//
// At a barrier a thread spins for some microseconds and then sleeps on a futex: an unequal split or
// a core taken away by another process must not burn the core. Between jobs threads sleep at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace xllm {

class Team;
using Job = void (*)(Team&, void*);

class Pool {
 public:
  // Grows to `bytes`, aligned to 64, kept until the next call: for the caller of run().
  void* workspace(size_t bytes);

  // `num_threads` counts the caller of run().
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Runs job(team, context) on every thread and returns when all are done. One job at a time:
  // further callers wait.
  void run(Job job, void* context);
  template <class F>
  void run(F&& f) {
    run([](Team& team, void* context) { (*static_cast<std::decay_t<F>*>(context))(team); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
  int size() const { return num_threads_; }

 private:
  friend class Team;
  struct alignas(64) Slot {
    std::atomic<int64_t> next{0};  // items taken from this thread's range
    char* scratch = nullptr;
    size_t scratch_bytes = 0;
  };

  void work(int rank);
  void barrier();

  const int num_threads_;
  std::vector<Slot> slots_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};  // barriers passed
  alignas(64) std::atomic<uint32_t> epoch_{0};       // jobs started
  std::atomic<bool> stopping_{false};
  Job job_ = nullptr;
  void* context_ = nullptr;
  std::mutex one_job_;
  std::vector<std::thread> threads_;
  char* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
};

// A thread's view of the pool while a job runs.
class Team {
 public:
  Team(Pool& pool, int rank) : pool_(pool), rank_(rank) {}

  int size() const { return pool_.num_threads_; }
  int rank() const { return rank_; }
  void barrier() { pool_.barrier(); }

  // f(i) once for each i in [0, n), then a barrier. Every thread must call it with the same n.
  template <class F>
  void parallel_for(int64_t n, F&& f) {
    const int threads = size();
    for (int v = 0; v < threads; ++v) {
      const int owner = (rank_ + v) % threads;
      drain(owner, n * owner / threads, n * (owner + 1) / threads, f);
    }
    barrier();
  }

  // The same, started in the order of i: for items of unequal size, the largest first.
  template <class F>
  void parallel_for_ordered(int64_t n, F&& f) {
    drain(0, 0, n, f);
    barrier();
  }

  // Memory of this thread, aligned to 64 bytes, undefined content, valid until the next call.
  void* scratch(size_t bytes);

 private:
  template <class F>
  void drain(int owner, int64_t begin, int64_t end, F& f) {
    std::atomic<int64_t>& next = pool_.slots_[owner].next;
    for (int64_t i; (i = begin + next.fetch_add(1, std::memory_order_relaxed)) < end;) f(i);
  }

  Pool& pool_;
  const int rank_;
};

}  // namespace xllm
