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
  for (int rank = 1; rank < num_threads_; ++rank) threads_.emplace_back(&Pool::help, this, rank);
}

Pool::~Pool() {
  stopping_.store(true, std::memory_order_relaxed);
  opened_.fetch_add(1, std::memory_order_release);
  opened_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  for (Slot& slot : slots_) free_pages(slot.scratch, slot.scratch_bytes);
  free_pages(workspace_, workspace_bytes_);
}

void Pool::open(Body body, void* context, int64_t n, Order order) {
  body_ = body;
  context_ = context;
  items_ = n;
  ranges_ = order == Order::kRanges ? num_threads_ : 1;
  for (Slot& slot : slots_) slot.next.store(0, std::memory_order_relaxed);
  if (num_threads_ == 1 || n == 1) return;
  gate_.fetch_or(kOpen, std::memory_order_release);
  opened_.fetch_add(1, std::memory_order_release);
  opened_.notify_all();
}

void Pool::close() {
  gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int i = 0; gate_.load(std::memory_order_acquire) != 0; ++i) {
    if (i < kSpins)
      pause();
    else
      std::this_thread::yield();  // a helper inside has lost its core
  }
}

void Pool::help(int rank) {
  Worker self(*this, rank);
  uint32_t seen = 0;
  for (;;) {
    uint32_t now;
    for (int i = 0; (now = opened_.load(std::memory_order_acquire)) == seen; ++i) {
      if (i < kSpins)
        pause();
      else
        opened_.wait(seen, std::memory_order_acquire);
    }
    seen = now;
    if (stopping_.load(std::memory_order_relaxed)) return;
    if (gate_.fetch_add(1, std::memory_order_acq_rel) & kOpen) body_(context_, self);
    gate_.fetch_sub(1, std::memory_order_release);
  }
}

void* Pool::workspace(size_t bytes) {
  grow(&workspace_, &workspace_bytes_, bytes);
  return workspace_;
}

void* Worker::scratch(size_t bytes) {
  Pool::Slot& slot = pool_.slots_[rank_];
  grow(&slot.scratch, &slot.scratch_bytes, bytes);
  return slot.scratch;
}

}  // namespace xllm
