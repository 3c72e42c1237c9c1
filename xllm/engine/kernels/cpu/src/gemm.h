// Linear layers over packed weights, for any number of rows.
//
// DESIGN
//
// Weights [N, K] are packed once into panels of NR outputs: panel p holds steps s = 0 .. of NR
// cells (dot.h), so reading a panel is one sequential stream. There is one layout for all numbers
// of rows, and it replaces the original weights. A gated layer has VL gate outputs and the VL up
// outputs that belong to them in each panel, so that silu(gate) * up is done on registers' content
// before anything is stored.
//
// Few rows: threads share out panels; a panel is read from memory once and every group of rows
// passes over it; while a group computes it fetches its share of the next panel.
// Many rows: threads share out blocks of rows, each small enough for L2 together with two panels,
// so that weights are read once per block.
//
// Rows come from a `RowSource`, which may norm them on the way, into scratch memory at a fixed
// stride; results leave through an `Epilogue`, which adds bias and residual or applies the gate.
#pragma once

#include "api.h"
#include "dot.h"
#include "pool.h"

namespace xllm {

// Rows of k elements of T; with `norm`, RMS-normed rows of the float32 `residual` instead.
template <class T>
struct RowSource {
  const T* rows = nullptr;
  const float* residual = nullptr;
  const float* norm = nullptr;
  float eps = 0;
  int64_t stride = 0;
  const int64_t* index = nullptr;  // row r is found at index[r], if given
};

enum class Output {
  kStore,  // out = y, elements of T
  kFloat,  // out = y, float32
  kAdd,    // out += y, float32
};

struct Epilogue {
  Output kind;
  void* out;
  int64_t stride;
};

int64_t packed_bytes(int64_t n, int64_t k, bool gated, int32_t dtype);

template <class T>
void pack(Pool& pool, void* packed, const T* weight, int64_t stride, int64_t n, int64_t k,
          bool gated);

// Within pool.run().
template <class T>
void linear(Pool& pool, const XllmLinear& layer, int64_t rows, const RowSource<T>& source,
            const Epilogue& epilogue);

// Row n of packed (not gated) weights [N, k], as float32.
template <class T>
void unpack_row(const XllmLinear& layer, int64_t n, float* out);

}  // namespace xllm
