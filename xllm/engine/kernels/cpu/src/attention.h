// Causal attention over a paged KV cache, for decodes and prefill chunks alike.
//
// DESIGN
//
// The keys of a sequence are cut into chunks of kChunk at absolute positions. The unit of work is
// (tile of query tokens, KV head, chunk): all query heads of the KV head are rows of one small
// matrix, so that K and V are read once for all of them.
//
//   1. K and V of the chunk are read from their blocks and packed like weights (dot.h): K as
//      [D steps][keys], V as [key steps][D]. This costs a few per cent beside many rows; beside the
//      few rows of a decode it still runs at the speed of memory.
//   2. In groups of up to MR_MAX rows: scores = q K^T, softmax within the chunk, sums = p V.
//   3. The chunk's (max, sum of weights, sums) is merged into the row's running state.
//
// A row's result depends on its own query and keys alone: chunks start at multiples of kChunk,
// masked keys take part in nothing, and merging goes in the order of chunks, whether one thread
// walks them all or they were shared out (a long context at small batch) and merged afterwards.
// So prefill in any chunking, decode, and the last token over a cached prompt agree bit by bit.
//
// Products are bf16 with float32 sums where the CPU has the instruction, float32 elsewhere.
#pragma once

#include <vector>

#include "api.h"
#include "pool.h"

namespace xllm {

constexpr int64_t kMaxHeadDim = 256;

// How a batch is cut, the same for all layers: made once per step.
struct AttentionPlan {
  // Query tokens [token, token + tokens) of sequence `seq`; the first one sees `visible` keys.
  struct Tile {
    int64_t seq, token, tokens, visible, chunks;
    int64_t partial;  // floats before its partial results, -1: chunks are not shared out
  };
  struct Item {
    int64_t tile;
    int64_t chunk;  // -1: all of them, in order
    int64_t head_begin, head_end;
    int64_t cost;
  };

  AttentionPlan(const XllmBatch& batch, const XllmAttention& shape, int threads);

  std::vector<Tile> tiles;
  std::vector<Item> items;         // most expensive first
  std::vector<int64_t> shared;     // tiles whose chunks are shared out
  int64_t partial_floats = 0;
  Pool::Order order;
};

// out [T, H D] = attention of q [T, H D]. Within pool.run().
// `partial`: plan.partial_floats floats, shared by the threads.
template <class T>
void attention(Pool& pool, const AttentionPlan& plan, const XllmAttention& shape,
               const XllmBatch& batch, const T* q, int64_t q_stride, const XllmKvLayer& kv, T* out,
               int64_t out_stride, float* partial);

// Norms (if asked for) and rotates the q and k of qkv [T, (H + 2 G) D] in place and writes k and v
// to their token slots. Within pool.run().
template <class T>
void rope_and_write(Pool& pool, const XllmAttention& shape, const XllmBatch& batch, T* qkv,
                    int64_t qkv_stride, const XllmKvLayer& kv);

}  // namespace xllm
