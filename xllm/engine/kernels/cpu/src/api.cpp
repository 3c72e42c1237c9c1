#include "api.h"

#include "attention.h"
#include "forward.h"
#include "gemm.h"
#include "memory.h"
#include "pool.h"

struct XllmPool : xllm::Pool {
  using Pool::Pool;
};

using namespace xllm;

namespace {

// f with a null pointer to the element type, which is how a lambda takes a type.
template <class F>
void with_type(int32_t dtype, F&& f) {
  if (dtype == XLLM_BF16)
    f(static_cast<bf16*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

template <class T>
void run_linear(XllmPool* pool, const XllmLinear& layer, int64_t rows, const RowSource<T>& source,
                const Epilogue& epilogue) {
  pool->run([&] { linear<T>(*pool, layer, rows, source, epilogue); });
}

}  // namespace

int32_t xllm_abi_version() { return 1; }

const char* xllm_isa() {
#if defined(__AVX512BF16__)
  return "avx512bf16";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}

XllmPool* xllm_pool_create(int32_t num_threads) { return new XllmPool(num_threads); }
void xllm_pool_destroy(XllmPool* pool) { delete pool; }

void* xllm_alloc(int64_t bytes) { return allocate_pages(bytes); }
void xllm_free(void* data, int64_t bytes) { free_pages(data, bytes); }

int64_t xllm_packed_bytes(int64_t n, int64_t k, int32_t gated, int32_t dtype) {
  return packed_bytes(n, k, gated, dtype);
}

void xllm_pack(XllmPool* pool, void* packed, const void* weight, int64_t stride, int64_t n,
               int64_t k, int32_t gated, int32_t dtype) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pool->run([&] {
      pack<T>(*pool, packed, static_cast<const T*>(weight), stride, n, k, gated);
    });
  });
}

void xllm_forward(XllmPool* pool, const XllmModel* model, const XllmStep* step) {
  with_type(model->dtype, [&](auto* type) {
    forward<std::remove_pointer_t<decltype(type)>>(*pool, *model, *step);
  });
}

void xllm_logits(XllmPool* pool, const XllmModel* model, const void* hidden, int64_t rows,
                 float* logits) {
  with_type(model->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    RowSource<T> source;
    source.rows = static_cast<const T*>(hidden);
    source.stride = model->hidden_size;
    run_linear(pool, model->lm_head, rows, source, {Output::kFloat, logits, model->vocab_size});
  });
}

void xllm_linear(XllmPool* pool, const XllmLinear* layer, const void* x, int64_t x_stride,
                 int64_t rows, void* out, int64_t out_stride) {
  with_type(layer->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    RowSource<T> source;
    source.rows = static_cast<const T*>(x);
    source.stride = x_stride;
    run_linear(pool, *layer, rows, source, {Output::kStore, out, out_stride});
  });
}

void xllm_linear_add(XllmPool* pool, const XllmLinear* layer, const void* x, int64_t x_stride,
                     int64_t rows, float* residual, int64_t residual_stride) {
  with_type(layer->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    RowSource<T> source;
    source.rows = static_cast<const T*>(x);
    source.stride = x_stride;
    run_linear(pool, *layer, rows, source, {Output::kAdd, residual, residual_stride});
  });
}

void xllm_norm_linear(XllmPool* pool, const XllmLinear* layer, const float* residual,
                      int64_t residual_stride, const float* norm, float eps, int64_t rows,
                      void* out, int64_t out_stride) {
  with_type(layer->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const RowSource<T> source{nullptr, residual, norm, eps, residual_stride, nullptr};
    run_linear(pool, *layer, rows, source, {Output::kStore, out, out_stride});
  });
}

void xllm_rope_and_write(XllmPool* pool, const XllmAttention* shape, const XllmBatch* batch,
                         void* qkv, int64_t qkv_stride, const XllmKvLayer* kv) {
  with_type(shape->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pool->run([&] {
      rope_and_write<T>(*pool, *shape, *batch, static_cast<T*>(qkv), qkv_stride, *kv);
    });
  });
}

void xllm_attention(XllmPool* pool, const XllmAttention* shape, const XllmBatch* batch,
                    const void* q, int64_t q_stride, const XllmKvLayer* kv, void* out,
                    int64_t out_stride) {
  const AttentionPlan plan(*batch, *shape, pool->size());
  float* partial = static_cast<float*>(pool->workspace(plan.partial_floats * 4 + 64));
  with_type(shape->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pool->run([&] {
      attention<T>(*pool, plan, *shape, *batch, static_cast<const T*>(q), q_stride, *kv,
                   static_cast<T*>(out), out_stride, partial);
    });
  });
}

float xllm_read(XllmPool* pool, const float* data, int64_t count) {
  constexpr int64_t kPart = 1 << 18;
  std::atomic<float> total{0};
  pool->run([&] {
    pool->for_each(count / kPart, [&](int64_t part) {
      vf sums[4] = {};
      for (int64_t i = part * kPart; i < (part + 1) * kPart; i += 4 * VL)
        for (int j = 0; j < 4; ++j) sums[j] += load(data + i + j * VL);
      total.fetch_add(reduce_add(sums[0] + sums[1] + sums[2] + sums[3]));
    });
  });
  return total.load();
}
