// The operators chebyshev_filter and chebyshev for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "../tensors.h"
#include "aten.h"
#include "panels.h"
#include "products.h"
#include "ritz.h"

namespace pissa::cpu {
namespace {

using torch::stable::Tensor;

// out = a·product − b·current − c·previous, elementwise. `out` may be `product`.
void combine(const Tensor& out, float a, const Tensor& product, float b, const Tensor& current, float c,
             const Tensor& previous) {
  float* const to = static_cast<float*>(out.data_ptr());
  const auto* const x = static_cast<const float*>(product.data_ptr());
  const auto* const y = static_cast<const float*>(current.data_ptr());
  const auto* const z = static_cast<const float*>(previous.data_ptr());
  const int64_t columns = out.size(1);
  parallel_ranges(1, out.size(0), columns, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin * columns; i < end * columns; ++i) to[i] = a * x[i] - b * y[i] - c * z[i];
  });
}

// T_degree(2H/edge − 1)·X by the three-term recurrence, for H = AᵀA of a weight A, or for H itself if `gram`.
Tensor chebyshev_filter(const Tensor& weight, const Tensor& X, const Tensor& HX, double edge, int64_t degree,
                        int64_t pieces, bool gram) {
  STD_TORCH_CHECK(weight.dim() == 2 && X.dim() == 2, "pissa_kernels: expected a weight (m, n) and a panel (n, b)");
  const Matrix image = float_matrix(HX, weight.size(1), X.size(1));
  float_matrix(X, image.rows, image.cols);
  STD_TORCH_CHECK(!gram || (weight.size(0) == image.rows && dtype_of(weight.scalar_type()) == Dtype::f32),
                  "pissa_kernels: expected a square float32 matrix");
  Tensor previous = torch::stable::contiguous(X), current = torch::stable::new_empty(X, {image.rows, image.cols});
  combine(current, static_cast<float>(2 / edge), torch::stable::contiguous(HX), 1.0f, previous, 0.0f, previous);
  for (int64_t left = degree - 2; left >= 0; --left) {
    // the products that follow damp the rounding errors of this one
    const int64_t split = left > 0 ? std::max<int64_t>(pieces - 1, 1) : pieces;
    Tensor next = gram ? aten::mm(weight, current) : std::get<1>(normal(weight, current, split));
    combine(next, static_cast<float>(4 / edge), next, 2.0f, current, 1.0f, previous);
    previous = current;
    current = next;
  }
  return current;
}

// Defined and explained in pissa_kernels/svd/chebyshev.py and stopping.py, whose functions the next ones repeat.
constexpr double MAX_SPREAD = 1e4, MAX_SPREAD_LATER = 1e6, RISE = 0.2, MARGIN = 1.0, MIN_MARGIN = 0.5;
constexpr double ROUGH_DEFICIT = 1e-3, MIN_EDGE = 1e-6;
constexpr int64_t MAX_DEGREE = 16, FIRST_DEGREE = 4, LATER_DEGREE = 2, GUARD_VECTORS = 8;

// Estimated energy deficit of `rank` Ritz values with residuals, whose gap is measured to `edge`.
template <class Value, class Residual>
double estimated_deficit(int64_t rank, const Value& value, const Residual& residual, double edge) {
  double errors = 0.0, total = 0.0;
  for (int64_t i = 0; i < rank; ++i) {
    const double theta = value(i), length = residual(i), gap = std::max(theta - edge, 0.0) + length;
    if (gap != 0.0) errors += length * length / gap;
    if (theta > 0.0) total += theta;
  }
  return total > 0.0 ? errors / total : 0.0;
}

double growth(double value, double edge) { return std::acosh(std::max(2.0 * value / edge - 1.0, 1.0)); }

double log_cosh(double x) { return x + std::log1p(std::exp(-2.0 * x)) - std::log(2.0); }

struct Filter {
  int64_t degree;
  bool sufficient, rough;
};

Filter next_filter(double deficit, double edge, double last, double first, double tol, bool first_round,
                   double largest) {
  const int64_t least = first_round ? FIRST_DEGREE : LATER_DEGREE;
  if (!(deficit > tol && edge > 0.0)) return {std::max<int64_t>(2, least), true, false};
  const double wanted = growth(last, edge), risen = edge * std::pow(std::max(last / edge, 1.0), RISE);
  const double unwanted = first_round ? 0.0 : growth(risen, edge);
  const double needed = std::log(deficit / tol) / 2.0, spread = growth(first, edge) - wanted;
  const int64_t allowed =
      spread > 0.0 ? static_cast<int64_t>(std::min<double>(MAX_DEGREE, std::log(largest) / spread)) : MAX_DEGREE;
  const auto amplification = [&](int64_t degree) { return log_cosh(degree * wanted) - log_cosh(degree * unwanted); };
  int64_t degree = least;
  while (degree < allowed && amplification(degree) < needed + MARGIN) ++degree;
  if (degree >= allowed) degree = std::max<int64_t>(2, allowed);
  const bool sufficient = !first_round && amplification(degree) >= needed + MIN_MARGIN;
  return {degree, sufficient, deficit > ROUGH_DEFICIT && !sufficient};
}

// What chebyshev_subspaces() of pissa_kernels/svd/chebyshev.py and the evaluation of its subspaces do, in one call: threads
// that each solve a small weight otherwise wait for the interpreter's lock a third of the time. H = AᵀA where the
// iteration goes through it. The figures are those of triplets() and the number of products with A, and all NaN where a
// panel is not resolved or LAPACK fails.
std::tuple<Tensor, Tensor, Tensor> chebyshev(const Tensor& weight, const std::optional<Tensor>& H, const Tensor& start,
                                             int64_t rank, double tol, int64_t max_products) {
  STD_TORCH_CHECK(weight.dim() == 2, "pissa_kernels: expected a weight (m, n)");
  const int64_t block = float_matrix(start, H ? weight.size(1) : weight.size(0)).cols;
  STD_TORCH_CHECK(rank >= 1 && rank + GUARD_VECTORS <= block, "pissa_kernels: the block must have ", GUARD_VECTORS,
                  " columns more than the rank, got ", block);
  STD_TORCH_CHECK(std::isfinite(tol) && tol > 0.0, "pissa_kernels: tol must be positive");
  const bool gram = H.has_value();
  if (gram) float_matrix(*H, weight.size(1), weight.size(1));
  const Tensor& operand = gram ? *H : weight;
  int64_t products = 0, pieces = 2, passes = gram ? 0 : 1;
  const int64_t count = block + rank + 2;
  Tensor all_figures = torch::stable::new_empty(start, {count + 1});
  auto* const to = static_cast<float*>(all_figures.data_ptr());
  const auto result = [&](const Tensor& U, const Tensor& V, const Tensor& found) {
    std::copy_n(static_cast<const float*>(found.data_ptr()), count, to);
    to[count] = static_cast<float>(passes);
    return std::make_tuple(U, V, all_figures);
  };
  Tensor Z = gram ? aten::mm(*H, start) : rmatmul(weight, start, 3);
  for (bool first_round = true;; first_round = false) {
    const auto [X, HX, pairs] = ritz(operand, Z, rank, gram);
    products += 1;
    passes += gram ? 0 : 2;
    const auto* const values = static_cast<const float*>(pairs.data_ptr());
    const double smallest = values[0], last = values[block - rank], first = values[block - 1];
    const double deficit = estimated_deficit(
        rank, [&](int64_t i) { return values[block - rank + i]; }, [&](int64_t i) { return values[block + i]; },
        values[block - rank - GUARD_VECTORS]);
    if (std::isnan(deficit) || std::isnan(first)) {
      std::fill_n(to, count + 1, NAN);
      const auto unknown = [&](int64_t rows) {
        Tensor panel = torch::stable::new_empty(start, {rows, rank});
        return torch::stable::fill_(panel, NAN);
      };
      return {unknown(weight.size(0)), unknown(weight.size(1)), all_figures};
    }
    const auto evaluate = [&](const Tensor& panel) {
      auto found = triplets(weight, panel, rank, std::nullopt);
      passes += 2;
      const auto* const S = static_cast<const float*>(std::get<2>(found).data_ptr());
      const auto square = [S](int64_t i) { return static_cast<double>(S[i]) * S[i]; };
      const double remaining = estimated_deficit(
          rank, square, [&](int64_t i) { return static_cast<double>(S[i]) * S[block + i]; }, square(rank + GUARD_VECTORS - 1));
      return std::make_pair(std::move(found), remaining);
    };
    const bool met = deficit <= tol && (!first_round || smallest <= MIN_EDGE * first), ends = products >= max_products;
    if (met || ends) {
      const auto [found, remaining] = evaluate(X);
      const auto& [U, V, figures] = found;
      if (!(remaining > tol) || ends) return result(U, V, figures);
    }
    const double edge = std::max(smallest, MIN_EDGE * first);
    const double largest = !first_round && (gram || pieces == 3) ? MAX_SPREAD_LATER : MAX_SPREAD;
    const auto [degree, sufficient, rough] = next_filter(deficit, edge, last, first, tol, first_round, largest);
    Z = chebyshev_filter(operand, X, HX, edge > 0.0 ? edge : 1.0, degree, rough ? 1 : pieces, gram);
    passes += gram ? 0 : 2 * (degree - 1);
    if (sufficient) {
      const auto [found, remaining] = evaluate(Z);
      const auto& [U, V, figures] = found;
      if (!(remaining > tol)) return result(U, V, figures);
    }
    if (!rough) pieces = 3;
    products += degree - 1;
  }
}

}  // namespace
}  // namespace pissa::cpu

STABLE_TORCH_LIBRARY_IMPL(pissa_kernels, CPU, library) {
  library.impl("chebyshev_filter", TORCH_BOX(&pissa::cpu::chebyshev_filter));
  library.impl("chebyshev", TORCH_BOX(&pissa::cpu::chebyshev));
}
