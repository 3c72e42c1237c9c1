// The one inner loop: c[MR, NR] += a[MR, K] * w[K, NR], for linear layers and attention alike.
//
// DESIGN
//
// K is walked in steps. A step of w is NR cells of 4 bytes, contiguous, so a panel of packed
// weights is one sequential stream. What a cell is depends on the scheme:
//
//   BfDot    a cell of w or a is a pair of bf16 (k, k+1); vdpbf16ps multiplies and adds pairs
//   BfWiden  w as in BfDot, but a is float32, two cells per step: for CPUs without the instruction
//   F32      a cell is one float32
//
// Every element of c is one accumulator that takes the steps in order, whatever MR is and however
// K is cut into calls (c carries it over exactly). So a row's result does not depend on the rows
// that were computed beside it: the batch never changes a request's tokens.
//
// a is read through broadcasts with a compile-time row stride, so its rows lie in scratch memory at
// that stride (see gemm.h); no transposing pack of a is needed.
#pragma once

#include "simd.h"

namespace xllm {

#if defined(__AVX512BF16__)
constexpr int MR_MAX = 14;  // 28 accumulators, 2 vectors of w, 2 spare of 32 registers
#elif defined(__AVX512F__)
constexpr int MR_MAX = 12;
#else
constexpr int MR_MAX = 6;
#endif

#if defined(__AVX512BF16__)
struct BfDot {
  static constexpr int kPerStep = 2;
  static constexpr int kCells = 1;
  template <int MR, int STRIDE>
  static inline __attribute__((always_inline)) void step(vf (&acc)[MR][2], const uint32_t* a,
                                                         const uint32_t* w) {
    const __m512bh w0 = reinterpret_cast<__m512bh>(load(w));
    const __m512bh w1 = reinterpret_cast<__m512bh>(load(w + VL));
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(a[r * STRIDE]));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, x);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, x);
    }
  }
};
#endif

struct BfWiden {
  static constexpr int kPerStep = 2;
  static constexpr int kCells = 2;
  template <int MR, int STRIDE>
  static inline __attribute__((always_inline)) void step(vf (&acc)[MR][2], const uint32_t* a,
                                                         const uint32_t* w) {
    const float* x = reinterpret_cast<const float*>(a);
    const vu pair0 = load(w), pair1 = load(w + VL);
    const vf even0 = reinterpret_cast<vf>(pair0 << 16), even1 = reinterpret_cast<vf>(pair1 << 16);
    const vf odd0 = reinterpret_cast<vf>(pair0 & 0xffff0000u);
    const vf odd1 = reinterpret_cast<vf>(pair1 & 0xffff0000u);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      acc[r][0] += even0 * x[r * STRIDE];
      acc[r][1] += even1 * x[r * STRIDE];
      acc[r][0] += odd0 * x[r * STRIDE + 1];
      acc[r][1] += odd1 * x[r * STRIDE + 1];
    }
  }
};

struct F32 {
  static constexpr int kPerStep = 1;
  static constexpr int kCells = 1;
  template <int MR, int STRIDE>
  static inline __attribute__((always_inline)) void step(vf (&acc)[MR][2], const uint32_t* a,
                                                         const uint32_t* w) {
    const float* x = reinterpret_cast<const float*>(a);
    const vf w0 = reinterpret_cast<vf>(load(w)), w1 = reinterpret_cast<vf>(load(w + VL));
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      acc[r][0] += w0 * x[r * STRIDE];
      acc[r][1] += w1 * x[r * STRIDE];
    }
  }
};

// How linear layers multiply elements of type T, and what their rows of a are kept as.
template <class T>
struct SchemeOf;
template <>
struct SchemeOf<float> {
  using type = F32;
};
template <>
struct SchemeOf<bf16> {
#if defined(__AVX512BF16__)
  using type = BfDot;
#else
  using type = BfWiden;
#endif
};

// `count` elements as cells of scheme S, the missing half of a last pair as zero.
template <class S>
inline void put_cells(const float* x, int64_t count, uint32_t* cells) {
  static_assert(S::kPerStep == 1);
  std::memcpy(cells, x, count * 4);
}

template <class S>
inline void put_cells(const bf16* x, int64_t count, uint32_t* cells) {
  if constexpr (S::kPerStep == 2 && S::kCells == 1) {
    std::memcpy(cells, x, count * 2);
    if (count % 2) reinterpret_cast<uint16_t*>(cells)[count] = 0;
  } else {
    for (int64_t i = 0; i < count; ++i) cells[i] = static_cast<uint32_t>(x[i].bits) << 16;
    if (S::kPerStep == 2 && count % 2) cells[count] = 0;
  }
}

using Micro = void (*)(const uint32_t* a, const uint32_t* w, int64_t steps, float* c,
                       bool accumulate, const char* fetch, int64_t fetch_stride);

// From `fetch` on, `fetch_stride` bytes of each step are brought into the cache meanwhile.
template <class S, int MR, int STRIDE>
void micro(const uint32_t* a, const uint32_t* w, int64_t steps, float* c, bool accumulate,
           const char* fetch, int64_t fetch_stride) {
  vf acc[MR][2];
  if (accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      acc[r][0] = load(c + r * NR);
      acc[r][1] = load(c + r * NR + VL);
    }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = vf{};
  }
  for (int64_t s = 0; s < steps; ++s) {
    for (int line = 0; line < NR * 4; line += 64) __builtin_prefetch(fetch + line);
    S::template step<MR, STRIDE>(acc, a, w);
    a += S::kCells;
    w += NR;
    fetch += fetch_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    store(c + r * NR, acc[r][0]);
    store(c + r * NR + VL, acc[r][1]);
  }
}

// micro for 1 .. MR_MAX rows, chosen at run time.
template <class S, int STRIDE, int... M>
struct MicroTableImpl {
  static constexpr Micro table[] = {&micro<S, M, STRIDE>...};
};
#if defined(__AVX512BF16__)
template <class S, int STRIDE>
using MicroTable = MicroTableImpl<S, STRIDE, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#elif defined(__AVX512F__)
template <class S, int STRIDE>
using MicroTable = MicroTableImpl<S, STRIDE, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>;
#else
template <class S, int STRIDE>
using MicroTable = MicroTableImpl<S, STRIDE, 1, 2, 3, 4, 5, 6>;
#endif

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Rows in groups of nearly equal size, none above MR_MAX.
inline int64_t num_groups(int64_t rows) { return (rows + MR_MAX - 1) / MR_MAX; }
inline int64_t group_begin(int64_t rows, int64_t groups, int64_t g) { return rows * g / groups; }

}  // namespace xllm
