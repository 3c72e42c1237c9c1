#include "attention.h"

#include <algorithm>
#include <limits>

#include "attention_work.h"
#include "rows.h"

namespace xllm {

namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

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
