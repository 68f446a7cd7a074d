// Wᵀ in another dtype, through a buffer in L1.
//
// The rows of Wᵀ are often a power of two apart, so that the cache lines of a tile map to the same sets and evict each
// other. A tile is therefore transposed into a buffer, which is copied to the result in whole cache lines. Non-temporal
// stores were slower by a quarter: the operating system has just zeroed the pages of a new result, so they are cached.
#pragma once

#include "simd.h"

namespace {

// Rows of the result in the buffer. Reading 256 elements of a row of W at a time keeps the hardware prefetcher going.
constexpr int64_t BUFFER_ROWS = 256;

template <class V>
inline __attribute__((always_inline)) void interleave(const V* in, V* out) {
  // interleaves in[i] and in[i + 4]; three rounds transpose eight vectors of eight elements
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __builtin_shufflevector(in[i], in[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
    out[2 * i + 1] = __builtin_shufflevector(in[i], in[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
  }
}

template <class From, class To>
inline __attribute__((always_inline)) typename To::Vector cast(typename From::Vector v) {
  return To::round(From::widen(v));
}

// Rows [begin, end) of out = Wᵀ, which are columns of W, for W with contiguous rows.
template <class From, class To>
void transpose_buffered(const pissa::Matrix& weight, const pissa::Matrix& out, int64_t begin, int64_t end) {
  typedef typename From::Scalar Source;
  typedef typename To::Scalar Target;
  constexpr int64_t DEPTH = LINE_BYTES / sizeof(Target);
  alignas(LINE_BYTES) Target buffer[BUFFER_ROWS][DEPTH];
  const Source* const source = static_cast<const Source*>(weight.data);
  Target* const target = static_cast<Target*>(out.data);
  for (int64_t left = begin; left < end; left += BUFFER_ROWS) {
    const int64_t width = end - left < BUFFER_ROWS ? end - left : BUFFER_ROWS;
    for (int64_t top = 0; top < weight.rows; top += DEPTH) {
      const int64_t depth = weight.rows - top < DEPTH ? weight.rows - top : DEPTH;
      const Source* const corner = source + top * weight.row_stride + left;
      const int64_t full_depth = depth / LANES * LANES, full_width = width / LANES * LANES;
      for (int64_t i = 0; i < full_depth; i += LANES) {
        for (int64_t j = 0; j < full_width; j += LANES) {
          typename To::Vector rows[LANES], mixed[LANES];
          for (int k = 0; k < LANES; ++k)
            rows[k] = cast<From, To>(load<typename From::Vector>(corner + (i + k) * weight.row_stride + j));
          interleave(rows, mixed);
          interleave(mixed, rows);
          interleave(rows, mixed);
          for (int k = 0; k < LANES; ++k) store(&buffer[j + k][i], mixed[k]);
        }
      }
      for (int64_t i = 0; i < depth; ++i) {
        for (int64_t j = i < full_depth ? full_width : 0; j < width; ++j) {
          Source one[LANES] = {corner[i * weight.row_stride + j]};
          buffer[j][i] = cast<From, To>(load<typename From::Vector>(one))[0];
        }
      }
      Target* const row = target + left * out.row_stride + top;
      for (int64_t j = 0; j < width; ++j) {
        if (depth == DEPTH) {
          __builtin_memcpy(row + j * out.row_stride, buffer[j], LINE_BYTES);
        } else {
          for (int64_t i = 0; i < depth; ++i) row[j * out.row_stride + i] = buffer[j][i];
        }
      }
    }
  }
}

// Rows [begin, end) of out = Wᵀ for W with contiguous columns, whose elements are in the order of the result.
template <class From, class To>
void cast_rows(const pissa::Matrix& weight, const pissa::Matrix& out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const auto* from = static_cast<const typename From::Scalar*>(weight.data) + row * weight.col_stride;
    auto* to = static_cast<typename To::Scalar*>(out.data) + row * out.row_stride;
    int64_t i = 0;
    for (; i + LANES <= out.cols; i += LANES) store_rounded<To>(to + i, load_wide<From>(from + i));
    if (i < out.cols) store_rounded<To>(to + i, load_wide<From>(from + i, out.cols - i), out.cols - i);
  }
}

template <class From, class To>
void transpose_cast(const pissa::Matrix& weight, const pissa::Matrix& out, int64_t begin, int64_t end) {
  if (weight.row_contiguous()) {
    transpose_buffered<From, To>(weight, out, begin, end);
  } else {
    cast_rows<From, To>(weight, out, begin, end);
  }
}

}  // namespace
