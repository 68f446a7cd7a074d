// Panels as kernels take them, and the way there and back. Not for kernels.cpp: it uses the standard library.
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

// `count` packed panels of one shape, each a multiple of a cache line apart, uninitialised.
class Panels {
 public:
  Panels(int64_t count, int64_t rows, int64_t columns)
      : rows_(rows), columns_(ceil_div(columns, HALF_TILE) * HALF_TILE), size_(ceil_div(rows_ * columns_, 16) * 16) {
    const size_t bytes = std::max<size_t>(count * size_, 1) * sizeof(float);
    data_.reset(static_cast<float*>(::operator new(bytes, LINE)));
  }
  Panel operator[](int64_t index) const { return {data_.get() + index * size_, rows_, columns_}; }

 private:
  static constexpr std::align_val_t LINE{64};
  struct Free {
    void operator()(float* data) const { ::operator delete(data, LINE); }
  };
  int64_t rows_, columns_, size_;
  std::unique_ptr<float, Free> data_;
};

inline void clear(const Panel& panel) { std::fill_n(panel.data, panel.rows * panel.columns, 0.0f); }

// f(row, column, pointer, width) for rows [begin, end) of each tile.
template <class F>
void for_tile_rows(const Panel& panel, int64_t begin, int64_t end, const F& f) {
  for (int64_t column = 0; column < panel.columns; column += TILE) {
    const int64_t width = std::min(panel.columns - column, TILE);
    float* data = panel.data + column * panel.rows + begin * width;
    for (int64_t row = begin; row < end; ++row, data += width) f(row, column, data, width);
  }
}

// Rows [begin, end) of a strided matrix into the same rows of the panel, zeros beyond its columns.
inline void pack(const Matrix& matrix, const Panel& panel, int64_t begin, int64_t end) {
  for_tile_rows(panel, begin, end, [&](int64_t row, int64_t column, float* to, int64_t width) {
    const float* const from =
        static_cast<const float*>(matrix.data) + row * matrix.row_stride + column * matrix.col_stride;
    for (int64_t j = 0; j < width; ++j) to[j] = column + j < matrix.cols ? from[j * matrix.col_stride] : 0.0f;
  });
}

// Rows [begin, end) of the panel into a contiguous matrix, whose rows they are from `shift` on.
inline void unpack(const Panel& panel, int64_t begin, int64_t end, const Matrix& matrix, int64_t shift) {
  for_tile_rows(panel, begin, end, [&](int64_t row, int64_t column, const float* from, int64_t width) {
    float* const to = static_cast<float*>(matrix.data) + (row + shift) * matrix.cols + column;
    std::copy_n(from, std::min(matrix.cols - column, width), to);
  });
}

// Rows [begin, end) of `total` += those of `other`.
inline void add(const Panel& total, const Panel& other, int64_t begin, int64_t end) {
  for_tile_rows(total, begin, end, [&](int64_t, int64_t, float* to, int64_t width) {
    const float* const from = other.data + (to - total.data);
    for (int64_t j = 0; j < width; ++j) to[j] += from[j];
  });
}

// f(index, begin, end) on threads, for ranges that make up [0, units) for every index; `work` is a unit's, in
// multiplications.
template <class F>
void parallel_ranges(int64_t count, int64_t units, int64_t work, const F& f) {
  // below this another thread costs more than it saves
  constexpr int64_t LEAST = 1 << 18;
  torch::stable::parallel_for(
      0, count * units, LEAST / std::max<int64_t>(work, 1) + 1, [&](int64_t first, int64_t last) {
        while (first < last) {
          const int64_t begin = first % units, end = std::min(begin + last - first, units);
          f(first / units, begin, end);
          first += end - begin;
        }
      });
}

}  // namespace pissa::cpu
