#include "pool.h"

#include <new>

#include "memory.h"

namespace xllm {

namespace {

constexpr int kSpins = 4000;  // about 50 us

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A quarter more than asked for, so that slowly growing requests seldom reallocate.
void grow(char** data, size_t* size, size_t bytes) {
  if (*size >= bytes) return;
  free_pages(*data, *size);
  *data = nullptr;
  *size = bytes + bytes / 4;
  *data = static_cast<char*>(allocate_pages(*size));
  if (*data == nullptr) throw std::bad_alloc();
}

}  // namespace

Pool::Pool(int num_threads) : num_threads_(num_threads), slots_(num_threads) {
  for (int rank = 1; rank < num_threads_; ++rank) threads_.emplace_back(&Pool::work, this, rank);
}

Pool::~Pool() {
  stopping_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  for (Slot& slot : slots_) free_pages(slot.scratch, slot.scratch_bytes);
  free_pages(workspace_, workspace_bytes_);
}

void Pool::run(Job job, void* context) {
  std::lock_guard<std::mutex> lock(one_job_);
  job_ = job;
  context_ = context;
  if (num_threads_ > 1) {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }
  Team team(*this, 0);
  job(team, context);
  barrier();
}

void Pool::work(int rank) {
  uint32_t seen = 0;
  for (;;) {
    epoch_.wait(seen, std::memory_order_acquire);
    ++seen;  // run() starts no job before the barrier below, so none can be missed
    if (stopping_.load()) return;
    Team team(*this, rank);
    job_(team, context_);
    barrier();
  }
}

void Pool::barrier() {
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    for (Slot& slot : slots_) slot.next.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    if (num_threads_ > 1) generation_.notify_all();
    return;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (generation_.load(std::memory_order_acquire) != generation) return;
    pause();
  }
  generation_.wait(generation, std::memory_order_acquire);
}

void* Pool::workspace(size_t bytes) {
  grow(&workspace_, &workspace_bytes_, bytes);
  return workspace_;
}

void* Team::scratch(size_t bytes) {
  Pool::Slot& slot = pool_.slots_[rank_];
  grow(&slot.scratch, &slot.scratch_bytes, bytes);
  return slot.scratch;
}

}  // namespace xllm
