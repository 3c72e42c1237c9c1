// Large buffers in huge pages: a decode step reads every weight once, and with small pages the
// address translation costs as much as the memory.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

#include <sys/mman.h>

namespace xllm {

constexpr size_t kHugePage = size_t{2} << 20;

// Zeroed, aligned to at least a page; to 2 MiB from that size on. Null when there is no memory.
inline void* allocate_pages(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  void* data = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);  // with its red zones
  if (data != nullptr) std::memset(data, 0, bytes);
  return data;
#else
  const size_t slack = bytes >= kHugePage ? kHugePage : 0;
  const size_t mapped = (bytes + slack + 4095) / 4096 * 4096;
  void* raw = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  if (slack == 0) return raw;
  char* begin = static_cast<char*>(raw);
  char* data = begin + (kHugePage - reinterpret_cast<size_t>(begin) % kHugePage) % kHugePage;
  const size_t used = (bytes + 4095) / 4096 * 4096;
  if (data > begin) munmap(begin, data - begin);
  if (data + used < begin + mapped) munmap(data + used, begin + mapped - data - used);
#if defined(MADV_HUGEPAGE)
  madvise(data, used, MADV_HUGEPAGE);
#endif
  return data;
#endif
}

inline void free_pages(void* data, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  std::free(data);
#else
  if (data != nullptr) munmap(data, (bytes + 4095) / 4096 * 4096);
#endif
}

}  // namespace xllm
