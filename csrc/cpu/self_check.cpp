// The kernels of an instruction set against the generic ones, on small matrices.
#include "self_check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../matrix.h"
#include "amx.h"
#include "panels.h"

namespace pissa::cpu {

extern const Kernels generic;

namespace {

// Largest difference from the generic kernels relative to the largest element: the sums have a few hundred terms.
constexpr float TOLERANCE = 1e-5f;

// A weight and a panel whose sizes are no multiples of any tile's.
struct Sample {
  static constexpr int64_t ROWS = 29, COLS = 141, COLUMNS = 19;
  std::vector<float> weight = random(ROWS * COLS), X = random(COLS * COLUMNS), Y = random(ROWS * COLUMNS);
  std::vector<uint16_t> half = rounded(weight);

  // Numbers between −1 and 1, from a linear congruential generator.
  static std::vector<float> random(int64_t count) {
    std::vector<float> values(count);
    uint32_t state = 1;
    for (float& value : values) {
      state = state * 1664525u + 1013904223u;
      value = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
    }
    return values;
  }

  // Sixteen bits that are ordinary numbers both as bfloat16 and as float16.
  static std::vector<uint16_t> rounded(const std::vector<float>& values) {
    std::vector<uint16_t> halves;
    for (const float value : values) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      halves.push_back(static_cast<uint16_t>((bits >> 16 & 0x83ffu) | 0x3c00u));
    }
    return halves;
  }

  Matrix matrix(Dtype dtype) const {
    const void* const data = dtype == Dtype::f32 ? static_cast<const void*>(weight.data()) : half.data();
    return {const_cast<void*>(data), dtype, ROWS, COLS, COLS, 1};
  }
  static Matrix panel(const std::vector<float>& values, int64_t rows, int64_t columns) {
    return {const_cast<float*>(values.data()), Dtype::f32, rows, columns, COLUMNS, 1};
  }
};

typedef std::vector<float> Values;

// W·X and Wᵀ·Y by a table of kernels, as panels.
Values products(const Kernels& body, const Sample& sample, Dtype dtype, int64_t columns) {
  const Matrix W = sample.matrix(dtype);
  const int64_t padded_rows = ceil_div(W.rows, BLOCK_ROWS) * BLOCK_ROWS;
  const int64_t padded_cols = ceil_div(W.cols, BLOCK_COLS) * BLOCK_COLS;
  const Layout along_rows = layout_along_rows(W, columns);
  const Panels X(1, W.cols, columns, along_rows), Y(1, padded_rows, columns, Layout::tiles);
  const Panels left(1, W.rows, columns, Layout::tiles), Z(1, padded_cols, columns, along_rows);
  pack(Sample::panel(sample.X, W.cols, columns), X[0], 0, X[0].rows);
  pack(Sample::panel(sample.Y, W.rows, columns), left[0], 0, W.rows);
  clear(Y[0], 0, Y[0].rows);
  clear(Z[0], 0, Z[0].rows);
  for (int64_t row = 0; row < W.rows; row += BLOCK_ROWS) {
    const int64_t rows = std::min(W.rows - row, BLOCK_ROWS);
    const Panels block(1, BLOCK_ROWS, columns, Layout::tiles);
    clear(block[0], 0, BLOCK_ROWS);
    body.multiply(W, row, rows, 0, W.cols, X[0], block[0]);
    body.multiply_adjoint(W, row, rows, 0, W.cols, left[0], row, Z[0]);
    for_tile_rows(block[0], 0, rows, [&](int64_t i, int64_t column, const float* from, int64_t width, int64_t) {
      std::copy_n(from, width, Y[0].data + column * padded_rows + (row + i) * width);
    });
  }
  Values result(W.rows * columns + W.cols * columns);
  unpack(Y[0], 0, W.rows, {result.data(), Dtype::f32, W.rows, columns, columns, 1}, 0);
  unpack(Z[0], 0, W.cols, {result.data() + W.rows * columns, Dtype::f32, W.cols, columns, columns, 1}, 0);
  return result;
}

// What the other kernels compute of one weight.
Values others(const Kernels& body, const Sample& sample, Dtype dtype) {
  const Matrix W = sample.matrix(dtype);
  Values result(W.rows * W.cols);
  body.transpose_cast(W, {result.data(), Dtype::f32, W.cols, W.rows, W.rows, 1}, 0, W.cols);
  std::vector<double> sums(W.rows);
  body.sum_of_squares(W, 0, W.rows, sums.data());
  if (dtype == Dtype::f32) {
    constexpr int64_t block = 64, count = Sample::ROWS * Sample::COLS / 2 * 2, blocks = (count + block - 1) / block;
    Table table;
    for (int k = 0; k < MIDPOINTS; ++k) table.midpoints[k] = (k - 7) / 8.0f;
    for (int k = 0; k <= MIDPOINTS; ++k) table.codes[k] = static_cast<uint8_t>(k);
    std::vector<uint8_t> codes(count / 2);
    Values scales(blocks);
    body.quantize_blocks(sample.weight.data(), count, table, block, 0, blocks, codes.data(), scales.data());
    for (const uint8_t code : codes) result.push_back(code / 255.0f);
    result.insert(result.end(), scales.begin(), scales.end());
  }
  result.insert(result.end(), sums.begin(), sums.end());
  // the residual W − ½·L·R, in the weight's dtype and then widened by the transpose
  const int64_t bytes = W.rows * W.cols * (dtype == Dtype::f32 ? 4 : 2);
  std::vector<char> copy(bytes);
  std::memcpy(copy.data(), W.data, bytes);
  Matrix residual = W;
  residual.data = copy.data();
  Values workspace(body.subtract_workspace(Sample::COLUMNS));
  body.subtract_lowrank(residual, Sample::panel(sample.Y, W.rows, Sample::COLUMNS),
                        Sample::panel(sample.X, W.cols, Sample::COLUMNS).transposed(), 0.5f, 0, W.rows,
                        workspace.data());
  if (dtype == Dtype::f32) {
    const float* const values = reinterpret_cast<const float*>(copy.data());
    result.insert(result.end(), values, values + W.rows * W.cols);
  }
  return result;
}

bool agree(const Values& values, const Values& expected, float tolerance = TOLERANCE) {
  float largest = 0.0f, difference = 0.0f;
  for (size_t i = 0; i < values.size(); ++i) {
    largest = std::max(largest, std::fabs(expected[i]));
    const float error = std::fabs(values[i] - expected[i]);
    if (!(error <= difference)) difference = error;
    if (std::isnan(difference)) return false;
  }
  return difference <= tolerance * largest;
}

#if defined(PISSA_X86)
float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// W·X and Wᵀ·Y on tiles, in three pieces.
bool tiles_multiply() {
  const Sample sample;
  const Matrix W = sample.matrix(Dtype::bf16);
  constexpr int64_t columns = Sample::COLUMNS, pieces = 3, tiles = amx::tiles_of(columns);
  Values result(W.rows * columns + W.cols * columns), band(2 * tiles * amx::BAND * amx::TILE);
  std::vector<uint16_t> X(tiles * amx::steps_of(W.cols) * pieces * amx::TILE_SIZE);
  std::vector<uint16_t> Y(tiles * amx::BAND_STEPS * pieces * amx::TILE_SIZE);
  Values Z(amx::groups_of(W.cols) * tiles * amx::SUMS * amx::TILE * amx::TILE);
  alignas(64) uint16_t V[amx::groups_of(Sample::COLS) * amx::band_steps(Sample::ROWS) * amx::SUMS * amx::TILE_SIZE];
  const amx::Session session;
  amx::pack(Sample::panel(sample.X, W.cols, columns), pieces, 0, amx::steps_of(W.cols), X.data());
  amx::multiply(W, 0, W.rows, X.data(), pieces, tiles, band.data());
  for (int64_t i = 0; i < W.rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      result[i * columns + j] = band[(j / amx::TILE * amx::BAND + i) * amx::TILE + j % amx::TILE];
  amx::load_band(Sample::panel(sample.Y, W.rows, columns), 0, W.rows, band.data());
  amx::interleave(W, 0, W.rows, 0, amx::groups_of(W.cols), V);
  amx::pack_band(band.data(), W.rows, pieces, tiles, Y.data());
  amx::multiply_adjoint(V, W.rows, amx::groups_of(W.cols), Y.data(), pieces, tiles, Z.data());
  amx::unpack(Z.data(), 0, amx::groups_of(W.cols), tiles,
              {result.data() + W.rows * columns, Dtype::f32, W.cols, columns, columns, 1});
  return agree(result, products(generic, sample, Dtype::bf16, columns));
}

// The Gram matrix of a bfloat16 weight on tiles, by both ways to its operands: WᵀW, and (Wᵀ)(Wᵀ)ᵀ.
bool tiles_square() {
  const Sample sample;
  const Matrix W = sample.matrix(Dtype::bf16);
  constexpr int64_t n = Sample::COLS, groups = amx::groups_of(n), tile = amx::TILE * amx::TILE;
  constexpr int64_t group_size = amx::band_steps(Sample::ROWS) * amx::SUMS * amx::TILE_SIZE;
  Values wide(W.rows * n), expected(n * n);
  for (int64_t i = 0; i < W.rows * n; ++i) wide[i] = widened(sample.half[i]);
  std::vector<uint16_t> stored(n * W.rows);  // Wᵀ
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < W.rows; ++k) stored[i * W.rows + k] = sample.half[k * n + i];
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k < W.rows; ++k) expected[i * n + j] += wide[k * n + i] * wide[k * n + j];
  }
  alignas(64) uint16_t V[groups * group_size];
  std::vector<uint16_t> packed(groups * amx::SUMS * amx::BAND_STEPS * amx::TILE_SIZE);
  const amx::Session session;
  for (const bool ordered : {false, true}) {
    if (ordered) {
      amx::pack_columns({stored.data(), Dtype::bf16, n, W.rows, W.rows, 1}, 0, W.rows, groups, V, packed.data());
    } else {
      amx::interleave(W, 0, W.rows, 0, groups, V);
      amx::transpose_band(V, W.rows, groups, packed.data());
    }
    Values result(n * n);
    for (int64_t group = 0; group < groups; ++group) {
      Values sums((group + 1) * amx::SUMS * amx::SUMS * tile);
      amx::multiply_adjoint(V + group * group_size, W.rows, 1, packed.data(), 1, (group + 1) * amx::SUMS, sums.data());
      amx::unpack_symmetric(sums.data(), group, ordered, {result.data(), Dtype::f32, n, n, n, 1});
    }
    if (!agree(result, expected)) return false;
  }
  return true;
}

// The residual W − ½·L·R of a bfloat16 weight on tiles, for factors that bfloat16 holds: equal but for its roundoff.
bool tiles_subtract() {
  const Sample sample;
  constexpr int64_t rank = Sample::COLUMNS, steps = amx::steps_of(rank);
  static_assert(Sample::ROWS <= amx::SUBTRACT_ROWS, "one block of rows");
  Values left = sample.Y, right = sample.X;
  for (Values* values : {&left, &right}) {
    for (float& value : *values) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      bits &= 0xffff0000u;
      std::memcpy(&value, &bits, sizeof(bits));
    }
  }
  const Matrix L = Sample::panel(left, Sample::ROWS, rank), R = Sample::panel(right, Sample::COLS, rank).transposed();
  Values results[2];
  for (const bool tiles : {false, true}) {
    std::vector<uint16_t> copy = sample.half;
    Matrix residual = sample.matrix(Dtype::bf16);
    residual.data = copy.data();
    if (tiles) {
      std::vector<uint16_t> rows(2 * steps * amx::TILE_SIZE), columns(amx::tiles_of(R.cols) * steps * amx::TILE_SIZE);
      const amx::Session session;
      amx::pack(R, 1, 0, steps, columns.data());
      amx::pack_rows(L, 0, L.rows, rows.data());
      amx::subtract_rows(residual, 0, L.rows, rows.data(), columns.data(), rank, 0.5f);
    } else {
      Values workspace(generic.subtract_workspace(rank));
      generic.subtract_lowrank(residual, L, R, 0.5f, 0, L.rows, workspace.data());
    }
    for (const uint16_t half : copy) results[tiles].push_back(widened(half));
  }
  return agree(results[1], results[0], 0x1p-7f);
}
#endif

}  // namespace

bool kernels_agree(const Kernels& body) {
  const Sample sample;
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    for (const int64_t columns : {int64_t{4}, int64_t{5}, Sample::COLUMNS})
      if (!agree(products(body, sample, dtype, columns), products(generic, sample, dtype, columns))) return false;
    if (!agree(others(body, sample, dtype), others(generic, sample, dtype))) return false;
  }
  return true;
}

#if defined(PISSA_X86)
bool tiles_agree() { return tiles_multiply() && tiles_square() && tiles_subtract(); }
#endif

}  // namespace pissa::cpu
