// Threads that help with one forward pass at a time and sleep otherwise.
//
// DESIGN
//
// The calling thread walks through the operations; `parallel` opens each one to the helpers. It
// never waits for a helper that has not started: waking a thread takes up to 200 us, and another
// process may have its core. Who is late finds nothing left to do and waits for the next operation.
// So an operation ends when its items are done and the helpers inside have left.
//
// Items are dealt out in contiguous ranges, one per thread, because neighbouring items lie next to
// each other in memory; whoever is done, or alone, takes items from the others' ranges. A thread's
// own counter is in its own cache line, so dealing costs nothing until there is something to steal.
//
// `gate_` is the one word of synchronisation: bit 31 says that the operation is open, the rest
// counts the helpers inside. A helper that counts itself in while the gate is closed leaves again
// without reading anything, so the operation's description may change while the gate is closed and
// nobody is inside.
//
// Helpers spin for the next operation for some ten microseconds, long enough within a forward pass;
// then they sleep on a futex.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace xllm {

class Pool;

// One thread's part in an operation.
class Worker {
 public:
  Worker(Pool& pool, int rank) : pool_(pool), rank_(rank) {}

  // f(i) for items i, each given to one thread. Once per operation.
  template <class F>
  void each(F&& f);

  // Memory of this thread, aligned to a page, of undefined content, valid until the next call.
  void* scratch(size_t bytes);

 private:
  Pool& pool_;
  const int rank_;
};

class Pool {
 public:
  // `num_threads` counts the caller of run().
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Runs `program` here; what it does inside `parallel` is shared. One at a time: others wait.
  template <class F>
  void run(F&& program) {
    const std::lock_guard<std::mutex> lock(one_program_);
    program();
  }

  enum class Order {
    kRanges,    // items of equal size, neighbours to one thread
    kSequence,  // items of unequal size, the largest first
  };

  // body(worker) on this thread and on every helper in time; it calls worker.each() for its items
  // of [0, n). Only inside run().
  template <class F>
  void parallel(int64_t n, F&& body, Order order = Order::kRanges) {
    using Body = std::remove_reference_t<F>;
    open([](void* context, Worker& worker) { (*static_cast<Body*>(context))(worker); },
         const_cast<void*>(static_cast<const void*>(&body)), n, order);
    Worker self(*this, 0);
    body(self);
    close();
  }

  // The same for items that need no preparation by thread.
  template <class F>
  void for_each(int64_t n, F&& f) {
    parallel(n, [&](Worker& worker) { worker.each(f); });
  }

  // Memory for the program, aligned to a page, kept until the next call.
  void* workspace(size_t bytes);

  int size() const { return num_threads_; }

 private:
  friend class Worker;
  using Body = void (*)(void* context, Worker& worker);
  static constexpr uint32_t kOpen = 1u << 31;

  struct alignas(64) Slot {
    std::atomic<int64_t> next{0};  // items taken from this thread's range
    char* scratch = nullptr;
    size_t scratch_bytes = 0;
  };

  void open(Body body, void* context, int64_t n, Order order);
  void close();
  void help(int rank);

  const int num_threads_;
  std::vector<Slot> slots_;
  alignas(64) std::atomic<uint32_t> gate_{0};
  alignas(64) std::atomic<uint32_t> opened_{0};  // operations so far
  std::atomic<bool> stopping_{false};

  // The operation.
  Body body_ = nullptr;
  void* context_ = nullptr;
  int64_t items_ = 0;
  int ranges_ = 1;

  std::mutex one_program_;
  char* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
  std::vector<std::thread> threads_;
};

template <class F>
void Worker::each(F&& f) {
  const int ranges = pool_.ranges_;
  const int64_t n = pool_.items_;
  for (int v = 0; v < ranges; ++v) {
    const int owner = (rank_ + v) % ranges;
    const int64_t begin = n * owner / ranges, end = n * (owner + 1) / ranges;
    std::atomic<int64_t>& next = pool_.slots_[owner].next;
    for (int64_t i; (i = begin + next.fetch_add(1, std::memory_order_relaxed)) < end;) f(i);
  }
}

}  // namespace xllm
