// The statistics of whole rows from those of their pieces: fusedkd.kernels.pieces.merge, whose
// twenty small operations a block of a group's rows feels.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "tensors.h"

namespace fusedkd {
namespace {

using Field = double Statistics::*;
struct Unit {  // an exponent and what is in its units
  Field exponent;
  std::vector<Field> sums;
};
using S = Statistics;
const Unit kUnits[] = {{&S::student_exponent, {&S::student_sum, &S::reverse, &S::student_absent}},
                       {&S::teacher_exponent, {&S::teacher_sum, &S::forward, &S::teacher_absent}},
                       {&S::unit_exponent, {&S::unit_sum}},
                       {&S::outside_exponent, {&S::outside_sum}},
                       {&S::inside_exponent, {&S::inside_sum}}};
const Field kMaxima[] = {&S::student_max, &S::teacher_max, &S::outside_max, &S::only_teacher,
                         &S::only_student};
const Field kMinima[] = {&S::student_min, &S::teacher_min};
const Field kSums[] = {&S::mean, &S::label};
struct Mean {  // of a side's logits, weighted by its sum
  Field mean, sum, exponent;
};
const Mean kMeans[] = {{&S::student_expected, &S::student_sum, &S::student_exponent},
                       {&S::teacher_expected, &S::teacher_sum, &S::teacher_exponent}};
struct Top {  // what belongs to the first piece with the largest `of`
  Field of;
  std::vector<Field> fields;
};
const Top kTops[] = {{&S::student_max, {&S::student_top, &S::teacher_at_top}},
                     {&S::teacher_max, {&S::teacher_top}}};
static_assert(sizeof(S) == 28 * sizeof(double), "each field has a place above");

double scaled(double exponent, double largest) {
  return std::exp2(exponent - (largest == -INFINITY ? 0 : largest));  // -inf: of nothing anywhere
}

Statistics merged(const std::vector<const Statistics*>& pieces, int64_t row) {
  Statistics all{};
  const Statistics& first = pieces[0][row];
  auto fold = [&](Field f, auto better) {
    all.*f = first.*f;
    for (const Statistics* piece : pieces)
      if (better(piece[row].*f, all.*f)) all.*f = piece[row].*f;
  };
  auto larger = [](double a, double b) { return a > b || std::isnan(a); };
  for (const Unit& unit : kUnits) fold(unit.exponent, larger);
  for (Field f : kMaxima) fold(f, larger);
  for (Field f : kMinima) fold(f, [](double a, double b) { return a < b || std::isnan(a); });
  for (const Statistics* piece : pieces) {
    const Statistics& one = piece[row];
    for (const Unit& unit : kUnits) {
      const double factor = scaled(one.*unit.exponent, all.*unit.exponent);
      for (Field f : unit.sums) all.*f += one.*f * factor;
    }
    for (const Mean& of : kMeans)
      all.*of.mean += one.*of.mean * (one.*of.sum * scaled(one.*of.exponent, all.*of.exponent));
    for (Field f : kSums) all.*f += one.*f;
  }
  for (const Mean& of : kMeans) all.*of.mean /= all.*of.sum;
  for (const Top& top : kTops) {
    size_t best = 0;
    for (size_t i = 1; i < pieces.size(); ++i)
      if (larger(pieces[i][row].*top.of, pieces[best][row].*top.of)) best = i;
    for (Field f : top.fields) all.*f = pieces[best][row].*f;
  }
  return all;
}

void merge(std::vector<Tensor> pieces, Tensor out) {
  std::vector<const Statistics*> each;
  for (const Tensor& piece : pieces) {
    STD_TORCH_CHECK(
        piece.is_contiguous() && piece.numel() == out.numel() && dtype_of(piece) == DType::f64,
        "fusedkd_cpu: expected statistics of the same rows, contiguous");
    each.push_back(pointer<Statistics>(piece));
  }
  const int64_t rows = out.size(0);
  for (int64_t row = 0; row < rows; ++row) pointer<Statistics>(out)[row] = merged(each, row);
}

}  // namespace
}  // namespace fusedkd

STABLE_TORCH_LIBRARY_FRAGMENT(fusedkd_cpu, m) {
  m.def("merge(Tensor[] pieces, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CPU, m) { m.impl("merge", TORCH_BOX(&fusedkd::merge)); }
