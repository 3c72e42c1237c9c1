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

// Where the keys and values of one unit (a chunk of one KV head) are: `count` of up to kChunk.
template <class T>
struct Rows {
  const T** keys;
  const T** values;
  int64_t count = 0;
};

// Brings the next unit's rows into the cache in small steps between the computation of this one:
// a burst would wait for memory, and hardware does not foresee rows that are scattered over blocks.
template <class T>
class Fetcher {
 public:
  Fetcher(const Rows<T>& rows, int64_t d) : rows_(rows), d_(d) {}

  void step(int64_t count) {
    for (const int64_t end = std::min(row_ + count, rows_.count); row_ < end; ++row_) {
      for (int64_t i = 0; i < d_; i += 64 / sizeof(T)) {
        __builtin_prefetch(rows_.keys[row_] + i, 0, 2);
        __builtin_prefetch(rows_.values[row_] + i, 0, 2);
      }
    }
  }

 private:
  const Rows<T>& rows_;
  const int64_t d_;
  int64_t row_ = 0;
};

// A thread's memory for one item of work.
template <class T>
struct Work {
  using S = typename TileScheme<T>::type;
  static constexpr int64_t kKeySteps = kChunk / S::kPerStep;
  // Row strides of q (K = D) and p (K = keys): one table of micro-kernels serves both.
  static constexpr int kStride = kChunk / S::kPerStep + 16;
  static_assert(kMaxHeadDim <= kChunk);
  static constexpr bool kWiden = S::kCells * sizeof(T) * S::kPerStep != 4;  // bf16 as float32

  Work(Worker& worker, int64_t head_dim)
      : d(head_dim),
        d_steps(head_dim / S::kPerStep),
        d_panels((head_dim + NR - 1) / NR) {
    const int64_t k_cells = kChunk * d_steps, v_cells = d_panels * kKeySteps * NR;
    const int64_t acc_cells = kTileRows * d_panels * NR;
    const int64_t cells = k_cells + v_cells + kTileRows * kStride + kChunk * MR_MAX +
                          MR_MAX * kStride + MR_MAX * d_panels * NR + acc_cells +
                          2 * round_up(kTileRows + kLanes, 16);
    uint32_t* next = static_cast<uint32_t*>(
        worker.scratch((cells + (VL + 1) * kMaxHeadDim) * 4 + 4 * kChunk * sizeof(T*)));
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
    wide = take(VL * kMaxHeadDim);
    zeros = take(kMaxHeadDim);
    std::fill_n(zeros, kMaxHeadDim, 0u);
    const T** pointers = reinterpret_cast<const T**>(next);
    for (Rows<T>& r : rows) {
      r.keys = std::exchange(pointers, pointers + kChunk);
      r.values = std::exchange(pointers, pointers + kChunk);
    }
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
  uint32_t* wide;      // [VL][kMaxHeadDim]: keys widened to float32
  uint32_t* zeros;     // [kMaxHeadDim]
  Rows<T> rows[2];     // of the unit being computed and of the next one
};

// Finds the keys of head `head` from position `begin` on.
template <class T>
void find_rows(Rows<T>& rows, const XllmBatch& batch, const XllmKvLayer& kv, int64_t seq,
               int64_t head, int64_t begin, int64_t count) {
  const int32_t* table = batch.block_tables + seq * batch.block_table_stride;
  const T* base = static_cast<const T*>(kv.data) + head * kv.head_stride;
  rows.count = count;
  for (int64_t i = 0; i < count;) {
    const int64_t block = (begin + i) / kv.block_size, offset = (begin + i) % kv.block_size;
    const int64_t n = std::min(kv.block_size - offset, count - i);
    const T* row = base + table[block] * kv.block_stride + offset * kv.token_stride;
    for (int64_t j = 0; j < n; ++j, ++i, row += kv.token_stride) {
      rows.keys[i] = row;
      rows.values[i] = row + kv.kv_stride;
    }
  }
}

// Keys as [panel of NR][d step][NR]. Past the last one anything may follow: its scores are masked.
template <class T>
void pack_keys(Work<T>& work, const Rows<T>& rows, Fetcher<T>& fetcher) {
  using S = typename Work<T>::S;
  for (int64_t first = 0; first < rows.count; first += VL) {
    const uint32_t* cells[VL];
    for (int64_t i = 0; i < VL; ++i) {
      const T* key = rows.keys[std::min(first + i, rows.count - 1)];
      if constexpr (Work<T>::kWiden) {
        put_cells<S>(key, work.d, work.wide + i * kMaxHeadDim);
        cells[i] = work.wide + i * kMaxHeadDim;
      } else {
        cells[i] = reinterpret_cast<const uint32_t*>(key);
      }
    }
    transpose_rows(cells, work.d_steps, work.k + (first / NR * work.d_steps * NR + first % NR), NR);
    fetcher.step(VL / 3);
  }
}

// Values as [panel of NR columns][key step][NR]. A missing half of the last step is zero: its
// weight is zero, but zero times garbage need not be.
template <class T>
void pack_values(Work<T>& work, const Rows<T>& rows, Fetcher<T>& fetcher) {
  using S = typename Work<T>::S;
  const int64_t d = work.d, whole = d / VL * VL;
  constexpr int64_t panel_cells = Work<T>::kKeySteps * NR;
  uint32_t* out = work.v;
  for (int64_t key = 0; key < rows.count; key += S::kPerStep, out += NR) {
    auto at = [&](int64_t column) { return out + column / NR * panel_cells + column % NR; };
    const T* row = rows.values[key];
    if constexpr (S::kPerStep == 2) {
      const uint16_t* even = reinterpret_cast<const uint16_t*>(row);
      const uint16_t* odd = key + 1 < rows.count
                                ? reinterpret_cast<const uint16_t*>(rows.values[key + 1])
                                : reinterpret_cast<const uint16_t*>(work.zeros);
      for (int64_t i = 0; i < whole; i += VL) store(at(i), load_u16(even + i) | load_u16(odd + i) << 16);
      for (int64_t i = whole; i < d; ++i) *at(i) = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    } else {
      for (int64_t i = 0; i < whole; i += VL) store(reinterpret_cast<float*>(at(i)), load(row + i));
      for (int64_t i = whole; i < d; ++i) *reinterpret_cast<float*>(at(i)) = to_float(row[i]);
    }
    if (key % 16 == 0) fetcher.step(7);
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

  State from(int64_t row) const { return {m + row, l + row, acc + row * acc_stride, acc_stride}; }
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

// Steps 2 and 3 for the packed chunk: row r, of query token r / group, sees `visible` + r / group
// of its keys.
template <class T>
void attend_chunk(Work<T>& work, const uint32_t* q, int64_t rows, int64_t group, int64_t visible,
                  float factor, const State& state, Fetcher<T>& fetcher) {
  using S = typename Work<T>::S;
  using Table = MicroTable<S, Work<T>::kStride>;
  auto visible_to = [&](int64_t r) {
    return std::clamp<int64_t>(visible + r / group, 0, kChunk);
  };
  const int64_t groups = num_groups(rows);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t r0 = group_begin(rows, groups, g);
    const int64_t m_rows = group_begin(rows, groups, g + 1) - r0;
    const int64_t keys = visible_to(r0 + m_rows - 1);
    if (keys == 0) continue;
    const Micro multiply = Table::table[m_rows - 1];
    for (int64_t panel = 0; panel * NR < keys; ++panel) {
      multiply(q + r0 * Work<T>::kStride, work.k + panel * work.d_steps * NR, work.d_steps,
               work.scores + panel * MR_MAX * NR, false, nullptr, 0);
      fetcher.step(NR / 5);
    }
    alignas(64) float m[kLanes] = {}, l[kLanes] = {};
    for (int64_t r = 0; r < m_rows; ++r) {
      l[r] = weigh(work, r, visible_to(r0 + r), keys, factor, &m[r]);
      fetcher.step(8);
    }
    const int64_t key_steps = (keys + S::kPerStep - 1) / S::kPerStep;
    for (int64_t panel = 0; panel < work.d_panels; ++panel)
      multiply(work.p, work.v + panel * Work<T>::kKeySteps * NR, key_steps,
               work.sums + panel * MR_MAX * NR, false, nullptr, 0);
    merge(state.from(r0), m_rows, m, l, work.sums, MR_MAX * NR, NR, work.d_panels, factor);
  }
}

template <class T>
void write_rows(const State& state, int64_t rows, int64_t d, int64_t group, T* out,
                int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
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
  const int64_t heads = shape.num_kv_heads;
  const int64_t large = total / (4 * threads);
  for (size_t i = 0; i < tiles.size(); ++i) {
    Tile& tile = tiles[i];
    const int64_t index = static_cast<int64_t>(i), rows = tile.tokens * group;
    const int64_t floats = rows * heads * tile.chunks * stride + kLanes;
    const bool share = threads > 1 && tile.chunks > 1 && tile.tokens * tile.chunks > large &&
                       partial_floats + floats <= kMaxPartialFloats;
    if (share) {
      tile.partial = partial_floats;
      partial_floats += floats;
      shared.push_back(index);
    }
    // All heads of a decode together, if that leaves enough items: memory is read in longer runs.
    const bool plenty = static_cast<int64_t>(tiles.size()) >= 4 * threads || share;
    const int64_t together = plenty ? std::clamp<int64_t>(MR_MAX / rows, 1, heads) : 1;
    for (int64_t head = 0; head < heads; head += together) {
      const int64_t end = std::min(heads, head + together);
      const int64_t cost = (end - head) * tile.tokens;
      if (!share) items.push_back({index, -1, head, end, cost * tile.chunks});
      for (int64_t chunk = 0; share && chunk < tile.chunks; ++chunk)
        items.push_back({index, chunk, head, end, cost});
    }
  }
  // Decodes are many and small: neighbours go to one thread, which then knows what comes next.
  const bool decodes = batch.num_tokens == batch.num_seqs;
  order = decodes ? Pool::Order::kRanges : Pool::Order::kSequence;
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.cost > b.cost; });
}

template <class T>
void attention(Pool& pool, const AttentionPlan& plan, const XllmAttention& shape,
               const XllmBatch& batch, const T* q, int64_t q_stride, const XllmKvLayer& kv, T* out,
               int64_t out_stride, float* partial) {
  using S = typename TileScheme<T>::type;
  const int64_t group = shape.num_heads / shape.num_kv_heads, d = shape.head_dim;
  const float factor = shape.scale * kLog2e;
  const int64_t acc_stride = round_up(d, NR);

  // Partial results of (tile, head, chunk): m [rows], l [rows], acc [rows][acc_stride].
  auto partial_of = [&](const AttentionPlan::Tile& tile, int64_t head, int64_t chunk) {
    const int64_t rows = tile.tokens * group;
    float* base = partial + tile.partial + (head * tile.chunks + chunk) * rows * (acc_stride + 2);
    return State{base, base + rows, base + 2 * rows, acc_stride};
  };
  auto out_of = [&](const AttentionPlan::Tile& tile, int64_t head) {
    return out + tile.token * out_stride + head * group * d;
  };

  const int64_t kv_heads = shape.num_kv_heads;
  const int64_t num_items = static_cast<int64_t>(plan.items.size());
  pool.parallel(num_items, [&](Worker& worker) {
    Work<T> work(worker, d);
    worker.each([&](int64_t index) {
      const AttentionPlan::Item& item = plan.items[index];
      const AttentionPlan::Tile& tile = plan.tiles[item.tile];
      const int64_t heads = item.head_end - item.head_begin, rows = tile.tokens * group;
      const int64_t first_chunk = item.chunk < 0 ? 0 : item.chunk;
      const int64_t chunks = item.chunk < 0 ? tile.chunks : 1;
      const State own{work.m, work.l, work.acc, acc_stride};
      auto state_of = [&](int64_t head) {
        return item.chunk < 0 ? own.from((head - item.head_begin) * rows)
                              : partial_of(tile, head, item.chunk);
      };
      for (int64_t head = item.head_begin; head < item.head_end; ++head) {
        clear(state_of(head), rows);
        uint32_t* cells = work.q + (head - item.head_begin) * rows * Work<T>::kStride;
        for (int64_t r = 0; r < rows; ++r)
          put_cells<S>(q + (tile.token + r / group) * q_stride + (head * group + r % group) * d, d,
                       cells + r * Work<T>::kStride);
      }

      // A unit is one head of one chunk; the heads of a chunk lie side by side in memory. After
      // the last unit of this item comes, most likely, the first one of the next.
      const int64_t units = chunks * heads;
      auto find = [&](int64_t unit, Rows<T>& rows) {
        const AttentionPlan::Item* of = &item;
        if (unit == units) {
          rows.count = 0;
          if (index + 1 == num_items) return;
          of = &plan.items[index + 1];
          unit = 0;
        }
        const AttentionPlan::Tile& from = plan.tiles[of->tile];
        const int64_t width = of->head_end - of->head_begin;
        const int64_t begin = (std::max<int64_t>(of->chunk, 0) + unit / width) * kChunk;
        find_rows(rows, batch, kv, from.seq, of->head_begin + unit % width, begin,
                  std::min(kChunk, from.visible + from.tokens - 1 - begin));
      };
      find(0, work.rows[0]);
      for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t chunk = first_chunk + unit / heads, h = unit % heads;
        const Rows<T>& now = work.rows[unit % 2];
        find(unit + 1, work.rows[(unit + 1) % 2]);
        Fetcher<T> fetcher(work.rows[(unit + 1) % 2], d);
        pack_keys(work, now, fetcher);
        pack_values(work, now, fetcher);
        attend_chunk(work, work.q + h * rows * Work<T>::kStride, rows, group,
                     tile.visible - chunk * kChunk, factor, state_of(item.head_begin + h),
                     fetcher);
      }
      if (item.chunk >= 0) return;
      for (int64_t head = item.head_begin; head < item.head_end; ++head)
        write_rows(state_of(head), rows, d, group, out_of(tile, head), out_stride);
    });
  }, plan.order);

  if (plan.shared.empty()) return;
  pool.parallel(static_cast<int64_t>(plan.shared.size()) * kv_heads, [&](Worker& worker) {
    Work<T> work(worker, d);
    worker.each([&](int64_t i) {
      const AttentionPlan::Tile& tile = plan.tiles[plan.shared[i / kv_heads]];
      const int64_t head = i % kv_heads, rows = tile.tokens * group;
      const State state{work.m, work.l, work.acc, acc_stride};
      clear(state, rows);
      for (int64_t chunk = 0; chunk < tile.chunks; ++chunk) {
        const State part = partial_of(tile, head, chunk);
        for (int64_t r = 0; r < rows; r += MR_MAX)
          merge(state.from(r), std::min<int64_t>(MR_MAX, rows - r), part.m + r, part.l + r,
                part.acc + r * acc_stride, NR, acc_stride, work.d_panels, factor);
      }
      write_rows(state, rows, d, group, out_of(tile, head), out_stride);
    });
  });
}

#define XLLM_INSTANTIATE(T)                                                                       \
  template void attention<T>(Pool&, const AttentionPlan&, const XllmAttention&, const XllmBatch&, \
                             const T*, int64_t, const XllmKvLayer&, T*, int64_t, float*);
XLLM_INSTANTIATE(float)
XLLM_INSTANTIATE(bf16)

}  // namespace xllm
