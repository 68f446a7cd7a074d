// Holds the kernels of one instruction set against loops in double precision. Needs no torch, so that it can be compiled
// for another processor and run in an emulator:
//
//   aarch64-linux-gnu-g++ -O3 -std=c++17 -Wno-psabi -static -DPISSA_ISA=generic csrc/cpu/kernels.cpp
//       tests/ops/csrc_kernels/main.cpp -o kernels && qemu-aarch64 kernels
//
// Prints a line for each kernel. Exits with 1 at the first element that is outside of its bound.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "matrices.h"

namespace pissa::cpu {

extern const Kernels PISSA_ISA;

namespace {

const Kernels& tested = PISSA_ISA;

// What has been compared of one kernel.
struct Results {
  const char* kernel;
  int64_t elements = 0;
  double worst = 0;

  ~Results() {
    std::printf("%s %s: %lld elements", tested.name, kernel, static_cast<long long>(elements));
    if (worst > 0) std::printf(", errors up to %.3f of the bound", worst);
    std::printf("\n");
  }
  void expect(bool right, double got, double wanted, const Format& format, int64_t row, int64_t column) {
    ++elements;
    if (right) return;
    std::printf("%s %s, %s: row %lld, column %lld is %.9g, expected %.9g\n", tested.name, kernel, format.name,
                static_cast<long long>(row), static_cast<long long>(column), got, wanted);
    std::exit(1);
  }
  void compare(double got, const Sum& sum, const Format& format, int64_t row, int64_t column) {
    const double error = std::fabs(got - sum.value);
    expect(error <= sum.bound(), got, sum.value, format, row, column);
    if (error > 0) worst = std::max(worst, error / sum.bound());
  }
};

void same(Results& results, double got, double wanted, const Format& format, int64_t row, int64_t column) {
  const bool equal = std::isnan(wanted) ? std::isnan(got) : got == wanted && std::signbit(got) == std::signbit(wanted);
  results.expect(equal, got, wanted, format, row, column);
}

void transpose_cast(Results& results, const Format& to, Stored& W, int64_t begin, int64_t end) {
  Stored out(to, W.cols, W.rows, false, 0);
  tested.transpose_cast(W.matrix(), out.matrix(), begin, end);
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t j = 0; j < out.cols; ++j)
      same(results, out.at(i, j), i >= begin && i < end ? to.round(W.at(j, i)) : NAN, to, i, j);
}

void test_transpose_cast() {
  Results results{"transpose_cast"};
  const int64_t shapes[][2] = {{1, 1}, {7, 9}, {40, 16}, {33, 70}, {5, 300}};
  for (const Format& from : FORMATS) {
    for (const Format& to : FORMATS) {
      for (bool column_major : {false, true}) {
        for (const auto& [m, n] : shapes) {
          // any bits: also NaN, Inf and subnormal numbers
          Stored W = Stored(from, m, n, column_major).fill([](int64_t, int64_t) { return random_bits(); });
          transpose_cast(results, to, W, 0, n);
          transpose_cast(results, to, W, n / 3, n - n / 4);
        }
      }
      if (from.bytes() == 2) {
        Stored all = Stored(from, 256, 256).fill([](int64_t i, int64_t j) { return i * 256 + j; });
        transpose_cast(results, to, all, 0, 256);
      }
    }
  }
  // float32 values around those of the 16-bit types, and halfway between them
  for (const Format& to : FORMATS) {
    const int dropped = 23 - to.mantissa;
    Stored near = Stored(F32, 3, 512).fill([&](int64_t i, int64_t j) {
      return uint32_t(j) << 23 | (random_bits() & 0x7fffff) >> dropped << dropped | ((1u << dropped) / 2 + i - 1);
    });
    transpose_cast(results, to, near, 0, 512);
  }
}

void test_subtract_lowrank() {
  Results results{"subtract_lowrank"};
  const int64_t shapes[][3] = {{1, 1, 1}, {5, 7, 3}, {13, 40, 16}, {20, 301, 130}, {6, 150, 520}};
  const float scaling = 0.75f;
  for (const Format& format : FORMATS) {
    for (const auto& [m, n, rank] : shapes) {
      for (bool column_major : {false, true}) {
        Stored W = Stored(format, m, n).fill_random(), before = W;
        Stored left = Stored(F32, m, rank, column_major).fill_random();
        Stored right = Stored(F32, rank, n, column_major).fill_random();
        std::vector<float> workspace(tested.subtract_workspace(rank), NAN);
        const int64_t begin = m / 4, end = m;
        tested.subtract_lowrank(W.matrix(), left.matrix(), right.matrix(), scaling, begin, end, workspace.data());
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < n + 3; ++j) {  // with the unused elements
            if (i < begin || j >= n) {
              same(results, W.at(i, j), before.at(i, j), format, i, j);
              continue;
            }
            Sum sum;
            sum.add(before.at(i, j));
            for (int64_t k = 0; k < rank; ++k) sum.add(-scaling * left.at(i, k) * right.at(k, j));
            const double low = format.round(sum.value - sum.bound()), high = format.round(sum.value + sum.bound());
            results.expect(low <= W.at(i, j) && W.at(i, j) <= high, W.at(i, j), sum.value, format, i, j);
          }
        }
      }
    }
  }
}

void test_multiply() {
  Results results{"multiply"};
  const int64_t cases[][4] = {{1, 1, 0, 1}, {5, 31, 0, 31}, {12, 100, 32, 100}, {23, 190, 0, 64}, {24, 701, 128, 701}};
  for (const Format& format : FORMATS) {
    for (int64_t columns : {4, 8, 16, 24, 40}) {
      for (const auto& [rows, n, begin, end] : cases) {
        Stored W = Stored(format, rows + 2, n).fill_random();
        const Layout layout = along_rows(format, columns);
        Packed X = Packed(layout == Layout::tiles ? n : round_up(n, 32), columns, layout).fill_random(n);
        const int64_t padded = round_up(rows, STRIP_ROWS);
        Packed Y = Packed(padded, columns, Layout::tiles).fill_random(padded);
        std::vector<Sum> sums(rows * columns);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t c = 0; c < columns; ++c) {
            Sum& sum = sums[i * columns + c];
            sum.add(Y.at(i, c));
            for (int64_t j = begin; j < end; ++j) sum.add(W.at(i + 2, j) * X.at(j, c));
          }
        }
        tested.multiply(W.matrix(), 2, rows, begin, end, X.panel(), Y.panel());
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t c = 0; c < columns; ++c) results.compare(Y.at(i, c), sums[i * columns + c], format, i, c);
      }
    }
  }
}

void test_multiply_adjoint() {
  Results results{"multiply_adjoint"};
  const int64_t cases[][4] = {{1, 1, 0, 0}, {7, 31, 0, 5}, {12, 100, 96, 0}, {23, 190, 0, 2}, {24, 701, 192, 24}};
  for (const Format& format : FORMATS) {
    for (int64_t columns : {4, 8, 16, 24, 40}) {
      for (const auto& [rows, n, begin, Y_row] : cases) {
        Stored W = Stored(format, rows + 2, n).fill_random();
        Packed Y = Packed(Y_row + rows, columns, Layout::tiles).fill_random(Y_row + rows);
        const int64_t padded = round_up(n, BLOCK_COLS);
        Packed Z = Packed(padded, columns, along_rows(format, columns)).fill_random(padded);
        std::vector<Sum> sums(n * columns);
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t c = 0; c < columns; ++c) {
            Sum& sum = sums[j * columns + c];
            sum.add(Z.at(j, c));
            for (int64_t i = 0; i < rows && j >= begin; ++i) sum.add(W.at(i + 2, j) * Y.at(Y_row + i, c));
          }
        }
        tested.multiply_adjoint(W.matrix(), 2, rows, begin, n, Y.panel(), Y_row, Z.panel());
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t c = 0; c < columns; ++c) {
            const Sum& sum = sums[j * columns + c];
            if (j < begin) same(results, Z.at(j, c), sum.value, format, j, c);
            if (j >= begin) results.compare(Z.at(j, c), sum, format, j, c);
          }
        }
      }
    }
  }
}

void test_sum_of_squares() {
  Results results{"sum_of_squares"};
  for (const Format& format : FORMATS) {
    for (int64_t n : {1, 7, 31, 32, 77, 1000}) {
      Stored W = Stored(format, 5, n).fill_random();
      std::vector<double> sums(5, -1.0);
      tested.sum_of_squares(W.matrix(), 1, 4, sums.data());
      for (int64_t i = 0; i < 5; ++i) {
        Sum sum;
        for (int64_t j = 0; j < n; ++j) sum.add(W.at(i, j) * W.at(i, j));
        if (i == 0 || i == 4) same(results, sums[i], -1.0, format, i, 0);
        if (i > 0 && i < 4) results.compare(sums[i], sum, format, i, 0);
      }
    }
  }
}

void test_quantize_blocks() {
  Results results{"quantize_blocks"};
  Table table;
  for (int k = 0; k < MIDPOINTS; ++k) table.midpoints[k] = 0.13f * (k - 7) + 0.01f;
  for (int k = 0; k <= MIDPOINTS; ++k) table.codes[k] = static_cast<uint8_t>((7 * k + 3) % 16);
  for (int64_t block : {32, 64, 96}) {
    for (int64_t count : {int64_t{34}, 4 * block, 5 * block + 6}) {
      const int64_t blocks = (count + block - 1) / block, begin = blocks > 2 ? 1 : 0;
      std::vector<float> values(count);
      for (int64_t i = 0; i < count; ++i) values[i] = i / block == 2 ? 0.0f : std::ldexp(random_float(), 30 - i % 60);
      std::vector<uint8_t> codes(count / 2, 0xee);
      std::vector<float> scales(blocks, -1.0f);
      tested.quantize_blocks(values.data(), count, table, block, begin, blocks, codes.data(), scales.data());
      for (int64_t i = 0; i < count; ++i) {
        const int64_t index = i / block, first = index * block, last = std::min(count, first + block);
        float largest = 0.0f;
        for (int64_t j = first; j < last; ++j) largest = std::max(largest, std::fabs(values[j]));
        const float divisor = std::max(largest, 1e-38f);
        const bool whole = last - first == block;
        const volatile float inverse = 1.0f / divisor;
        const volatile float scaled = whole ? values[i] * inverse : values[i] / divisor;
        const float inside = std::min(1.0f, std::max(-1.0f, float(scaled)));
        int below = 0;
        for (int k = 0; k < MIDPOINTS; ++k) below += inside > table.midpoints[k];
        const int code = codes[i / 2] >> (i % 2 ? 0 : 4) & 15;
        same(results, code, index < begin ? 0xe : table.codes[below], F32, index, i);
        if (i == first) same(results, scales[index], index < begin ? -1.0f : whole ? largest : divisor, F32, index, -1);
      }
    }
  }
}

void test_panels_of_eight() {
  Results gram_results{"gram"}, transform_results{"transform"};
  for (int64_t rows : {32, 96, 1056}) {
    Packed P = Packed(rows, 8, Layout::transposed).fill_random(rows);
    std::vector<double> gram(64, NAN);
    tested.gram(P.panel(), gram.data());
    for (int64_t i = 0; i < 8; ++i) {
      for (int64_t j = 0; j < 8; ++j) {
        Sum sum;
        for (int64_t row = 0; row < rows; ++row) sum.add(double(P.at(row, i)) * P.at(row, j));
        gram_results.compare(gram[i * 8 + j], sum, F32, i, j);
      }
    }
    float M[64] = {};
    for (int64_t i = 0; i < 8; ++i)
      for (int64_t j = i; j < 8; ++j) M[i * 8 + j] = random_float();
    std::vector<Sum> sums(rows * 8);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < 8; ++j)
        for (int64_t i = 0; i <= j; ++i) sums[row * 8 + j].add(double(P.at(row, i)) * M[i * 8 + j]);
    tested.transform(P.panel(), M);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < 8; ++j) transform_results.compare(P.at(row, j), sums[row * 8 + j], F32, row, j);
  }
}

}  // namespace
}  // namespace pissa::cpu

int main() {
  using namespace pissa::cpu;
  test_transpose_cast();
  test_subtract_lowrank();
  test_multiply();
  test_multiply_adjoint();
  test_sum_of_squares();
  test_quantize_blocks();
  test_panels_of_eight();
}
