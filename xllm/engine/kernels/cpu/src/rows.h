// Operations on single rows, shared by the fused kernels.
#pragma once

#include <cmath>

#include "simd.h"

namespace xllm {

// out = x / sqrt(mean(x^2) + eps) * weight, over `size` elements.
template <class In, class Out>
inline void rms_norm_row(const In* x, const float* weight, float eps, int64_t size, Out* out) {
  vf sum = {};
  int64_t i = 0;
  for (; i + VL <= size; i += VL) {
    const vf v = load(x + i);
    sum += v * v;
  }
  float total = reduce_add(sum);
  for (; i < size; ++i) total += to_float(x[i]) * to_float(x[i]);
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
  for (i = 0; i + VL <= size; i += VL) store(out + i, load(x + i) * factor * load(weight + i));
  for (; i < size; ++i) from_float(to_float(x[i]) * factor * weight[i], out + i);
}

// Rotates the two halves of x [size] against each other, in place.
template <class T>
inline void rope_row(T* x, const float* cos_sin, int64_t size) {
  const int64_t half = size / 2;
  const float* cos = cos_sin;
  const float* sin = cos_sin + half;
  int64_t i = 0;
  for (; i + VL <= half; i += VL) {
    const vf a = load(x + i), b = load(x + half + i);
    const vf c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[half + i]);
    from_float(a * cos[i] - b * sin[i], x + i);
    from_float(b * cos[i] + a * sin[i], x + half + i);
  }
}

}  // namespace xllm
