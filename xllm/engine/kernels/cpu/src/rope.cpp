#include <algorithm>

#include "attention.h"
#include "rows.h"

namespace xllm {

template <class T>
void rope_and_write(Pool& pool, const XllmAttention& shape, const XllmBatch& batch, T* qkv,
                    int64_t qkv_stride, const XllmKvLayer& kv) {
  const int64_t d = shape.head_dim;
  const int64_t heads = shape.num_heads, kv_heads = shape.num_kv_heads;
  constexpr int64_t kTokens = 8;  // an item of work
  pool.for_each((batch.num_tokens + kTokens - 1) / kTokens, [&](int64_t item) {
    const int64_t end = std::min(batch.num_tokens, (item + 1) * kTokens);
    for (int64_t token = item * kTokens; token < end; ++token) {
      T* row = qkv + token * qkv_stride;
      const float* cos_sin = shape.cos_sin + batch.positions[token] * d;
      for (int64_t h = 0; h < heads + kv_heads; ++h) {
        const float* norm = h < heads ? shape.q_norm : shape.k_norm;
        if (norm) rms_norm_row(row + h * d, norm, shape.eps, d, row + h * d);
        rope_row(row + h * d, cos_sin, d);
      }
      const int64_t slot = batch.slot_mapping[token];
      if (slot < 0) continue;
      T* key = static_cast<T*>(kv.data) + slot / kv.block_size * kv.block_stride +
               slot % kv.block_size * kv.token_stride;
      const T* from = row + heads * d;
      for (int64_t h = 0; h < kv_heads; ++h) {
        std::memcpy(key + h * kv.head_stride, from + h * d, d * sizeof(T));
        std::memcpy(key + h * kv.head_stride + kv.kv_stride, from + (kv_heads + h) * d,
                    d * sizeof(T));
      }
    }
  });
}

template void rope_and_write<float>(Pool&, const XllmAttention&, const XllmBatch&, float*, int64_t,
                                    const XllmKvLayer&);
template void rope_and_write<bf16>(Pool&, const XllmAttention&, const XllmBatch&, bf16*, int64_t,
                                   const XllmKvLayer&);

}  // namespace xllm
