// Matrices and panels that are indexed by element, and sums with a bound on their error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../../csrc/cpu/kernels.h"

namespace pissa::cpu {

inline std::mt19937 random_bits(0);

inline float random_float() { return std::ldexp(float(random_bits() % 65536) - 32767.5f, -15); }

// The storage types, bit by bit.
struct Format {
  Dtype dtype;
  const char* name;
  int mantissa, exponent;  // bits

  int bytes() const { return (1 + exponent + mantissa) / 8; }
  int bias() const { return (1 << (exponent - 1)) - 1; }
  double decode(uint32_t bits) const {
    const uint32_t fraction = bits & ((1u << mantissa) - 1), power = bits >> mantissa & ((1u << exponent) - 1);
    double value = std::ldexp(double(fraction + (power ? 1u << mantissa : 0)), int(power ? power : 1) - bias() - mantissa);
    if (power == (1u << exponent) - 1) value = fraction ? NAN : INFINITY;
    return bits >> (mantissa + exponent) & 1 ? -value : value;
  }
  // The nearest value, ties to even; Inf from half a step above the largest finite one.
  double round(double value) const {
    if (!std::isfinite(value) || value == 0) return value;
    const double step = std::ldexp(1.0, std::max(std::ilogb(value), 1 - bias()) - mantissa);
    const double rounded = std::nearbyint(value / step) * step;
    return std::fabs(rounded) < std::ldexp(1.0, bias() + 1) ? rounded : std::copysign(INFINITY, value);
  }
};

inline const Format FORMATS[] = {{Dtype::f32, "f32", 23, 8}, {Dtype::f16, "f16", 10, 5}, {Dtype::bf16, "bf16", 7, 8}};
inline const Format& F32 = FORMATS[0];

// A matrix with unused elements between its rows (or columns), which are NaN: a sum that has one is wrong.
struct Stored {
  Format format;
  int64_t rows, cols, row_stride, col_stride;
  std::vector<unsigned char> data;

  Stored(const Format& format, int64_t rows, int64_t cols, bool column_major = false, int64_t unused = 3)
      : format(format), rows(rows), cols(cols) {
    const int64_t pitch = (column_major ? rows : cols) + unused;
    row_stride = column_major ? 1 : pitch;
    col_stride = column_major ? pitch : 1;
    data.assign((column_major ? cols : rows) * pitch * format.bytes(), 0xff);
  }
  Matrix matrix() { return {data.data(), format.dtype, rows, cols, row_stride, col_stride}; }
  unsigned char* address(int64_t i, int64_t j) {
    return data.data() + (i * row_stride + j * col_stride) * format.bytes();
  }
  void set(int64_t i, int64_t j, uint32_t bits) { std::memcpy(address(i, j), &bits, format.bytes()); }
  double at(int64_t i, int64_t j) {
    uint32_t bits = 0;
    std::memcpy(&bits, address(i, j), format.bytes());
    return format.decode(bits);
  }
  template <class F>
  Stored& fill(const F& bits) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) set(i, j, bits(i, j));
    return *this;
  }
  // of either sign, with magnitudes from 1/8 to 2
  Stored& fill_random() {
    return fill([&](int64_t, int64_t) {
      const uint32_t power = format.bias() - 3 + random_bits() % 4, fraction = random_bits() % (1u << format.mantissa);
      return (random_bits() & 1) << (format.exponent + format.mantissa) | power << format.mantissa | fraction;
    });
  }
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A packed panel of `used` columns that is indexed by row and column, as kernels.h defines the layouts.
struct Packed {
  struct alignas(64) Line {
    float floats[16];
  };
  int64_t rows, columns, used;
  Layout layout;
  std::vector<Line> data;

  Packed(int64_t rows, int64_t used, Layout layout)
      : rows(rows), columns(round_up(used, 8)), used(used), layout(layout), data((rows * columns + 15) / 16) {}
  Panel panel() { return {data.data()->floats, rows, columns, layout, used}; }
  float& at(int64_t row, int64_t column) {
    const int64_t tile = column / TILE * TILE, width = std::min(columns - tile, TILE);
    int64_t offset = tile * rows + row * width + column - tile;
    if (layout == Layout::transposed) offset = row / 8 * 64 + column * 8 + row % 8;
    if (layout == Layout::deinterleaved) offset = row / 16 * 128 + row % 2 * 64 + column * 8 + row % 16 / 2;
    return data[offset / 16].floats[offset % 16];
  }
  Packed& fill_random(int64_t filled) {
    for (int64_t i = 0; i < filled; ++i)
      for (int64_t j = 0; j < columns; ++j) at(i, j) = random_float();
    return *this;
  }
};

inline Layout along_rows(const Format& format, int64_t columns) {
  if (columns > HALF_TILE) return Layout::tiles;
  return format.dtype == Dtype::bf16 ? Layout::deinterleaved : Layout::transposed;
}

// A sum in double precision, and the bound on the error of any float32 summation of the same terms, in any order.
struct Sum {
  double value = 0, magnitude = 0;
  int64_t terms = 0;

  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
    ++terms;
  }
  double bound() const { return std::ldexp(double(terms + 2) * magnitude, -24); }
};

}  // namespace pissa::cpu
