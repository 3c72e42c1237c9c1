// The decoder stack, from the embedding to the final norm.
//
// Per layer, each line one operation of the pool:
//
//     qkv      = norm(residual) Wqkv + b
//     q, k     = rope(norm(q, k));  k, v -> cache
//     attended = attention(q, cache)
//     residual += attended Wo + b
//     act      = silu(gate) * up of norm(residual) Wgu + b
//     residual += act Wdown + b
//
// The residual is float32 [T, E], whatever the model's dtype. After the attention of the last layer
// only the rows whose logits are wanted go on: R of T.
#include "forward.h"

#include <algorithm>
#include <utility>

#include "attention.h"
#include "gemm.h"
#include "rows.h"

namespace xllm {

namespace {

template <class T>
struct Buffers {
  Buffers(Pool& pool, const XllmModel& model, const XllmStep& step, int64_t partial_floats)
      : qkv_stride((model.num_heads + 2 * model.num_kv_heads) * model.head_dim),
        attended_stride(model.num_heads * model.head_dim) {
    const int64_t t = step.batch.num_tokens, r = step.num_logits;
    int64_t bytes = 0;
    auto reserve = [&](int64_t size) { return std::exchange(bytes, bytes + round_up(size, 64)); };
    const int64_t at[] = {
        reserve(t * model.hidden_size * 4),
        reserve(r * model.hidden_size * 4),
        reserve(t * qkv_stride * static_cast<int64_t>(sizeof(T))),
        reserve(t * attended_stride * static_cast<int64_t>(sizeof(T))),
        reserve(t * model.intermediate_size * static_cast<int64_t>(sizeof(T))),
        reserve(partial_floats * 4),
    };
    char* base = static_cast<char*>(pool.workspace(bytes));
    residual = reinterpret_cast<float*>(base + at[0]);
    last_residual = reinterpret_cast<float*>(base + at[1]);
    qkv = reinterpret_cast<T*>(base + at[2]);
    attended = reinterpret_cast<T*>(base + at[3]);
    act = reinterpret_cast<T*>(base + at[4]);
    partial = reinterpret_cast<float*>(base + at[5]);
  }

  const int64_t qkv_stride, attended_stride;
  float* residual;       // [T, E]
  float* last_residual;  // [R, E]
  T* qkv;                // [T, (H + 2 G) D]
  T* attended;           // [T, H D]
  T* act;                // [T, I]
  float* partial;
};

template <class T>
void embed(Pool& pool, const XllmModel& model, const XllmStep& step, float* residual) {
  const int64_t e = model.hidden_size;
  pool.for_each(step.batch.num_tokens, [&](int64_t row) {
    float* out = residual + row * e;
    if (model.embedding == nullptr) {
      unpack_row<T>(model.lm_head, step.input_ids[row], out);
      return;
    }
    const T* in = static_cast<const T*>(model.embedding) + step.input_ids[row] * e;
    for (int64_t i = 0; i < e; ++i) out[i] = to_float(in[i]);
  });
}

template <class T>
void run_layers(Pool& pool, const XllmModel& model, const XllmStep& step,
                const AttentionPlan& plan, const Buffers<T>& buffers) {
  const int64_t e = model.hidden_size, wide = model.intermediate_size;
  embed<T>(pool, model, step, buffers.residual);

  float* residual = buffers.residual;
  int64_t rows = step.batch.num_tokens;
  for (int32_t l = 0; l < model.num_layers; ++l) {
    const XllmLayer& layer = model.layers[l];
    const XllmAttention shape{model.num_heads, model.num_kv_heads, model.head_dim, model.scale,
                              model.eps,       layer.q_norm,       layer.k_norm,   model.cos_sin,
                              model.dtype};
    XllmKvLayer kv = step.kv;
    kv.data = static_cast<T*>(kv.data) + l * step.layer_stride;

    auto normed = [&](const float* weight) {
      return RowSource<T>{nullptr, residual, weight, model.eps, e, nullptr};
    };
    linear<T>(pool, layer.qkv, rows, normed(layer.input_norm),
              {Output::kStore, buffers.qkv, buffers.qkv_stride});
    rope_and_write<T>(pool, shape, step.batch, buffers.qkv, buffers.qkv_stride, kv);
    const bool is_last = l == model.num_layers - 1;
    if (is_last && step.num_logits == 0) return;  // K and V were all that was wanted
    attention<T>(pool, plan, shape, step.batch, buffers.qkv, buffers.qkv_stride, kv,
                 buffers.attended, buffers.attended_stride, buffers.partial);

    RowSource<T> attended{buffers.attended, nullptr, nullptr, 0, buffers.attended_stride, nullptr};
    if (is_last) {
      rows = step.num_logits;
      attended.index = step.logits_indices;
      residual = buffers.last_residual;
      pool.for_each(rows, [&](int64_t r) {
        std::copy_n(buffers.residual + step.logits_indices[r] * e, e, residual + r * e);
      });
    }
    linear<T>(pool, layer.o, rows, attended, {Output::kAdd, residual, e});
    linear<T>(pool, layer.gate_up, rows, normed(layer.post_norm),
              {Output::kStore, buffers.act, wide});
    linear<T>(pool, layer.down, rows,
              RowSource<T>{buffers.act, nullptr, nullptr, 0, wide, nullptr},
              {Output::kAdd, residual, e});
  }
  pool.for_each(step.num_logits, [&](int64_t r) {
    rms_norm_row(residual + r * e, model.final_norm, model.eps, e,
                 static_cast<T*>(step.hidden) + r * e);
  });
}

}  // namespace

template <class T>
void forward(Pool& pool, const XllmModel& model, const XllmStep& step) {
  XllmAttention shape{};
  shape.num_heads = model.num_heads;
  shape.num_kv_heads = model.num_kv_heads;
  shape.head_dim = model.head_dim;
  const AttentionPlan plan(step.batch, shape, pool.size());
  const Buffers<T> buffers(pool, model, step, plan.partial_floats);
  pool.run([&] { run_layers<T>(pool, model, step, plan, buffers); });
}

template void forward<float>(Pool&, const XllmModel&, const XllmStep&);
template void forward<bf16>(Pool&, const XllmModel&, const XllmStep&);

}  // namespace xllm
