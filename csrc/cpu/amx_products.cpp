// The loops around the kernels of amx.h: threads, bands of rows, and the order of the sums.
#include "amx_products.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>

#include "amx.h"
#include "isa.h"
#include "panels.h"

namespace pissa::cpu::amx {
namespace {

// Bounds of the largest element of a panel, and of a product relative to it, and of the products of a subtraction. Between
// them, what tiles flush to zero is less than float32's round-off, and no piece overflows.
constexpr float SMALLEST = 1e-26f, LARGEST = 1e30f;

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(size, 1) * sizeof(T), ALIGNMENT))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, ALIGNMENT); }
  };
  std::unique_ptr<T, Free> data_;
};

// The largest absolute value; NaN if there is one. Without the sign bit, floats are ordered as their bits are.
float largest(const Matrices& matrices) {
  uint32_t result = 0;
  for (const Matrix& matrix : matrices) {
    const bool by_rows = matrix.row_stride >= matrix.col_stride;
    const int64_t outer = by_rows ? matrix.rows : matrix.cols, inner = by_rows ? matrix.cols : matrix.rows;
    const int64_t outer_stride = std::max(matrix.row_stride, matrix.col_stride);
    const int64_t stride = std::min(matrix.row_stride, matrix.col_stride);
    for (int64_t i = 0; i < outer; ++i) {
      const auto* const bits = static_cast<const uint32_t*>(matrix.data) + i * outer_stride;
      uint32_t most = 0;
      if (stride == 1) {
        for (int64_t j = 0; j < inner; ++j) most = std::max(most, bits[j] & 0x7fffffffu);
      } else {
        for (int64_t j = 0; j < inner; ++j) most = std::max(most, bits[j * stride] & 0x7fffffffu);
      }
      result = std::max(result, most);
    }
  }
  float value;
  std::memcpy(&value, &result, sizeof(value));
  return value;
}

bool in_range(float value, float scale) { return value > SMALLEST * scale && value > SMALLEST && value < LARGEST; }

// Bytes of W in a band. It is read twice, and stays in L2 in between; so does an interleaved band.
constexpr int64_t BAND_BYTES = 512 << 10;

struct Shape {
  int64_t rows, cols, columns;
  int64_t tiles, steps, groups, band;

  Shape(const Matrix& weight, int64_t columns)
      : rows(weight.rows),
        cols(weight.cols),
        columns(columns),
        tiles(tiles_of(columns)),
        steps(steps_of(cols)),
        groups(groups_of(cols)),
        band(std::clamp(BAND_BYTES / (2 * GROUP * (groups + 1)) / GROUP * GROUP, GROUP, BAND)) {}
  int64_t packed_size(int64_t pieces) const { return tiles * steps * pieces * TILE_SIZE; }
  int64_t band_size() const { return 2 * tiles * BAND * TILE; }  // with the room that multiply() needs
  int64_t packed_band_size(int64_t pieces) const { return tiles * BAND_STEPS * pieces * TILE_SIZE; }
  int64_t interleaved_group() const { return band_steps(band) * SUMS * TILE_SIZE; }
  int64_t group_size() const { return tiles * SUMS * TILE * TILE; }
  int64_t sums_size() const { return groups * group_size(); }
};

Buffer<uint16_t> packed(const Matrices& X, const Shape& shape, int64_t pieces) {
  const int64_t size = shape.packed_size(pieces);
  Buffer<uint16_t> result(X.size() * size);
  parallel_ranges(X.size(), shape.steps, STEP * shape.columns, [&](int64_t index, int64_t begin, int64_t end) {
    pack(X[index], pieces, begin, end, result.get() + index * size);
  });
  return result;
}

void store_band(const float* Y, int64_t row, int64_t rows, const Matrix& out) {
  for (int64_t col = 0; col < out.cols; col += TILE)
    for (int64_t i = 0; i < rows; ++i)
      std::copy_n(Y + (col / TILE * BAND + i) * TILE, std::min(out.cols - col, TILE),
                  static_cast<float*>(out.data) + (row + i) * out.cols + col);
}

// The number of parts that the rows of each of `count` weights are split into, so that threads share the work evenly:
// none of fewer than 2^20 multiplications, which take as long as starting a thread.
int64_t parts_of(const Shape& shape, int64_t count) {
  const int64_t threads = torch::stable::get_num_threads(), work = shape.rows * shape.cols * shape.columns;
  return std::clamp<int64_t>(threads / std::gcd(threads, count), 1,
                             std::max<int64_t>(std::min(ceil_div(shape.rows, GROUP), work >> 20), 1));
}

// The first row of a part, a multiple of GROUP but for the end.
int64_t first_row(const Shape& shape, int64_t part, int64_t parts) {
  return std::min(ceil_div(shape.rows, GROUP) * part / parts * GROUP, shape.rows);
}

// Rows of W in one partial sum of Wᵀ·Y: with all rows in one sum, its rounding error grows with their number.
constexpr int64_t SUM_ROWS = 16 * BAND;

// total[0 : size] = the sum of what f(sum, row, rows) adds to it for the bands of rows [first, last), of `band` rows.
template <class F>
void sum_bands(float* total, int64_t size, int64_t first, int64_t last, int64_t band, const F& f) {
  std::fill_n(total, size, 0.0f);
  const Buffer<float> scratch(last - first > SUM_ROWS ? size : 0);
  for (int64_t begin = first; begin < last; begin += SUM_ROWS) {
    float* const sum = begin == first ? total : scratch.get();
    if (sum != total) std::fill_n(sum, size, 0.0f);
    const int64_t end = std::min(begin + SUM_ROWS, last);
    for (int64_t row = begin; row < end; row += band) f(sum, row, std::min(end - row, band));
    if (sum != total)
      for (int64_t i = 0; i < size; ++i) total[i] += sum[i];
  }
}

}  // namespace

bool suits(const Matrix& weight) {
  return weight.dtype == Dtype::bf16 && uses_amx();
}

bool multiply_rows(const Matrices& weights, const Matrices& X, int64_t pieces, const Matrices& out) {
  const Shape shape(weights[0], out[0].cols);
  const float size = largest(X);
  if (!in_range(size, 0.0f)) return false;
  const Buffer<uint16_t> panels = packed(X, shape, pieces);
  const int64_t count = weights.size(), parts = parts_of(shape, count);
  parallel_ranges(count * parts, 1, shape.rows * shape.cols * shape.columns / parts,
                  [&](int64_t item, int64_t, int64_t) {
                    const int64_t index = item / parts, part = item % parts;
                    const Session session;
                    const Buffer<float> Y(shape.band_size());
                    const int64_t end = first_row(shape, part + 1, parts);
                    for (int64_t row = first_row(shape, part, parts); row < end; row += BAND) {
                      const int64_t rows = std::min(end - row, BAND);
                      multiply(weights[index], row, rows, panels.get() + index * shape.packed_size(pieces), pieces,
                               shape.tiles, Y.get());
                      store_band(Y.get(), row, rows, out[index]);
                    }
                  });
  return in_range(largest(out), size);
}

bool multiply_columns(const Matrices& weights, const Matrices& Y, int64_t pieces, const Matrices& out) {
  const Shape shape(weights[0], out[0].cols);
  const float size = largest(Y);
  if (!in_range(size, 0.0f)) return false;
  const int64_t count = weights.size(), work = GROUP * shape.rows * shape.columns;
  const Buffer<float> Z(count * shape.sums_size());
  parallel_ranges(count, shape.groups, work, [&](int64_t index, int64_t begin, int64_t end) {
    const Session session;
    const int64_t offset = begin * shape.group_size();
    float* const sums = Z.get() + index * shape.sums_size();
    const Buffer<float> band(shape.band_size());
    const Buffer<uint16_t> packed(shape.packed_band_size(pieces));
    const Buffer<uint16_t> V((end - begin) * shape.interleaved_group());
    sum_bands(sums + offset, end * shape.group_size() - offset, 0, shape.rows, shape.band,
              [&](float* sum, int64_t row, int64_t rows) {
                load_band(Y[index], row, rows, band.get());
                pack_band(band.get(), rows, pieces, shape.tiles, packed.get());
                interleave(weights[index], row, rows, begin, end, V.get());
                multiply_adjoint(V.get(), rows, end - begin, packed.get(), pieces, shape.tiles, sum);
              });
    unpack(sums, begin, end, shape.tiles, out[index]);
  });
  return in_range(largest(out), size);
}

bool multiply_normal(const Matrices& weights, const Matrices& X, int64_t pieces, const Matrices& Y, const Matrices& Z) {
  const Shape shape(weights[0], Y[0].cols);
  const float size = largest(X);
  if (!in_range(size, 0.0f)) return false;
  const Buffer<uint16_t> panels = packed(X, shape, pieces);
  const int64_t count = weights.size(), parts = parts_of(shape, count), sums_size = shape.sums_size();
  const Buffer<float> sums(count * parts * sums_size);
  parallel_ranges(
      count * parts, 1, 2 * shape.rows * shape.cols * shape.columns / parts, [&](int64_t item, int64_t, int64_t) {
        const int64_t index = item / parts, part = item % parts;
        const Session session;
        const Buffer<float> band(shape.band_size());
        const Buffer<uint16_t> packed(shape.packed_band_size(pieces));
        const Buffer<uint16_t> V(shape.interleaved_group());  // of one group, which stays in L1
        const uint16_t* const panel = panels.get() + index * shape.packed_size(pieces);
        sum_bands(sums.get() + item * sums_size, sums_size, first_row(shape, part, parts),
                  first_row(shape, part + 1, parts), shape.band, [&](float* sum, int64_t row, int64_t rows) {
                    multiply(weights[index], row, rows, panel, pieces, shape.tiles, band.get());
                    store_band(band.get(), row, rows, Y[index]);
                    pack_band(band.get(), rows, pieces, shape.tiles, packed.get());
                    for (int64_t group = 0; group < shape.groups; ++group) {
                      interleave(weights[index], row, rows, group, group + 1, V.get());
                      multiply_adjoint(V.get(), rows, 1, packed.get(), pieces, shape.tiles, sum + group * shape.group_size());
                    }
                  });
      });
  const int64_t group = shape.group_size();
  parallel_ranges(count, shape.groups, group * parts, [&](int64_t index, int64_t begin, int64_t end) {
    float* const total = sums.get() + index * parts * sums_size;
    for (int64_t part = 1; part < parts; ++part) {
      const float* const other = total + part * sums_size;
      for (int64_t i = begin * group; i < end * group; ++i) total[i] += other[i];
    }
    unpack(total, begin, end, shape.tiles, Z[index]);
  });
  const float middle = largest(Y);
  return in_range(middle, size) && in_range(largest(Z), middle);
}

bool multiply_gram(const Matrices& weights, bool of_rows, const Matrices& out) {
  const Shape shape(of_rows ? weights[0].transposed() : weights[0], 0);
  const int64_t count = weights.size(), groups = shape.groups, unit = GROUP * GROUP * SUMS;
  const auto offset = [](int64_t group) { return group * (group + 1) / 2 * SUMS * SUMS * TILE * TILE; };
  const Buffer<float> Z(count * offset(groups));
  const auto compute = [&](int64_t index, int64_t first, int64_t last) {
    const Matrix& W = weights[index];
    float* const sums = Z.get() + index * offset(groups);
    const Buffer<uint16_t> V(last * shape.interleaved_group()), packed(last * SUMS * BAND_STEPS * TILE_SIZE);
    sum_bands(sums + offset(first), offset(last) - offset(first), 0, shape.rows, shape.band,
              [&](float* sum, int64_t row, int64_t rows) {
                if (of_rows) {
                  pack_columns(W, row, rows, last, V.get(), packed.get());
                } else {
                  interleave(W, row, rows, 0, last, V.get());
                  transpose_band(V.get(), rows, last, packed.get());
                }
                for (int64_t group = first; group < last; ++group)
                  multiply_adjoint(V.get() + group * band_steps(rows) * SUMS * TILE_SIZE, rows, 1, packed.get(), 1,
                                   (group + 1) * SUMS, sum + offset(group) - offset(first));
              });
    for (int64_t group = first; group < last; ++group)
      unpack_symmetric(sums + offset(group), group, of_rows, out[index]);
  };
  // A group is multiplied by itself and by those before it. The first and the last are together as much work as the
  // second and the last but one.
  parallel_ranges(count, ceil_div(groups, 2), unit * shape.rows * groups, [&](int64_t index, int64_t begin, int64_t end) {
    const Session session;
    compute(index, begin, end);
    if (groups - begin > end) compute(index, std::max(end, groups - end), groups - begin);
  });
  return in_range(largest(out), 0.0f);
}

bool subtract(const Matrix& W, const Matrix& left, const Matrix& right, float scaling) {
  if (W.dtype != Dtype::bf16 || left.cols == 0 || left.col_stride > INT32_MAX / 16) return false;
  const Range ranges[] = {range_of(left), range_of(right)};
  const float products = ranges[0].largest * ranges[1].largest * left.cols;
  // what tiles flush to zero is less than float32's round-off of the other products
  const bool exact = ranges[0].is_bf16 && ranges[1].is_bf16 && ranges[0].smallest * ranges[1].smallest > SMALLEST;
  if (!exact || !(products < LARGEST)) return false;
  const int64_t rank = left.cols, steps = steps_of(rank), blocks = ceil_div(W.rows, SUBTRACT_ROWS);
  const Buffer<uint16_t> packed(tiles_of(W.cols) * steps * TILE_SIZE);
  pack(right, 1, 0, steps, packed.get());
  parallel_ranges(1, blocks, SUBTRACT_ROWS * W.cols * rank, [&](int64_t, int64_t begin, int64_t end) {
    const Session session;
    const Buffer<uint16_t> rows_of_left(2 * steps * TILE_SIZE);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * SUBTRACT_ROWS, rows = std::min(W.rows - row, SUBTRACT_ROWS);
      pack_rows(left, row, rows, rows_of_left.get());
      subtract_rows(W, row, rows, rows_of_left.get(), packed.get(), rank, scaling);
    }
  });
  return true;
}

}  // namespace pissa::cpu::amx
