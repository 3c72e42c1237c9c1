// VL rows of 32-bit cells into columns: how keys become a packed panel.
#pragma once

#include "simd.h"

namespace xllm {

// out[c * out_stride + r] = rows[r][c] for r < VL, c < columns.
inline void transpose_rows_plain(const uint32_t* const* rows, int64_t begin, int64_t columns,
                                 uint32_t* out, int64_t out_stride) {
  for (int64_t c = begin; c < columns; ++c)
    for (int r = 0; r < VL; ++r) std::memcpy(out + c * out_stride + r, rows[r] + c, 4);
}

#if defined(__AVX512F__)

// 16 x 16: pairs of rows interleaved by 32, then by 64 bits, then their quarters regrouped twice.
inline void transpose_16x16(const uint32_t* const* rows, int64_t c, uint32_t* out,
                            int64_t out_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(rows[r] + c);
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
  // a[4 i + j], quarter q: column 4 q + j of rows 4 i .. 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);           // quarters 0 2 | 0 2
    b[4 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);       // quarters 1 3 | 1 3
    b[8 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm512_storeu_si512(out + (c + j) * out_stride, _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88));
    _mm512_storeu_si512(out + (c + 8 + j) * out_stride,
                        _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd));
    _mm512_storeu_si512(out + (c + 4 + j) * out_stride,
                        _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0x88));
    _mm512_storeu_si512(out + (c + 12 + j) * out_stride,
                        _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0xdd));
  }
}

inline void transpose_rows(const uint32_t* const* rows, int64_t columns, uint32_t* out,
                           int64_t out_stride) {
  int64_t c = 0;
  for (; c + 16 <= columns; c += 16) transpose_16x16(rows, c, out, out_stride);
  transpose_rows_plain(rows, c, columns, out, out_stride);
}

#else

inline void transpose_rows(const uint32_t* const* rows, int64_t columns, uint32_t* out,
                           int64_t out_stride) {
  transpose_rows_plain(rows, 0, columns, out, out_stride);
}

#endif

}  // namespace xllm
