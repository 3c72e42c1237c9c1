// A thread's memory for attention, where a chunk's keys and values are, and how they are packed.
#pragma once

#include <algorithm>
#include <utility>

#include "attention.h"
#include "dot.h"
#include "transpose.h"

namespace xllm {

constexpr int64_t kChunk = 256;                      // keys
constexpr int64_t kTileRows = 9 * MR_MAX;            // query tokens times heads of a KV head
constexpr int kLanes = (MR_MAX + VL - 1) / VL * VL;  // MR_MAX rows in whole vectors

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
      for (int64_t i = 0; i < whole; i += VL)
        store(at(i), load_u16(even + i) | load_u16(odd + i) << 16);
      for (int64_t i = whole; i < d; ++i) *at(i) = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    } else {
      for (int64_t i = 0; i < whole; i += VL) store(reinterpret_cast<float*>(at(i)), load(row + i));
      for (int64_t i = whole; i < d; ++i) *reinterpret_cast<float*>(at(i)) = to_float(row[i]);
    }
    if (key % 16 == 0) fetcher.step(7);
  }
}

}  // namespace xllm
