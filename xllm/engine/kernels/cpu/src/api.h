// The C ABI of the CPU kernels: what native.py mirrors with ctypes.
//
// Letters: T rows, B sequences, H query heads, G KV heads, D head size, E hidden size, I width of
// the MLP, V vocabulary, K inputs and N outputs of a linear layer, S tokens per block. Elements are
// of the model's dtype unless said otherwise; strides count elements.
//
// Nothing is owned here but the pool and its scratch memory: the caller keeps every pointer valid
// while the call runs. A pool runs one call at a time. Running out of memory ends the process.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define XLLM_API __attribute__((visibility("default")))

enum XllmDtype { XLLM_F32 = 0, XLLM_BF16 = 1 };

typedef struct XllmPool XllmPool;

// A linear layer, y = x W^T + b, packed by xllm_pack.
typedef struct {
  const void* packed;  // xllm_packed_bytes(n, k, gated, dtype), aligned to 64
  const float* bias;   // [n] or null
  int64_t n, k;
  int32_t dtype;
  int32_t gated;  // W is [gate; up], packed so that silu(gate) * up comes out, n/2 wide
} XllmLinear;

// One layer of the KV cache: [N, 2, S, G, D] by strides, D contiguous.
typedef struct {
  void* data;
  int64_t block_stride, kv_stride, token_stride, head_stride;
  int64_t block_size;
} XllmKvLayer;

// What the attention of a step reads; see engine/batch.py.
typedef struct {
  int64_t num_tokens, num_seqs;
  const int64_t* positions;         // [T]
  const int64_t* slot_mapping;      // [T], -1: not written
  const int32_t* query_start_loc;   // [B+1]
  const int32_t* context_lens;      // [B]
  const int32_t* block_tables;      // [B, block_table_stride]
  int64_t block_table_stride;
} XllmBatch;

typedef struct {
  int64_t num_heads, num_kv_heads, head_dim;
  float scale;
  float eps;             // of the QK norm
  const float* q_norm;   // [D] or null
  const float* k_norm;   // [D] or null
  const float* cos_sin;  // [max_position, D]: cos in the first half, sin in the second
  int32_t dtype;
} XllmAttention;

typedef struct {
  XllmLinear qkv, o, gate_up, down;
  const float* input_norm;      // [E]
  const float* post_norm;       // [E]
  const float* q_norm;          // [D] or null
  const float* k_norm;          // [D] or null
} XllmLayer;

typedef struct {
  int32_t dtype;
  int32_t num_layers;
  int64_t hidden_size, intermediate_size, vocab_size;
  int64_t num_heads, num_kv_heads, head_dim;
  float eps, scale;
  const void* embedding;  // [V, E], or null: the LM head's packed weights are read instead
  const float* cos_sin;
  const float* final_norm;  // [E]
  XllmLinear lm_head;  // bias is null
  const XllmLayer* layers;
} XllmModel;

typedef struct {
  XllmBatch batch;
  const int64_t* input_ids;       // [T]
  XllmKvLayer kv;                 // of layer 0
  int64_t layer_stride;           // elements from one layer's KV to the next one's
  const int64_t* logits_indices;  // [R]
  int64_t num_logits;
  void* hidden;  // [R, E]: after the final norm
} XllmStep;

XLLM_API int32_t xllm_abi_version(void);
XLLM_API const char* xllm_isa(void);

XLLM_API XllmPool* xllm_pool_create(int32_t num_threads);
XLLM_API void xllm_pool_destroy(XllmPool* pool);

// Zeroed memory, in huge pages where the system has them; null when there is none.
XLLM_API void* xllm_alloc(int64_t bytes);
XLLM_API void xllm_free(void* data, int64_t bytes);

XLLM_API int64_t xllm_packed_bytes(int64_t n, int64_t k, int32_t gated, int32_t dtype);
// weight: [n, k] with rows `stride` apart.
XLLM_API void xllm_pack(XllmPool* pool, void* packed, const void* weight, int64_t stride,
                        int64_t n, int64_t k, int32_t gated, int32_t dtype);

// One pass: embeddings, all layers, final norm on the rows asked for.
XLLM_API void xllm_forward(XllmPool* pool, const XllmModel* model, const XllmStep* step);
// logits [R, V] float32 of hidden [R, E].
XLLM_API void xllm_logits(XllmPool* pool, const XllmModel* model, const void* hidden, int64_t rows,
                          float* logits);

// Single operations, for tests and measurements.

// out: [T, n], or [T, n/2] when gated.
XLLM_API void xllm_linear(XllmPool* pool, const XllmLinear* linear, const void* x,
                             int64_t x_stride, int64_t rows, void* out, int64_t out_stride);
// residual, float32 [T, E], += x W^T + b.
XLLM_API void xllm_linear_add(XllmPool* pool, const XllmLinear* linear, const void* x,
                                 int64_t x_stride, int64_t rows, float* residual,
                                 int64_t residual_stride);
// out = rms_norm(residual) W^T + b, the norm over float32 rows of k.
XLLM_API void xllm_norm_linear(XllmPool* pool, const XllmLinear* linear, const float* residual,
                                  int64_t residual_stride, const float* norm, float eps,
                                  int64_t rows, void* out, int64_t out_stride);
// qkv: [T, (H + 2 G) D]; norms and rotates q and k in place, writes k and v to the cache.
XLLM_API void xllm_rope_and_write(XllmPool* pool, const XllmAttention* attention,
                                     const XllmBatch* batch, void* qkv, int64_t qkv_stride,
                                     const XllmKvLayer* kv);
// q: [T, H D] with rows `q_stride` apart -> out [T, H D].
XLLM_API void xllm_attention(XllmPool* pool, const XllmAttention* attention,
                                const XllmBatch* batch, const void* q, int64_t q_stride,
                                const XllmKvLayer* kv, void* out, int64_t out_stride);
// Copies without leaving the target in the caches; on the caller's thread. The areas are apart.
XLLM_API void xllm_copy_past_cache(void* target, const void* source, int64_t bytes);
// The sum of `data`, read by all threads: measures the memory's bandwidth.
XLLM_API float xllm_read(XllmPool* pool, const float* data, int64_t count);

#ifdef __cplusplus
}
#endif
