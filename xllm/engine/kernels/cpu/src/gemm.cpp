#include "gemm.h"

#include <algorithm>

#include "rows.h"

namespace xllm {

namespace {

constexpr int64_t kBlockSteps = 768;              // of K, before accumulators are put aside
constexpr int64_t kRowsPerBlock = 8 * MR_MAX;     // with K of a few thousand: half of L2
constexpr int64_t kPartBytes = 64 << 10;          // of weights, the unit of sharing out
constexpr int64_t kFetchAhead = 8 << 10;          // bytes

template <class S>
constexpr int kStride = kBlockSteps * S::kCells + 16;  // odd in cache lines: rows spread over sets

int64_t steps_of(int64_t k, int32_t dtype) { return dtype == XLLM_BF16 ? (k + 1) / 2 : k; }

int64_t num_panels(int64_t n, bool gated) {
  return gated ? (n / 2 + VL - 1) / VL : (n + NR - 1) / NR;
}

// The row of [N, K] that lane `lane` of a panel holds, or -1 in the padding.
int64_t output_of(int64_t panel, int lane, int64_t n, bool gated) {
  if (!gated) {
    const int64_t out = panel * NR + lane;
    return out < n ? out : -1;
  }
  const int64_t column = panel * VL + lane % VL;
  if (column >= n / 2) return -1;
  return lane < VL ? column : n / 2 + column;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Rows [begin, end) into scratch: block of K, row, cell.
template <class S, class T>
void fill(const RowSource<T>& source, int64_t begin, int64_t end, int64_t k, T* row,
          uint32_t* cells) {
  constexpr int64_t elements = kBlockSteps * S::kPerStep;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = (source.index ? source.index[r] : r) * source.stride;
    const T* x = source.rows + at;
    if (source.norm) {
      rms_norm_row(source.residual + at, source.norm, source.eps, k, row);
      x = row;
    }
    for (int64_t k0 = 0, block = 0; k0 < k; k0 += elements, ++block)
      put_cells<S>(x + k0, std::min(elements, k - k0),
                   cells + (block * (end - begin) + r - begin) * kStride<S>);
  }
}

template <class T>
void emit(T* out, vf value, int64_t width) {
  if (width >= VL) {
    store(out, value);
    return;
  }
  for (int64_t i = 0; i < width; ++i) from_float(value[i], out + i);
}

inline void add(float* out, vf value, int64_t width) {
  if (width >= VL) {
    store(out, load(out) + value);
    return;
  }
  for (int64_t i = 0; i < width; ++i) out[i] += value[i];
}

inline vf load_part(const float* p, int64_t width) {
  if (width >= VL) return load(p);
  vf v = {};
  for (int64_t i = 0; i < width; ++i) v[i] = p[i];
  return v;
}

// Finished sums c [rows, NR] of one panel into the output.
template <class T>
void finish(const XllmLinear& layer, const Epilogue& epilogue, int64_t panel, const float* c,
            int64_t row, int64_t rows) {
  if (layer.gated) {
    const int64_t column = panel * VL, width = layer.n / 2 - column;
    vf gate_bias = {}, up_bias = {};
    if (layer.bias) {
      gate_bias = load_part(layer.bias + column, width);
      up_bias = load_part(layer.bias + layer.n / 2 + column, width);
    }
    for (int64_t r = 0; r < rows; ++r, c += NR)
      emit(static_cast<T*>(epilogue.out) + (row + r) * epilogue.stride + column,
           silu(load(c) + gate_bias) * (load(c + VL) + up_bias), width);
    return;
  }
  for (int half = 0; half < 2; ++half) {
    const int64_t column = panel * NR + half * VL, width = layer.n - column;
    if (width <= 0) return;
    const vf bias = layer.bias ? load_part(layer.bias + column, width) : vf{};
    for (int64_t r = 0; r < rows; ++r) {
      const vf value = load(c + r * NR + half * VL) + bias;
      const int64_t at = (row + r) * epilogue.stride + column;
      switch (epilogue.kind) {
        case Output::kStore:
          emit(static_cast<T*>(epilogue.out) + at, value, width);
          break;
        case Output::kFloat:
          emit(static_cast<float*>(epilogue.out) + at, value, width);
          break;
        case Output::kAdd:
          add(static_cast<float*>(epilogue.out) + at, value, width);
          break;
      }
    }
  }
}

// How rows and panels are cut into items of work.
struct Split {
  int64_t blocks, parts;
};

Split split(int64_t rows, int64_t panels, int64_t panel_bytes, int threads) {
  int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  if (rows >= threads * kRowsPerBlock / 2) return {round_up(blocks, threads), 1};
  const int64_t by_size = (panels * panel_bytes + kPartBytes - 1) / kPartBytes;
  return {blocks, std::min(panels, std::max<int64_t>(by_size, 4 * threads))};
}

}  // namespace

int64_t packed_bytes(int64_t n, int64_t k, bool gated, int32_t dtype) {
  return num_panels(n, gated) * steps_of(k, dtype) * NR * 4;
}

template <class T>
void pack(Pool& pool, void* packed, const T* weight, int64_t stride, int64_t n, int64_t k,
          bool gated) {
  constexpr int per_step = SchemeOf<T>::type::kPerStep;
  const int64_t steps = (k + per_step - 1) / per_step;
  pool.for_each(num_panels(n, gated), [&](int64_t panel) {
    uint32_t* cells = static_cast<uint32_t*>(packed) + panel * steps * NR;
    for (int lane = 0; lane < NR; ++lane) {
      const int64_t row = output_of(panel, lane, n, gated);
      const T* x = weight + row * stride;
      for (int64_t s = 0; s < steps; ++s) {
        uint32_t cell = 0;
        if (row >= 0) {
          if constexpr (per_step == 1) {
            cell = bits_of(x[s]);
          } else {
            cell = x[2 * s].bits;
            if (2 * s + 1 < k) cell |= static_cast<uint32_t>(x[2 * s + 1].bits) << 16;
          }
        }
        cells[s * NR + lane] = cell;
      }
    }
  });
}

template <class T>
void linear(Pool& pool, const XllmLinear& layer, int64_t rows, const RowSource<T>& source,
            const Epilogue& epilogue) {
  if (rows == 0) return;
  using S = typename SchemeOf<T>::type;
  if (rows == 0) return;
  const int64_t steps = (layer.k + S::kPerStep - 1) / S::kPerStep;
  const int64_t k_blocks = (steps + kBlockSteps - 1) / kBlockSteps;
  const int64_t panels = num_panels(layer.n, layer.gated);
  const Split plan = split(rows, panels, steps * NR * 4, pool.size());
  const int64_t block_rows = (rows + plan.blocks - 1) / plan.blocks;

  // Scratch: accumulators of every group, one normed row, rows as cells.
  const int64_t c_bytes = num_groups(block_rows) * MR_MAX * NR * 4;
  const int64_t row_bytes = round_up(layer.k * sizeof(T), 64);
  const int64_t cells_bytes = k_blocks * block_rows * kStride<S> * 4;

  pool.parallel(plan.blocks * plan.parts, [&](Worker& worker) {
    char* memory = static_cast<char*>(worker.scratch(c_bytes + row_bytes + cells_bytes));
    float* c = reinterpret_cast<float*>(memory);
    T* row = reinterpret_cast<T*>(memory + c_bytes);
    uint32_t* cells = reinterpret_cast<uint32_t*>(memory + c_bytes + row_bytes);
    int64_t filled = -1;  // the block of rows that `cells` holds

    worker.each([&](int64_t item) {
      const int64_t block = item / plan.parts, part = item % plan.parts;
      const int64_t begin = rows * block / plan.blocks, end = rows * (block + 1) / plan.blocks;
      if (begin == end) return;
      if (block != filled) fill<S>(source, begin, end, layer.k, row, cells);
      filled = block;
      const int64_t count = end - begin, groups = num_groups(count);
      for (int64_t panel = panels * part / plan.parts; panel < panels * (part + 1) / plan.parts;
           ++panel) {
        const uint32_t* w = static_cast<const uint32_t*>(layer.packed) + panel * steps * NR;
        for (int64_t kb = 0; kb < k_blocks; ++kb) {
          const int64_t s0 = kb * kBlockSteps, n_steps = std::min(kBlockSteps, steps - s0);
          // A single group fetches a little ahead of itself; several share the next piece of w.
          const char* here = reinterpret_cast<const char*>(w + s0 * NR);
          const int64_t piece = n_steps * NR * 4;
          const int64_t fetch_stride = NR * 4 / groups;
          const char* fetch = groups == 1 ? here + kFetchAhead : here + piece;
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t r0 = group_begin(count, groups, g);
            const int64_t group_rows = group_begin(count, groups, g + 1) - r0;
            float* sums = c + (k_blocks > 1 ? g : 0) * MR_MAX * NR;
            MicroTable<S, kStride<S>>::table[group_rows - 1](
                cells + (kb * count + r0) * kStride<S>, w + s0 * NR, n_steps, sums, kb > 0,
                fetch + g * n_steps * fetch_stride, fetch_stride);
            if (kb == k_blocks - 1) finish<T>(layer, epilogue, panel, sums, begin + r0, group_rows);
          }
        }
      }
    });
  });
}

template <class T>
void unpack_row(const XllmLinear& layer, int64_t n, float* out) {
  constexpr int per_step = SchemeOf<T>::type::kPerStep;
  const int64_t steps = (layer.k + per_step - 1) / per_step;
  const uint32_t* cells =
      static_cast<const uint32_t*>(layer.packed) + n / NR * steps * NR + n % NR;
  for (int64_t i = 0; i < layer.k; ++i) {
    uint32_t bits = cells[i / per_step * NR];
    if (per_step == 2) bits = i % 2 ? bits & 0xffff0000u : bits << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

#define XLLM_INSTANTIATE(T)                                                                      \
  template void pack<T>(Pool&, void*, const T*, int64_t, int64_t, int64_t, bool);                \
  template void linear<T>(Pool&, const XllmLinear&, int64_t, const RowSource<T>&,                \
                          const Epilogue&);                                                      \
  template void unpack_row<T>(const XllmLinear&, int64_t, float*);
XLLM_INSTANTIATE(float)
XLLM_INSTANTIATE(bf16)

}  // namespace xllm
