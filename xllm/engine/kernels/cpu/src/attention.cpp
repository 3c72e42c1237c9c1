#include "attention.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "dot.h"
#include "rows.h"
#include "transpose.h"

namespace xllm {

namespace {

constexpr int64_t kChunk = 256;                    // keys
constexpr int64_t kTileRows = 9 * MR_MAX;          // query tokens times heads of a KV head
constexpr int64_t kMaxPartialFloats = 16 << 20;    // 64 MiB
constexpr int kLanes = (MR_MAX + VL - 1) / VL * VL;  // MR_MAX rows in whole vectors
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// How elements of type T are multiplied here: bf16 without its instruction as float32.
template <class T>
struct TileScheme {
  using type = F32;
};
#if defined(__AVX512BF16__)
template <>
struct TileScheme<bf16> {
  using type = BfDot;
};
#endif

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// A thread's memory for one item of work.
template <class T>
struct Work {
  using S = typename TileScheme<T>::type;
  static constexpr int64_t kKeySteps = kChunk / S::kPerStep;
  // Row strides of q (K = D) and p (K = keys): one table of micro-kernels serves both.
  static constexpr int kStride = kChunk / S::kPerStep + 16;
  static_assert(kMaxHeadDim <= kChunk);
  static constexpr bool kWiden = S::kCells * sizeof(T) * S::kPerStep != 4;  // bf16 as float32

  Work(Team& team, int64_t head_dim)
      : d(head_dim),
        d_steps(head_dim / S::kPerStep),
        d_panels((head_dim + NR - 1) / NR) {
    const int64_t k_cells = kChunk * d_steps, v_cells = d_panels * kKeySteps * NR;
    const int64_t acc_cells = kTileRows * d_panels * NR;
    const int64_t cells = k_cells + v_cells + kTileRows * kStride + kChunk * MR_MAX +
                          MR_MAX * kStride + MR_MAX * d_panels * NR + acc_cells +
                          2 * round_up(kTileRows + kLanes, 16);
    uint32_t* next = static_cast<uint32_t*>(
        team.scratch(cells * 4 + 2 * kChunk * sizeof(T*) + 2 * VL * kMaxHeadDim * 4));
    auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    k = take(k_cells);
    v = take(v_cells);
    q = take(kTileRows * kStride);
    scores = reinterpret_cast<float*>(take(kChunk * MR_MAX));
    p = take(MR_MAX * kStride);
    sums = reinterpret_cast<float*>(take(MR_MAX * d_panels * NR));
    acc = reinterpret_cast<float*>(take(acc_cells));
    m = reinterpret_cast<float*>(take(round_up(kTileRows + kLanes, 16)));
    l = reinterpret_cast<float*>(take(round_up(kTileRows + kLanes, 16)));
    wide = take(2 * VL * kMaxHeadDim);
    key_rows = reinterpret_cast<const T**>(next);
    value_rows = key_rows + kChunk;
  }

  const int64_t d, d_steps, d_panels;
  uint32_t* k;         // [panel of NR keys][d step][NR]
  uint32_t* v;         // [panel of NR columns][key step][NR]
  uint32_t* q;         // [row][d step]
  float* scores;       // [panel of NR keys][MR_MAX][NR]
  uint32_t* p;         // [row of group][key step]
  float* sums;         // [panel of NR columns][MR_MAX][NR]
  float* acc;          // [row][d_panels * NR]
  float* m;            // [row] largest score so far, unscaled
  float* l;            // [row] sum of weights so far
  uint32_t* wide;      // rows widened to float32
  const T** key_rows;  // [kChunk]
  const T** value_rows;

  int64_t acc_stride() const { return d_panels * NR; }
};

// Where the `count` keys from position `begin` are.
template <class T>
void find_rows(Work<T>& work, const XllmBatch& batch, const XllmKvLayer& kv, int64_t seq,
               int64_t head, int64_t begin, int64_t count) {
  const int32_t* table = batch.block_tables + seq * batch.block_table_stride;
  const T* base = static_cast<const T*>(kv.data) + head * kv.head_stride;
  for (int64_t i = 0; i < count;) {
    const int64_t block = (begin + i) / kv.block_size, offset = (begin + i) % kv.block_size;
    const int64_t n = std::min(kv.block_size - offset, count - i);
    const T* row = base + table[block] * kv.block_stride + offset * kv.token_stride;
    for (int64_t j = 0; j < n; ++j, ++i, row += kv.token_stride) {
      work.key_rows[i] = row;
      work.value_rows[i] = row + kv.kv_stride;
    }
  }
}

template <class T>
inline void prefetch_row(const T* row, int64_t d) {
  for (int64_t i = 0; i < d; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

// Packs `count` keys and values. Beyond them, V is zero up to a whole step (p is zero there, but
// zero times garbage need not be), and K may be anything (its scores are masked).
template <class T>
void pack_chunk(Work<T>& work, int64_t count) {
  using S = typename Work<T>::S;
  const int64_t d = work.d;
  for (int64_t first = 0; first < count; first += VL) {
    uint32_t* out = work.k + first / NR * work.d_steps * NR + first % NR;
    const uint32_t* rows[VL];
    for (int64_t i = 0; i < VL; ++i) {
      const int64_t key = std::min(first + i, count - 1);
      prefetch_row(work.value_rows[key], d);
      prefetch_row(work.key_rows[std::min<int64_t>(key + 2 * VL, count - 1)], d);
      if constexpr (Work<T>::kWiden) {
        rows[i] = work.wide + i * kMaxHeadDim;
        put_cells<S>(work.key_rows[key], d, work.wide + i * kMaxHeadDim);
      } else {
        rows[i] = reinterpret_cast<const uint32_t*>(work.key_rows[key]);
      }
    }
    transpose_rows(rows, work.d_steps, out, NR);
  }

  const int64_t steps = (count + S::kPerStep - 1) / S::kPerStep;
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t column = 0; column < d; column += VL) {
      uint32_t* out =
          work.v + (column / NR * Work<T>::kKeySteps + s) * NR + column % NR;
      const int64_t width = std::min<int64_t>(VL, d - column);
      if constexpr (S::kPerStep == 2) {
        const uint16_t* even = reinterpret_cast<const uint16_t*>(work.value_rows[2 * s]) + column;
        const bool whole = 2 * s + 1 < count;
        const uint16_t* odd =
            whole ? reinterpret_cast<const uint16_t*>(work.value_rows[2 * s + 1]) + column
                  : nullptr;
        if (width == VL) {
          store(out, load_u16(even) | (whole ? load_u16(odd) << 16 : vu{}));
        } else {
          for (int64_t i = 0; i < width; ++i)
            out[i] = even[i] | (whole ? static_cast<uint32_t>(odd[i]) << 16 : 0);
        }
      } else {
        const T* row = work.value_rows[s] + column;
        float* values = reinterpret_cast<float*>(out);
        if (width == VL) {
          store(values, load(row));
        } else {
          for (int64_t i = 0; i < width; ++i) values[i] = to_float(row[i]);
        }
      }
    }
  }
}

// Softmax weights of one row of scores over its `visible` keys of the chunk, zero up to `keys`.
// Writes them to p and returns their sum; *largest is the largest score.
template <class T>
float weigh(Work<T>& work, int64_t row, int64_t visible, int64_t keys, float factor,
            float* largest) {
  using S = typename Work<T>::S;
  constexpr bool kPairs = S::kPerStep == 2;
  auto scores = [&](int64_t key) {
    return load(work.scores + (key / NR * MR_MAX + row) * NR + key % NR);
  };
  vi lane;
  for (int i = 0; i < VL; ++i) lane[i] = i;

  vf top = splat(kNothing);
  const int64_t whole = visible / VL * VL;
  for (int64_t key = 0; key < whole; key += VL) top = max(top, scores(key));
  if (whole < visible)
    top = max(top, lane < static_cast<int32_t>(visible - whole) ? scores(whole) : splat(kNothing));
  const float m = reduce_max(top);
  *largest = m;

  auto put = [&](int64_t key, vf weight) {
    uint32_t* out = work.p + row * Work<T>::kStride;
    if constexpr (kPairs)
      store(reinterpret_cast<bf16*>(out) + key, weight);
    else
      store(reinterpret_cast<float*>(out) + key, weight);
  };
  vf sum = {};
  int64_t key = 0;
  const vf offset = splat(m * factor);
  for (; key < whole; key += VL) {
    const vf weight = exp2<kPairs>(scores(key) * factor - offset);
    sum += weight;
    put(key, weight);
  }
  if (whole < visible) {
    vf weight = exp2<kPairs>(scores(whole) * factor - offset);
    weight = lane < static_cast<int32_t>(visible - whole) ? weight : vf{};
    sum += weight;
    put(key, weight);
    key += VL;
  }
  for (; key < keys; key += VL) put(key, vf{});
  return reduce_add(sum);
}

// Where the results of a group of rows go: running state, or one chunk's partial results.
struct State {
  float *m, *l, *acc;
  int64_t acc_stride;
};

// Merges a chunk's results (m, l, sums) of `rows` rows into `state`.
void merge(const State& state, int64_t rows, const float* m, const float* l, const float* sums,
           int64_t panel_stride, int64_t row_stride, int64_t panels, float factor) {
  alignas(64) float old_scale[kLanes], new_scale[kLanes];
  for (int64_t i = 0; i < rows; i += VL) {
    const vf before = load(state.m + i), chunk = load(m + i), now = max(before, chunk);
    const vf a = exp2((before - now) * factor), b = exp2((chunk - now) * factor);
    vf total = load(state.l + i) * a;
    total = total + load(l + i) * b;
    if (i + VL <= rows) {
      store(state.l + i, total);
      store(state.m + i, now);
    } else {
      for (int64_t j = 0; i + j < rows; ++j) {
        state.l[i + j] = total[j];
        state.m[i + j] = now[j];
      }
    }
    store(old_scale + i, a);
    store(new_scale + i, b);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int half = 0; half < 2; ++half) {
        float* acc = state.acc + r * state.acc_stride + panel * NR + half * VL;
        const float* sum = sums + panel * panel_stride + r * row_stride + half * VL;
        vf total = load(acc) * old_scale[r];
        store(acc, total + load(sum) * new_scale[r]);
      }
    }
  }
}

void clear(const State& state, int64_t rows) {
  std::fill_n(state.m, rows, kNothing);
  std::fill_n(state.l, rows, 0.0f);
  std::fill_n(state.acc, rows * state.acc_stride, 0.0f);
}

template <class T>
void write_rows(const State& state, int64_t first, int64_t rows, int64_t d, int64_t group,
                T* out, int64_t out_stride) {
  for (int64_t r = first; r < first + rows; ++r) {
    const float factor = 1.0f / state.l[r];
    const float* acc = state.acc + r * state.acc_stride;
    T* row = out + r / group * out_stride + r % group * d;
    int64_t i = 0;
    for (; i + VL <= d; i += VL) store(row + i, load(acc + i) * factor);
    for (; i < d; ++i) from_float(acc[i] * factor, row + i);
  }
}

}  // namespace

AttentionPlan::AttentionPlan(const XllmBatch& batch, const XllmAttention& shape, int threads) {
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  const int64_t tile_tokens = std::max<int64_t>(1, kTileRows / group);
  int64_t total = 0;
  for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
    const int64_t begin = batch.query_start_loc[seq], end = batch.query_start_loc[seq + 1];
    const int64_t before = batch.context_lens[seq] - (end - begin);
    const int64_t n = (end - begin + tile_tokens - 1) / tile_tokens;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t first = (end - begin) * i / n, last = (end - begin) * (i + 1) / n;
      const int64_t chunks = (before + last + kChunk - 1) / kChunk;
      tiles.push_back({seq, begin + first, last - first, before + first + 1, chunks, -1});
      total += (last - first) * chunks;
    }
  }
  const int64_t stride = round_up(shape.head_dim, NR) + 2;
  const int64_t large = total / (4 * threads);
  for (size_t i = 0; i < tiles.size(); ++i) {
    Tile& tile = tiles[i];
    const int64_t floats = tile.tokens * shape.num_heads * tile.chunks * stride + kLanes;
    const bool share = threads > 1 && tile.chunks > 1 && tile.tokens * tile.chunks > large &&
                       partial_floats + floats <= kMaxPartialFloats;
    if (share) {
      tile.partial = partial_floats;
      partial_floats += floats;
      shared.push_back(i);
      for (int64_t chunk = 0; chunk < tile.chunks; ++chunk)
        items.push_back({static_cast<int64_t>(i), chunk, tile.tokens});
    } else {
      items.push_back({static_cast<int64_t>(i), -1, tile.tokens * tile.chunks});
    }
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.cost > b.cost; });
}

template <class T>
void attention(Team& team, const AttentionPlan& plan, const XllmAttention& shape,
               const XllmBatch& batch, const T* q, int64_t q_stride, const XllmKvLayer& kv, T* out,
               int64_t out_stride, float* partial) {
  using S = typename TileScheme<T>::type;
  using Table = MicroTable<S, Work<T>::kStride>;
  const int64_t group = shape.num_heads / shape.num_kv_heads, d = shape.head_dim;
  const float factor = shape.scale * kLog2e;
  Work<T> work(team, d);

  // Partial results of (tile, head, chunk): m [rows], l [rows], acc [rows][acc_stride].
  auto partial_of = [&](const AttentionPlan::Tile& tile, int64_t head, int64_t chunk) {
    const int64_t rows = tile.tokens * group;
    float* base = partial + tile.partial +
                  (head * tile.chunks + chunk) * rows * (work.acc_stride() + 2);
    return State{base, base + rows, base + 2 * rows, work.acc_stride()};
  };
  auto out_of = [&](const AttentionPlan::Tile& tile, int64_t head) {
    return out + tile.token * out_stride + head * group * d;
  };

  const int64_t n = static_cast<int64_t>(plan.items.size()) * shape.num_kv_heads;
  team.parallel_for_ordered(n, [&](int64_t index) {
    const AttentionPlan::Item& item = plan.items[index / shape.num_kv_heads];
    const AttentionPlan::Tile& tile = plan.tiles[item.tile];
    const int64_t head = index % shape.num_kv_heads;
    const int64_t rows = tile.tokens * group, groups = num_groups(rows);
    for (int64_t r = 0; r < rows; ++r)
      put_cells<S>(q + (tile.token + r / group) * q_stride + (head * group + r % group) * d, d,
                   work.q + r * Work<T>::kStride);

    const State state = item.chunk < 0 ? State{work.m, work.l, work.acc, work.acc_stride()}
                                       : partial_of(tile, head, item.chunk);
    clear(state, rows);
    const int64_t first_chunk = std::max<int64_t>(item.chunk, 0);
    const int64_t end_chunk = item.chunk < 0 ? tile.chunks : item.chunk + 1;
    for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
      const int64_t begin = chunk * kChunk;
      const int64_t count = std::min(kChunk, tile.visible + tile.tokens - 1 - begin);
      find_rows(work, batch, kv, tile.seq, head, begin, count);
      pack_chunk(work, count);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t r0 = group_begin(rows, groups, g), m_rows = group_begin(rows, groups, g + 1) - r0;
        auto visible = [&](int64_t r) {
          return std::clamp<int64_t>(tile.visible + r / group - begin, 0, kChunk);
        };
        const int64_t keys = visible(r0 + m_rows - 1);
        if (keys == 0) continue;
        for (int64_t panel = 0; panel * NR < keys; ++panel)
          Table::table[m_rows - 1](work.q + r0 * Work<T>::kStride,
                                   work.k + panel * work.d_steps * NR, work.d_steps,
                                   work.scores + panel * MR_MAX * NR, false, work.k);
        alignas(64) float m[kLanes] = {}, l[kLanes] = {};
        for (int64_t r = 0; r < m_rows; ++r)
          l[r] = weigh(work, r, visible(r0 + r), keys, factor, &m[r]);
        const int64_t key_steps = (keys + S::kPerStep - 1) / S::kPerStep;
        for (int64_t panel = 0; panel < work.d_panels; ++panel)
          Table::table[m_rows - 1](work.p, work.v + panel * Work<T>::kKeySteps * NR, key_steps,
                                   work.sums + panel * MR_MAX * NR, false, work.v);
        merge({state.m + r0, state.l + r0, state.acc + r0 * state.acc_stride, state.acc_stride},
              m_rows, m, l, work.sums, MR_MAX * NR, NR, work.d_panels, factor);
      }
    }
    if (item.chunk < 0) write_rows(state, 0, rows, d, group, out_of(tile, head), out_stride);
  });

  if (plan.shared.empty()) return;
  team.parallel_for(static_cast<int64_t>(plan.shared.size()) * shape.num_kv_heads, [&](int64_t i) {
    const AttentionPlan::Tile& tile = plan.tiles[plan.shared[i / shape.num_kv_heads]];
    const int64_t head = i % shape.num_kv_heads, rows = tile.tokens * group;
    const State state{work.m, work.l, work.acc, work.acc_stride()};
    clear(state, rows);
    for (int64_t chunk = 0; chunk < tile.chunks; ++chunk) {
      const State part = partial_of(tile, head, chunk);
      for (int64_t r = 0; r < rows; r += MR_MAX)
        merge({state.m + r, state.l + r, state.acc + r * state.acc_stride, state.acc_stride},
              std::min<int64_t>(MR_MAX, rows - r), part.m + r, part.l + r,
              part.acc + r * part.acc_stride, NR, part.acc_stride, work.d_panels, factor);
    }
    write_rows(state, 0, rows, d, group, out_of(tile, head), out_stride);
  });
}

#define XLLM_INSTANTIATE(T)                                                                       \
  template void attention<T>(Team&, const AttentionPlan&, const XllmAttention&, const XllmBatch&, \
                             const T*, int64_t, const XllmKvLayer&, T*, int64_t, float*);
XLLM_INSTANTIATE(float)
XLLM_INSTANTIATE(bf16)

}  // namespace xllm
