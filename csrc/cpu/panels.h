// Packed panels, and how matrices are packed and unpacked. Not for kernels.cpp, because it uses the standard library.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "../matrix.h"
#include "kernels.h"

namespace pissa::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The layout of a panel with one row per column of W, along which the narrow kernels vectorize.
inline Layout layout_along_rows(const Matrix& W, int64_t columns) {
  if (columns == 0 || columns > HALF_TILE) return Layout::tiles;
  return W.dtype == Dtype::bf16 ? Layout::deinterleaved : Layout::transposed;
}

// `count` uninitialized panels of one shape, each aligned to a cache line.
class Panels {
 public:
  Panels(int64_t count, int64_t rows, int64_t columns, Layout layout)
      : columns_(ceil_div(columns, HALF_TILE) * HALF_TILE),
        used_(columns),
        layout_(layout),
        rows_(layout == Layout::tiles ? rows : ceil_div(rows, 32) * 32),
        size_(ceil_div(rows_ * columns_, 16) * 16) {
    const size_t bytes = std::max<size_t>(count * size_, 1) * sizeof(float);
    data_.reset(static_cast<float*>(::operator new(bytes, ALIGNMENT)));
  }
  Panel operator[](int64_t index) const { return {data_.get() + index * size_, rows_, columns_, layout_, used_}; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  struct Free {
    void operator()(float* data) const { ::operator delete(data, ALIGNMENT); }
  };
  int64_t columns_, used_;
  Layout layout_;
  int64_t rows_, size_;
  std::unique_ptr<float, Free> data_;
};

// f(row, column, pointer, width, step) for rows [begin, end) of each tile: `width` elements from `column` on, `step`
// apart.
template <class F>
inline void for_tile_rows(const Panel& panel, int64_t begin, int64_t end, const F& f) {
  if (panel.layout != Layout::tiles) {
    const bool deinterleaved = panel.layout == Layout::deinterleaved;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = deinterleaved ? row / 16 * 128 + row % 2 * 64 + row % 16 / 2 : row / 8 * 64 + row % 8;
      f(row, 0, panel.data + offset, HALF_TILE, 8);
    }
    return;
  }
  for (int64_t column = 0; column < panel.columns; column += TILE) {
    const int64_t width = std::min(panel.columns - column, TILE);
    float* data = panel.data + column * panel.rows + begin * width;
    for (int64_t row = begin; row < end; ++row, data += width) f(row, column, data, width, 1);
  }
}

// Packs rows [begin, end) of a strided matrix into the same rows of the panel, with zeros for rows and columns that the
// matrix does not have.
inline void pack(const Matrix& matrix, const Panel& panel, int64_t begin, int64_t end) {
  for_tile_rows(panel, begin, end, [&](int64_t row, int64_t column, float* to, int64_t width, int64_t step) {
    const float* const from =
        static_cast<const float*>(matrix.data) + row * matrix.row_stride + column * matrix.col_stride;
    const int64_t count = row < matrix.rows ? std::min(matrix.cols - column, width) : 0;
    for (int64_t j = 0; j < count; ++j) to[j * step] = from[j * matrix.col_stride];
    for (int64_t j = count; j < width; ++j) to[j * step] = 0.0f;
  });
}

// Unpacks rows [begin, end) of the panel into a contiguous matrix, `shift` rows further down.
inline void unpack(const Panel& panel, int64_t begin, int64_t end, const Matrix& matrix, int64_t shift) {
  for_tile_rows(panel, begin, end, [&](int64_t row, int64_t column, const float* from, int64_t width, int64_t step) {
    float* const to = static_cast<float*>(matrix.data) + (row + shift) * matrix.cols + column;
    const int64_t count = std::min(matrix.cols - column, width);
    for (int64_t j = 0; j < count; ++j) to[j] = from[j * step];
  });
}

// f(offset, count) for the contiguous ranges of memory that hold rows [begin, end), both multiples of 16 unless the
// panel is in tiles.
template <class F>
inline void for_contiguous(const Panel& panel, int64_t begin, int64_t end, const F& f) {
  for (int64_t column = 0; column < panel.columns; column += TILE) {
    const int64_t width = std::min(panel.columns - column, TILE);
    f(column * panel.rows + begin * width, (end - begin) * width);
  }
}

inline void clear(const Panel& panel, int64_t begin, int64_t end) {
  for_contiguous(panel, begin, end, [&](int64_t at, int64_t count) { std::fill_n(panel.data + at, count, 0.0f); });
}

inline void add(const Panel& total, const Panel& other, int64_t begin, int64_t end) {
  for_contiguous(total, begin, end, [&](int64_t at, int64_t count) {
    float* const to = total.data + at;
    const float* const from = other.data + at;
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  });
}

// f(index, begin, end) on several threads, for ranges that together cover [0, units) for each of `count` indices.
// `work` is the number of multiplications in a unit.
template <class F>
void parallel_ranges(int64_t count, int64_t units, int64_t work, const F& f) {
  // multiplications below which another thread costs more than it saves
  constexpr int64_t GRAIN = 1 << 18;
  torch::stable::parallel_for(
      0, count * units, GRAIN / std::max<int64_t>(work, 1) + 1, [&](int64_t first, int64_t last) {
        while (first < last) {
          const int64_t begin = first % units, end = std::min(begin + last - first, units);
          f(first / units, begin, end);
          first += end - begin;
        }
      });
}

}  // namespace pissa::cpu
