// A copy that leaves the caches alone.
//
// A block that comes back from host memory is written once and read much later. Ordinary stores
// would first read the lines that they overwrite, and push the source out of the cache just when
// its checksum is to be computed from there.
#include "api.h"
#include "simd.h"

using namespace xllm;

extern "C" void xllm_copy_past_cache(void* target, const void* source, int64_t bytes) {
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  int64_t done = 0;
#if defined(__AVX2__)
  constexpr int64_t kVector = 32, kStride = 4 * kVector, kAhead = 1024;
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kVector - 1);
  if (bytes >= head + kStride) {
    std::memcpy(to, from, head);
    for (done = head; done + kStride <= bytes; done += kStride) {
      __builtin_prefetch(from + done + kAhead);
      __builtin_prefetch(from + done + kAhead + 64);
      __m256i part[4];
      for (int i = 0; i < 4; ++i)
        part[i] = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(from + done + i * kVector));
      for (int i = 0; i < 4; ++i)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + done + i * kVector), part[i]);
    }
    _mm_sfence();  // whoever is told that the copy has ended sees it
  }
#endif
  std::memcpy(to + done, from + done, bytes - done);
}
