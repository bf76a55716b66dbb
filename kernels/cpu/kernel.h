// What the instruction-set builds of sparse.h and the bindings say to each other: plain data, no
// functions but static ones (of the others, one compiled with AVX-512 could be the copy that the
// linker keeps for everybody).
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedkd {

enum class DType : int { f64, f32, bf16, f16 };
static constexpr int64_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

// Of one side at a time: two such tiles and their gradient stay in a 32 KB L1.
constexpr int64_t kTileBytes = 8192, kLongestTile = kTileBytes / 2, kShortestTile = kTileBytes / 8;
constexpr int kParameters = 8;  // of a divergence, at most
constexpr int64_t kEntryFields = 5, kEntryStep = 8;

// One row's, in the order of fusedkd.kernels.METRICS.
struct Metrics {
  double kd, ce, teacher_entropy, student_entropy, top1_agreement, student_accuracy,
      teacher_accuracy, student_mass;
};
constexpr int kMetrics = sizeof(Metrics) / sizeof(double);

// What a row's pieces tell one another, in the order of fusedkd.kernels.Statistics.
struct Statistics {
  double student_max, student_exponent, student_sum, unit_exponent, unit_sum;
  double teacher_max, teacher_exponent, teacher_sum;
  double outside_max, outside_exponent, outside_sum, inside_exponent, inside_sum;
  double forward, reverse, teacher_absent, student_absent, only_teacher, only_student;
  double student_expected, teacher_expected, mean, label;
  double student_top, teacher_top, teacher_at_top;
  double student_min, teacher_min;
};
struct Comparison {  // in the order of fusedkd.kernels.COMPARED
  double value, slope;
};
enum class Verb : int { rows, observe, compare, finish };
// What the entries outside a sparse teacher's ids are: of p = 0; one category; of no account, where
// two measures are compared on the ids, or two distributions given that it is one of them.
enum class Tail : int { absent, bucket, generalized, conditional };

// In the order of Numbers in __init__.py.
struct Numbers {
  double temperature, teacher_temperature, kd_scale, ce_weight, label_smoothing, z_loss_weight;
  double student_scale, student_softcap, teacher_scale, teacher_softcap;
  double rounding;  // a sparse teacher's tail below this counts as 0 where the student has none
  double rule;      // the address of a row rule's Tape; 0: none
  double rule_parameters[kParameters];
  double parameters[kParameters];
};

// What a row rule's tape has as parameters: a row's, in the order of fusedkd.row_rules.STATISTICS,
// and its own behind them.
struct RuleNumbers {
  double divergence, teacher_entropy, student_entropy, label_log_prob, teacher_top1, student_top1;
  double parameters[kParameters];
};

// A divergence as operations, in the order of fusedkd.kernels.cpu.emit.STEPS.
// clang-format off
enum class TapeOp : int {
  lp, lq, p, q, gap, constant, parameter, neg, abs, sign, exp, expm1, log, log1p, sqrt, tanh,
  sigmoid, detach, add, sub, mul, div, pow, minimum, maximum, logaddexp, where, eq, lt, le, both,
  either, no
};
// clang-format on
struct TapeStep {
  TapeOp op;
  int inputs[3];
  double number;
};
constexpr int64_t kMostSteps = 256;
struct Tape {
  int64_t count, value, grad;
  TapeStep steps[kMostSteps];
};

struct Logits {  // (batch, tokens, columns), last stride 1
  const void* data;
  int64_t stride_batch, stride_token;  // in elements
  DType dtype;
  double scale, softcap;  // softcap 0: none
};

struct RowsCall : Numbers {
  Logits student, teacher;
  Logits grad;  // data null: no gradient wanted
  Verb verb;
  int64_t batch, tokens, grad_columns;
  int64_t vocabulary, offset,
      columns;            // of a row; where what lies here begins in it; how many of them that is
  const int64_t* labels;  // null: no cross-entropy
  const void* row_scale;  // (rows,) fp64 if `wide`, else fp32; also loss and metrics
  void* loss;
  void* metrics;           // (rows, kMetrics) or null
  bool measures;           // whether there will be metrics
  bool exact;              // fp64 throughout, as rows need it whose p and q hardly meet
  Statistics* statistics;  // of this piece, or merged
  Comparison* comparison;  // of this piece, or merged
  void*
      kept;  // (rows, kept_stride) what Workspace::kept is for one row, from `compare` to `finish`
  int64_t kept_stride;  // bytes
  bool* again;          // rows that `finish` leaves to be computed with `exact`
  // A sparse teacher, in whose place `teacher` stands as a copy of `student`; null: a dense one.
  const int32_t* indices;   // (rows, entries), ascending, padding of kPadding behind
  const double* log_probs;  // (rows, entries + 1), the last one the tail's
  int64_t entries;
  Tail tail;
  bool wide;    // accumulate in fp64
  bool stream;  // write the gradient past the caches
  double (*rule_factor)(const Tape&, const RuleNumbers&);
  bool teacher_entropy, student_entropy;  // whether a row rule reads them
  int divergence;
  double disjoint;  // the divergence's value where p and q have nothing in common; infinite: not to
                    // be looked at
};
constexpr int32_t kPadding = 0x7fffffff;

struct Workspace {
  void* kept;       // (vocabulary + one tile) of the accumulation type, or null: see `keeps`
  void* minima;     // (tiles, 2) of the accumulation type
  double* entries;  // sparse rows: (kEntryFields, entries + 1 rounded up to kEntryStep)
  int64_t next;     // the row to fetch from memory while this one computes, or -1
};

struct ScaleCall {
  const void* data;
  void* out;              // rows one after the other; or `data` itself
  const double* factors;  // one per row, or a single one
  int64_t rows, columns;
  int64_t inner_rows, stride_outer,
      stride_inner;    // row r starts at (r / inner) outer + (r % inner) inner
  int64_t out_stride;  // where `out` is not `data`
  bool per_row;
  DType dtype, out_dtype;
};

// Of softmax.h, in the order of fusedkd.kernels.tokens: largest logit, sum of exponentials beside
// it, mean gap to it. The logits at single tokens follow.
constexpr int64_t kSoftmaxFields = 3;

struct SoftmaxCall {
  Logits logits;
  Logits grad;  // data null: the statistics are wanted
  int64_t batch, tokens, offset, columns, grad_columns;
  const bool* counts;  // (rows,) or null: all do
  const int64_t* ids;  // (rows, entries); below 0: none
  int64_t entries;
  double temperature;
  bool entropy;                     // whether the mean gap is wanted
  double* statistics;               // (rows, kSoftmaxFields + entries)
  const double *constant, *linear;  // (rows,) of q (constant + linear (z / T - its mean)), or null
  bool stream;
};

// `ids` are to be among the columns; the third of the statistics is the mass of all others.
struct TopCall : SoftmaxCall {
  int64_t k;
  double* top_values;  // (rows, k) z / T, the largest first; -inf where there is no more
  int64_t* top_ids;    // (rows, k), -1 there
};

struct InstructionSet {
  const char* name;
  int (*find)(const char* divergence);  // -1: not in pointwise.h
  double (*disjoint)(int divergence, const double* parameters);
  bool (*keeps)(int divergence);  // whether its gradients wait in Workspace::kept for their sum
  void (*row)(const RowsCall&, const Workspace&, int64_t row);
  void (*scale)(const ScaleCall&, int64_t row);
  void (*softmax)(const SoftmaxCall&, int64_t row);
  void (*top)(const TopCall&, int64_t row);
  double (*rule_factor)(const Tape&, const RuleNumbers&);
};

const InstructionSet& base_set();
#if defined(__x86_64__)
const InstructionSet& avx2_set();
const InstructionSet& avx512_set();
#endif

// What a library of one divergence must have in common with the extension that calls it.
static constexpr int64_t kLayout[] = {sizeof(RowsCall), sizeof(Workspace), sizeof(InstructionSet),
                                      kMetrics, sizeof(Statistics)};

}  // namespace fusedkd
