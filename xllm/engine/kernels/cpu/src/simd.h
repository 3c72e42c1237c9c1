// Vectors of floats at the width of the instruction set that this file is compiled for.
//
// Arithmetic is GCC's vector extension, which every target knows; intrinsics appear only where
// the extension has no word for the instruction. VL floats make a vector `vf`.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace xllm {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

// Columns of one panel of packed weights: what one micro-kernel call computes per row.
constexpr int NR = 2 * VL;

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef float vf_unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(VL * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline vu load(const uint32_t* p) { return *reinterpret_cast<const vu_unaligned*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
inline void store(uint32_t* p, vu v) { *reinterpret_cast<vu_unaligned*>(p) = v; }
inline vf splat(float x) { return vf{} + x; }

inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline float reduce_add(vf v) {
  float lanes[VL];
  store(lanes, v);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline float reduce_max(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float best = v[0];
  for (int i = 1; i < VL; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

// bf16 <-> float32: widening is exact, narrowing rounds to nearest even.

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline vu load_u16(const uint16_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vu>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu);
#endif
}

inline vf load(const bf16* p) {
  return reinterpret_cast<vf>(load_u16(reinterpret_cast<const uint16_t*>(p)) << 16);
}

inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
  vu bits = reinterpret_cast<vu>(v);
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v != v ? vu{} + 0x7fc0 : rounded;
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(rounded, vh);
#endif
}

// 2^t for t <= 127, relative error 1e-7 (1e-4 when `Coarse`: below bf16's own). 2^0 is exactly 1,
// and what lies under 2^-126 is about 0. Polynomials: least maximum error on [-1/2, 1/2].
template <bool Coarse = false>
inline vf exp2(vf t) {
  t = max(t, splat(-126.0f));
#if defined(__AVX512F__)
  vf n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = t + magic;
  vf n = shifted - magic;
#endif
  vf f = t - n;
  vf p;
  if constexpr (Coarse) {
    p = splat(0.05500892922282219f);
    p = p * f + 0.24221095442771912f;
    p = p * f + 0.6932829022407532f;
  } else {
    p = splat(0.001326472731307149f);
    p = p * f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
  }
  p = p * f + 1.0f;  // so that 2^0 is exactly 1
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  vi exponent = reinterpret_cast<vi>(shifted) - reinterpret_cast<vi>(magic);
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (exponent << 23));
#endif
}

constexpr float kLog2e = 1.4426950408889634f;

inline vf silu(vf x) { return x / (1.0f + exp2(min(x * -kLog2e, splat(126.0f)))); }

}  // namespace xllm
