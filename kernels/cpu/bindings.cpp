// torch.ops.fusedkd_cpu: tensors in, plain calls out, rows shared among torch's own threads. Stable
// ABI only.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#if defined(__unix__)
#include <unistd.h>
#endif

#include "kernel.h"
#include "memory.h"
#include "tensors.h"

namespace fusedkd {
namespace {

const InstructionSet& pick() {
  const char* asked = std::getenv("FUSEDKD_CPU_ISA");
  const std::string name = asked ? asked : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(FUSEDKD_EMULATE_AVX512)
  const bool avx512 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
#endif
  if (avx512 && (name.empty() || name == "avx512")) return avx512_set();
  if (avx2 && (name.empty() || name == "avx2")) return avx2_set();
#endif
  STD_TORCH_CHECK(name.empty() || name == "base", "FUSEDKD_CPU_ISA=", name,
                  ": this machine or build has no such instruction set; expected one of avx512, "
                  "avx2, base, or unset.");
  return base_set();
}

}  // namespace
const InstructionSet& instructions() {
  static const InstructionSet& set = pick();
  return set;
}
namespace {

// Sets of one divergence each, compiled for it: fusedkd.kernels.cpu.emit. They stay.
std::map<std::string, const InstructionSet*>& own_sets() {
  static std::map<std::string, const InstructionSet*> sets;
  return sets;
}
std::mutex own_sets_mutex;

void register_set(std::string name, int64_t set, std::vector<int64_t> layout) {
  STD_TORCH_CHECK(std::equal(layout.begin(), layout.end(), std::begin(kLayout), std::end(kLayout)),
                  "fusedkd_cpu: a library compiled for another version of the extension");
  const std::lock_guard<std::mutex> lock(own_sets_mutex);
  own_sets()[name] = reinterpret_cast<const InstructionSet*>(set);
}

struct Listing {  // a divergence, where it is
  const InstructionSet& set;
  int index;
};
Listing find(const std::string& divergence) {
  const int index = instructions().find(divergence.c_str());
  if (index >= 0) return {instructions(), index};
  const std::lock_guard<std::mutex> lock(own_sets_mutex);
  const auto own = own_sets().find(divergence);
  return own == own_sets().end() ? Listing{instructions(), -1} : Listing{*own->second, 0};
}

// Two rows of both sides that fit in there do not drive each other out.
int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return bytes;
#else
  return 0;  // unknown
#endif
}

// Whether a row rule's tape reads a field of RuleNumbers, by its number.
bool reads(const Tape& rule, int field) {
  return std::any_of(rule.steps, rule.steps + rule.count, [field](const TapeStep& step) {
    return step.op == TapeOp::parameter && static_cast<int>(step.number) == field;
  });
}

// `numbers`: as in Numbers, the divergence's parameters behind them as far as it has any.
RowsCall call_of(const Listing& listing, const std::vector<double>& numbers) {
  constexpr size_t kMost = sizeof(Numbers) / sizeof(double), kLeast = kMost - kParameters;
  RowsCall call{};
  STD_TORCH_CHECK(numbers.size() >= kLeast && numbers.size() <= kMost,
                  "fusedkd_cpu: wrong number of parameters");
  std::copy(numbers.begin(), numbers.end(),
            reinterpret_cast<double*>(static_cast<Numbers*>(&call)));
  call.divergence = listing.index;
  STD_TORCH_CHECK(call.divergence >= 0, "fusedkd_cpu: unknown divergence");
  call.disjoint = listing.set.disjoint(call.divergence, call.parameters);
  if (call.rule != 0) {
    call.rule_factor = instructions().rule_factor;
    const Tape& rule = *reinterpret_cast<const Tape*>(static_cast<uintptr_t>(call.rule));
    call.teacher_entropy = reads(rule, 1), call.student_entropy = reads(rule, 2);
  }
  return call;
}

RowsCall call_of(const Listing& listing, const Tensor& student, const Tensor& teacher,
                 const std::optional<Tensor>& indices, int64_t tail,
                 const std::optional<Tensor>& labels, const Tensor& row_scale,
                 const std::vector<double>& numbers, int64_t vocabulary,
                 const std::vector<int64_t>& part) {
  RowsCall call = call_of(listing, numbers);
  call.student = logits_of(student, call.student_scale, call.student_softcap);
  call.batch = student.size(0), call.tokens = student.size(1);
  call.vocabulary = call.columns = vocabulary;
  if (part.size() == 3) call.offset = part[0], call.columns = part[1], call.exact = part[2] != 0;
  const int64_t count = call.batch * call.tokens;
  STD_TORCH_CHECK(call.columns >= 0 && call.columns <= student.size(2) && call.offset >= 0 &&
                      call.offset + call.columns <= vocabulary && row_scale.numel() == count &&
                      (!labels || labels->numel() == count),
                  "fusedkd_cpu: shapes of student, labels and row_scale do not match");
  call.labels = labels ? pointer<int64_t>(*labels) : nullptr;
  call.row_scale = pointer(row_scale), call.wide = dtype_of(row_scale) == DType::f64;
  if (!indices) {
    call.teacher = logits_of(teacher, call.teacher_scale, call.teacher_softcap);
    STD_TORCH_CHECK(teacher.size(0) == call.batch && teacher.size(1) == call.tokens &&
                        call.columns <= teacher.size(2),
                    "fusedkd_cpu: shapes of student and teacher do not match");
    return call;
  }
  call.teacher = call.student, call.tail = static_cast<Tail>(tail), call.entries = indices->size(1);
  STD_TORCH_CHECK(
      indices->scalar_type() == ScalarType::Int && indices->is_contiguous() &&
          teacher.is_contiguous() && dtype_of(teacher) == DType::f64 && indices->size(0) == count &&
          teacher.numel() == count * (call.entries + 1),
      "fusedkd_cpu: expected indices (N, K) int32 and log_probs (N, K + 1) float64, contiguous");
  call.indices = pointer<int32_t>(*indices), call.log_probs = pointer<double>(teacher);
  static const int32_t none = 0;
  if (call.entries == 0) call.indices = &none;  // null is a dense teacher
  return call;
}

// Where the gradient goes.
void write_to(RowsCall& call, const Tensor& grad) {
  STD_TORCH_CHECK(
      grad.size(0) == call.batch && grad.size(1) == call.tokens && grad.size(2) >= call.columns,
      "fusedkd_cpu: grad has another shape than student");
  call.grad = logits_of(grad, 1, 0);
  call.grad_columns = grad.size(2);
  const int64_t bytes =
      call.batch * call.tokens * call.columns * static_cast<int64_t>(grad.element_size());
  const bool large =
      bytes >= kStreamBytes || call.verb != Verb::rows;  // a piece's rows come in blocks
  call.stream = call.grad.data != call.student.data && large;
}
// Where the other results go.
void write_to(RowsCall& call, const Tensor& loss, const std::optional<Tensor>& metrics) {
  const int64_t count = call.batch * call.tokens;
  STD_TORCH_CHECK(loss.numel() == count && (!metrics || metrics->numel() == count * kMetrics),
                  "fusedkd_cpu: shapes of loss, metrics and row_scale do not match");
  STD_TORCH_CHECK(call.wide == (dtype_of(loss) == DType::f64),
                  "fusedkd_cpu: row_scale is not of the accumulation type");
  call.loss = pointer(loss), call.metrics = metrics ? pointer(*metrics) : nullptr;
}

void for_each_row(const InstructionSet& set, const RowsCall& call) {
  const size_t lane = sizeof(double);  // some rows of fp32 are computed in fp64
  const bool fits =
      2 * call.columns * (size_of(call.student.dtype) + size_of(call.teacher.dtype)) <= l2_bytes();
  const bool keeps = call.grad.data && call.kd_scale != 0 && call.tail == Tail::absent &&
                     set.keeps(call.divergence);
  const size_t kept_bytes = keeps ? (call.columns + kLongestTile) * lane : 0;
  const size_t minima = (call.columns / kShortestTile + 4) * 2 * lane;
  const size_t entries =
      call.indices ? kEntryFields * ((call.entries + kEntryStep) / kEntryStep * kEntryStep) : 0;
  for_rows(call.batch * call.tokens, call.columns, [&](int64_t row, int64_t next) {
    thread_local Scratch kept, extremes, sparse;
    void* const given =
        call.kept ? static_cast<char*>(call.kept) + row * call.kept_stride : nullptr;
    const Workspace work{given   ? given
                         : keeps ? kept.at_least<char>(kept_bytes)
                                 : nullptr,
                         extremes.at_least<char>(minima), sparse.at_least<double>(entries),
                         fits ? next : -1};
    set.row(call, work, row);
  });
}

void rows(Tensor student, Tensor teacher, std::optional<Tensor> indices, int64_t tail,
          std::optional<Tensor> labels, Tensor row_scale, std::string divergence,
          std::vector<double> numbers, int64_t vocabulary, Tensor loss, std::optional<Tensor> grad,
          std::optional<Tensor> metrics) {
  const Listing listing = find(divergence);
  RowsCall call =
      call_of(listing, student, teacher, indices, tail, labels, row_scale, numbers, vocabulary, {});
  call.measures = metrics.has_value();
  write_to(call, loss, metrics);
  if (grad) write_to(call, *grad);
  for_each_row(listing.set, call);
}

// The scale of each row, whose sum is 1 with `mean`, and 0 where it does not count. False: a label
// that does lies outside the vocabulary.
template <class T> bool weigh(const RowsCall& call, int64_t ignore_index, bool mean, T* scale) {
  int64_t counted = 0;
  for (int64_t row = 0; row < call.tokens; ++row) {
    const int64_t label = call.labels ? call.labels[row] : 0;
    const bool counts = !call.labels || label != ignore_index;
    if (counts && (label < 0 || label >= call.vocabulary)) return false;
    scale[row] = counts, counted += counts;
  }
  const T each = mean ? 1 / static_cast<T>(std::max<int64_t>(counted, 1)) : 1;
  for (int64_t row = 0; row < call.tokens; ++row) scale[row] *= each;
  return true;
}

template <class T>
bool reduced_rows(const InstructionSet& set, RowsCall& call, int64_t ignore_index, bool mean,
                  T* sum) {
  std::vector<T> scale(call.tokens), loss(call.tokens);
  if (!weigh(call, ignore_index, mean, scale.data())) return false;
  call.row_scale = scale.data(), call.loss = loss.data(), call.wide = sizeof(T) == sizeof(double);
  for_each_row(set, call);
  *sum = static_cast<T>(std::accumulate(loss.begin(), loss.end(), 0.0));
  return true;
}

// The rows of contiguous logits and of a gradient like them, from labels to the sum of their
// losses.
bool reduced(Tensor student, Tensor teacher, std::optional<Tensor> labels, std::string divergence,
             std::vector<double> numbers, int64_t ignore_index, bool mean, Tensor loss,
             std::optional<Tensor> grad) {
  const Listing listing = find(divergence);
  RowsCall call = call_of(listing, numbers);
  const int64_t columns = student.size(-1), all = student.numel();
  auto flat = [&](const Tensor& t, double scale, double softcap) {
    STD_TORCH_CHECK(t.is_contiguous() && t.numel() == all,
                    "fusedkd_cpu: expected contiguous logits of one shape");
    return Logits{pointer(t), all, columns, dtype_of(t), scale, softcap};
  };
  call.student = flat(student, call.student_scale, call.student_softcap);
  call.teacher = flat(teacher, call.teacher_scale, call.teacher_softcap);
  call.batch = 1, call.tokens = all / columns;
  call.vocabulary = call.columns = call.grad_columns = columns;
  STD_TORCH_CHECK(!labels || (labels->is_contiguous() && labels->numel() == call.tokens),
                  "fusedkd_cpu: expected contiguous labels, one a token");
  call.labels = labels ? pointer<int64_t>(*labels) : nullptr;
  if (grad) {
    call.grad = flat(*grad, 1, 0);
    call.stream = all * static_cast<int64_t>(grad->element_size()) >= kStreamBytes;
  }
  return dtype_of(loss) == DType::f64
             ? reduced_rows(listing.set, call, ignore_index, mean, pointer<double>(loss))
             : reduced_rows(listing.set, call, ignore_index, mean, pointer<float>(loss));
}

// One verb of fusedkd.kernels on the columns from part[0] on, part[1] in number, in fp64 where
// part[2] says so.
void piece(int64_t verb, Tensor student, Tensor teacher, std::optional<Tensor> indices,
           int64_t tail, std::optional<Tensor> labels, Tensor row_scale, std::string divergence,
           std::vector<double> numbers, int64_t vocabulary, std::vector<int64_t> part,
           bool measures, std::optional<Tensor> grad, Tensor statistics, std::optional<Tensor> sums,
           std::optional<Tensor> kept, std::optional<Tensor> loss, std::optional<Tensor> metrics,
           std::optional<Tensor> again) {
  const Listing listing = find(divergence);
  RowsCall call = call_of(listing, student, teacher, indices, tail, labels, row_scale, numbers,
                          vocabulary, part);
  const int64_t count = call.batch * call.tokens, lane = call.wide || call.exact ? 8 : 4;
  call.verb = static_cast<Verb>(verb), call.measures = measures;
  if (grad) write_to(call, *grad);
  STD_TORCH_CHECK(
      statistics.numel() == count * static_cast<int64_t>(sizeof(Statistics) / sizeof(double)) &&
          (!sums || sums->numel() == 2 * count) &&
          (!kept ||
           (kept->size(0) == count && kept->size(1) >= (call.columns + kLongestTile) * lane)),
      "fusedkd_cpu: statistics, sums or what is kept have another shape than they should");
  call.statistics = pointer<Statistics>(statistics);
  call.comparison = sums ? pointer<Comparison>(*sums) : nullptr;
  if (kept) call.kept = pointer(*kept), call.kept_stride = kept->size(1);
  if (loss) write_to(call, *loss, metrics);
  call.again = again ? pointer<bool>(*again) : nullptr;
  for_each_row(listing.set, call);
}
bool keeps(std::string divergence) {
  const Listing listing = find(divergence);
  return listing.set.keeps(listing.index);
}

std::string instruction_set() { return instructions().name; }
// By which Python code tells an extension that was built for another version of it.
int64_t numbers() { return sizeof(Numbers) / sizeof(double); }
bool knows(std::string divergence) { return find(divergence).index >= 0; }

}  // namespace
}  // namespace fusedkd

STABLE_TORCH_LIBRARY_FRAGMENT(fusedkd_cpu, m) {
  m.def("instruction_set() -> str");
  m.def("numbers() -> int");
  m.def("knows(str divergence) -> bool");
  m.def(
      "rows(Tensor student, Tensor teacher, Tensor? indices, int tail, Tensor? labels, Tensor "
      "row_scale, "
      "str divergence, float[] numbers, int vocabulary, Tensor(a!) loss, Tensor(b!)? grad, "
      "Tensor(c!)? metrics) -> ()");
  m.def(
      "reduced(Tensor student, Tensor teacher, Tensor? labels, str divergence, float[] numbers, "
      "int "
      "ignore_index, bool mean, Tensor(a!) loss, Tensor(b!)? grad) -> bool");
  m.def(
      "piece(int verb, Tensor student, Tensor teacher, Tensor? indices, int tail, Tensor? "
      "labels, Tensor row_scale, "
      "str divergence, float[] numbers, int vocabulary, int[] part, bool measures, Tensor(a!)? "
      "grad, "
      "Tensor(b!) statistics, Tensor(c!)? sums, Tensor(d!)? kept, Tensor(e!)? loss, Tensor(f!)? "
      "metrics, "
      "Tensor(g!)? again) -> ()");
  m.def("register_set(str name, int set, int[] layout) -> ()");
  m.def("keeps(str divergence) -> bool");
}

// Those without a tensor to go by. What they do not touch, fake tensors among it, has its kernels
// in __init__.py.
STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&fusedkd::instruction_set));
  m.impl("numbers", TORCH_BOX(&fusedkd::numbers));
  m.impl("knows", TORCH_BOX(&fusedkd::knows));
  m.impl("register_set", TORCH_BOX(&fusedkd::register_set));
  m.impl("keeps", TORCH_BOX(&fusedkd::keeps));
}

STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CPU, m) {
  m.impl("rows", TORCH_BOX(&fusedkd::rows));
  m.impl("reduced", TORCH_BOX(&fusedkd::reduced));
  m.impl("piece", TORCH_BOX(&fusedkd::piece));
}
