// torch.ops.fusedkd_cpu: tensors in, plain calls out, rows shared among torch's own threads. Stable
// ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#if defined(__unix__)
#include <unistd.h>
#endif

#include "kernel.h"
#include "memory.h"
#include "tensors.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace fusedkd {
namespace {

// Work for one thread below which a second one does not pay, in vocabulary entries.
constexpr int64_t kGrain = 32768;
// Gradients of at least this many bytes are written past the caches: they would not stay there
// anyhow.
constexpr int64_t kStreamBytes = 16 << 20;

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

const InstructionSet& instructions() {
  static const InstructionSet& set = pick();
  return set;
}

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

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "fusedkd_cpu: expected float64, float32, bfloat16 or float16");
  }
  return DType::f32;
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

Logits logits_of(const Tensor& t, double scale, double softcap) {
  STD_TORCH_CHECK(
      t.dim() == 3 && (t.size(2) <= 1 || t.stride(2) == 1),
      "fusedkd_cpu: expected (batch, tokens, columns) with unit stride in the last dimension");
  return {pointer(t), t.stride(0), t.stride(1), dtype_of(t), scale, softcap};
}

// Calls `one(row, next)` for each row; `next` is what the same thread does then, or -1. Which
// thread does a row does not matter to its result, so threads take the next one when they are free:
// rows that do not count cost nothing, and neighbours on the machine disturb less.
template <class One> void for_rows(int64_t rows, int64_t columns, const One& one) {
  if (rows == 0) return;
  const int64_t workers =
      std::min<int64_t>({torch::stable::get_num_threads(), rows, rows * columns / kGrain + 1});
  const int64_t batch = std::max<int64_t>(
      1, std::min(kGrain / 2 / std::max<int64_t>(columns, 1), rows / workers / 4));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    auto claim = [&] { return next.fetch_add(batch, std::memory_order_relaxed); };
    for (int64_t from = claim(), then; from < rows; from = then) {
      then = claim();
      const int64_t last = std::min(rows, from + batch) - 1;
      for (int64_t row = from; row < last; ++row) one(row, row + 1);
      one(last, then < rows ? then : -1);
    }
  });
}

// `numbers`: as in Numbers, the divergence's parameters behind them as far as it has any.
RowsCall call_of(const Listing& listing, const Tensor& student, const Tensor& teacher,
                 const std::optional<Tensor>& indices, int64_t tail,
                 const std::optional<Tensor>& labels, const Tensor& row_scale,
                 const std::vector<double>& numbers, int64_t vocabulary,
                 const std::vector<int64_t>& part) {
  constexpr size_t kMost = sizeof(Numbers) / sizeof(double), kLeast = kMost - kParameters;
  RowsCall call{};
  STD_TORCH_CHECK(numbers.size() >= kLeast && numbers.size() <= kMost,
                  "fusedkd_cpu: wrong number of parameters");
  std::copy(numbers.begin(), numbers.end(),
            reinterpret_cast<double*>(static_cast<Numbers*>(&call)));
  call.student = logits_of(student, call.student_scale, call.student_softcap);
  call.batch = student.size(0), call.tokens = student.size(1);
  call.vocabulary = call.columns = vocabulary;
  if (part.size() == 3) call.offset = part[0], call.columns = part[1], call.exact = part[2] != 0;
  const int64_t count = call.batch * call.tokens;
  STD_TORCH_CHECK(call.columns >= 0 && call.columns <= student.size(2) && call.offset >= 0 &&
                      call.offset + call.columns <= vocabulary && row_scale.numel() == count &&
                      (!labels || labels->numel() == count),
                  "fusedkd_cpu: shapes of student, labels and row_scale do not match");
  call.divergence = listing.index;
  STD_TORCH_CHECK(call.divergence >= 0, "fusedkd_cpu: unknown divergence");
  call.disjoint = listing.set.disjoint(call.divergence, call.parameters);
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

// Rows of a (batch, tokens, columns) tensor with unit last stride, or of any contiguous one; `out`
// is the same tensor, or contiguous.
void scale_(Tensor out, Tensor data, Tensor factor) {
  const bool per_row = factor.dim() > 0;
  const int64_t all = data.numel();
  STD_TORCH_CHECK(out.numel() == all && (out.data_ptr() == data.data_ptr() || out.is_contiguous()),
                  "fusedkd_cpu::scale_: expected a contiguous output of as many entries");
  if (all == 0) return;
  ScaleCall call{};
  call.data = pointer(data), call.out = pointer(out), call.inner_rows = 1;
  call.per_row = per_row, call.dtype = dtype_of(data), call.out_dtype = dtype_of(out);
  if (data.dim() == 3 && !data.is_contiguous()) {
    call.rows = data.size(0) * data.size(1), call.columns = data.size(2);
    call.inner_rows = data.size(1), call.stride_outer = data.stride(0),
    call.stride_inner = data.stride(1);
  } else {
    STD_TORCH_CHECK(data.is_contiguous(), "fusedkd_cpu::scale_: expected a contiguous tensor");
    // with a single factor, rows are only what threads share
    call.rows = per_row ? factor.numel() : (all + kGrain - 1) / kGrain;
    call.columns = per_row ? all / factor.numel() : kGrain;
    call.stride_outer = call.columns;
  }
  call.out_stride = call.columns;
  std::vector<double> factors(factor.numel());
  const void* numbers = pointer(factor);
  for (size_t i = 0; i < factors.size(); ++i)
    factors[i] = dtype_of(factor) == DType::f64 ? static_cast<const double*>(numbers)[i]
                                                : static_cast<const float*>(numbers)[i];
  STD_TORCH_CHECK(!per_row || static_cast<int64_t>(factors.size()) == call.rows,
                  "fusedkd_cpu::scale_: expected one factor, or one per row");
  if (!per_row && factors[0] == 1 && call.out == call.data) return;
  call.factors = factors.data();
  const bool flat = !per_row && data.is_contiguous();
  for_rows(call.rows, call.columns, [&](int64_t row, int64_t) {
    ScaleCall part = call;
    if (flat) part.columns = std::min(kGrain, all - row * kGrain);
    instructions().scale(part, row);
  });
}

// Uninitialised and contiguous, on the CPU; see Spare.
Tensor spare(std::vector<int64_t> shape, ScalarType dtype, int64_t bytes) {
  const Spare::Block block = Spare::instance().take(bytes);
  STD_TORCH_CHECK(block.data != nullptr, "fusedkd_cpu: cannot allocate memory: ", bytes,
                  " bytes were asked for");
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return torch::stable::from_blob(block.data, shape, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [block](void*) { Spare::instance().give(block); });
}

std::string instruction_set() { return instructions().name; }
bool knows(std::string divergence) { return find(divergence).index >= 0; }

}  // namespace
}  // namespace fusedkd

STABLE_TORCH_LIBRARY_FRAGMENT(fusedkd_cpu, m) {
  m.def("instruction_set() -> str");
  m.def("knows(str divergence) -> bool");
  m.def(
      "rows(Tensor student, Tensor teacher, Tensor? indices, int tail, Tensor? labels, Tensor "
      "row_scale, "
      "str divergence, float[] numbers, int vocabulary, Tensor(a!) loss, Tensor(b!)? grad, "
      "Tensor(c!)? metrics) -> ()");
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
  m.def("scale_(Tensor(a!) out, Tensor data, Tensor factor) -> ()");
  m.def("spare(int[] shape, ScalarType dtype, int bytes) -> Tensor");
}

// Those without a tensor to go by. What they do not touch, fake tensors among it, has its kernels
// in __init__.py.
STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&fusedkd::instruction_set));
  m.impl("knows", TORCH_BOX(&fusedkd::knows));
  m.impl("register_set", TORCH_BOX(&fusedkd::register_set));
  m.impl("keeps", TORCH_BOX(&fusedkd::keeps));
  m.impl("spare", TORCH_BOX(&fusedkd::spare));
}

STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CPU, m) {
  m.impl("rows", TORCH_BOX(&fusedkd::rows));
  m.impl("piece", TORCH_BOX(&fusedkd::piece));
  m.impl("scale_", TORCH_BOX(&fusedkd::scale_));
}
