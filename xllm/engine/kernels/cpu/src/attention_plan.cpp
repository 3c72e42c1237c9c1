#include <algorithm>

#include "attention_work.h"

namespace xllm {

namespace {

constexpr int64_t kMaxPartialFloats = 16 << 20;  // 64 MiB

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

}  // namespace xllm
