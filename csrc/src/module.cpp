// The Python module: checks the tensors of a call, releases the GIL, and shares the rows among threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstdlib>
#include <optional>
#include <string>

#include "isa.hpp"
#include "kernels.hpp"
#include "thread_pool.hpp"

namespace nb = nanobind;

namespace nextquill {
namespace {

using Array = nb::ndarray<>;

std::string shape_of(const Array& array) {
    std::string text = "[";
    for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
    return text + "]";
}

std::string dtype_of(const Array& array) {
    const nb::dlpack::dtype dtype = array.dtype();
    const char* kind = "dtype code ";
    switch (static_cast<nb::dlpack::dtype_code>(dtype.code)) {
        case nb::dlpack::dtype_code::Int: kind = "int"; break;
        case nb::dlpack::dtype_code::UInt: kind = "uint"; break;
        case nb::dlpack::dtype_code::Float: kind = "float"; break;
        case nb::dlpack::dtype_code::Bfloat: kind = "bfloat"; break;
        case nb::dlpack::dtype_code::Bool: kind = "bool"; break;
        default: return kind + std::to_string(dtype.code);
    }
    return kind + std::to_string(dtype.bits);
}

[[noreturn]] void bad_type(const char* name, const std::string& expected, const std::string& got) {
    throw nb::type_error((std::string(name) + ": expected " + expected + ", got " + got).c_str());
}

[[noreturn]] void bad_value(const char* name, const std::string& expected, const std::string& got) {
    throw nb::value_error((std::string(name) + ": expected " + expected + ", got " + got).c_str());
}

// Returns `object` as a CPU tensor with elements of type T. The callers below check the shape.
template <class T>
Array import(const char* name, nb::handle object) {
    Array array;
    if (!nb::try_cast(object, array, false))
        bad_type(name, "a tensor or a DLPack capsule", nb::cast<std::string>(nb::str(object.type())));
    if (array.device_type() != nb::device::cpu::value)
        bad_type(name, "a CPU tensor", "DLPack device type " + std::to_string(array.device_type()));
    if (array.dtype() != nb::dtype<T>())
        bad_type(name, std::is_same_v<T, float> ? "float32" : "int64", dtype_of(array));
    return array;
}

// The tensors of a call. The destructor releases them, so it needs the GIL.
class Tensors {
public:
    // A tensor [n, V] whose rows are contiguous. The first one sets the shape of the call.
    Rows rows(const char* name, nb::handle object, bool written) {
        const Array& array = keep(import<float>(name, object));
        if (array.ndim() != 2) bad_value(name, "[n, V]", shape_of(array));
        if (count_ < 0) {
            count_ = static_cast<int64_t>(array.shape(0));
            vocabulary_ = static_cast<int64_t>(array.shape(1));
            if (vocabulary_ == 0) bad_value(name, "at least one column", shape_of(array));
        }
        if (!has_shape(array, count_, vocabulary_)) bad_value(name, expected_shape(), shape_of(array));
        if (vocabulary_ > 1 && array.stride(1) != 1)
            bad_value(name, "a last stride of 1", std::to_string(array.stride(1)));
        if (written && count_ > 1 && std::abs(array.stride(0)) < vocabulary_)
            bad_value(name, "rows that do not overlap", "a row stride of " + std::to_string(array.stride(0)));
        return {static_cast<float*>(array.data()), array.stride(0)};
    }

    // An int64 tensor [n] with all values in [0, V]; V is a label that is not among the columns.
    Strided<const int64_t> labels(nb::handle object) {
        const Array& array = vector("labels", import<int64_t>("labels", object));
        const Strided<const int64_t> labels{static_cast<const int64_t*>(array.data()), 0, array.stride(0)};
        for (int64_t i = 0; i < count_; ++i)
            if (labels.at(i) < 0 || labels.at(i) > vocabulary_)
                bad_value("labels", "each in [0, " + std::to_string(vocabulary_) + "]",
                          std::to_string(labels.at(i)) + " at row " + std::to_string(i));
        return labels;
    }

    Strided<const float> per_row(const char* name, nb::handle object) {
        const Array& array = vector(name, import<float>(name, object));
        return {static_cast<const float*>(array.data()), 0, array.stride(0)};
    }

    // A tensor [height, n] with one of the two heights.
    Strided<float> per_row(const char* name, nb::handle object, int64_t height, int64_t other_height = -1) {
        const Array& array = keep(import<float>(name, object));
        if (!has_shape(array, height, count_) && !has_shape(array, other_height, count_))
            bad_value(name, "[" + std::to_string(height) + ", " + std::to_string(count_) + "]", shape_of(array));
        height_ = static_cast<int64_t>(array.shape(0));
        return {static_cast<float*>(array.data()), array.stride(0), array.stride(1)};
    }

    int64_t count() const { return count_; }
    int64_t vocabulary() const { return vocabulary_; }
    int64_t height() const { return height_; }  // of the last [count, n] tensor

private:
    const Array& keep(Array&& array) { return kept_[used_++] = std::move(array); }

    const Array& vector(const char* name, Array&& array) {
        const Array& kept = keep(std::move(array));
        if (kept.ndim() != 1 || static_cast<int64_t>(kept.shape(0)) != count_)
            bad_value(name, "[" + std::to_string(count_) + "]", shape_of(kept));
        return kept;
    }
    static bool has_shape(const Array& array, int64_t height, int64_t width) {
        return array.ndim() == 2 && static_cast<int64_t>(array.shape(0)) == height &&
               static_cast<int64_t>(array.shape(1)) == width;
    }
    std::string expected_shape() const {
        return "[" + std::to_string(count_) + ", " + std::to_string(vocabulary_) + "]";
    }

    Array kept_[7];
    int used_ = 0;
    int64_t count_ = -1, vocabulary_ = 0, height_ = 0;
};

Strided<const float> read_only(const Strided<float>& numbers) {
    return {numbers.data, numbers.row_stride, numbers.stride};
}

// A group of rows is about this many elements, 2 to 6 us of work with AVX-512; waking a thread takes 3 to 17 us.
constexpr int64_t kGroupElements = 1 << 14;

template <class Args>
void run(const Tensors& tensors, int threads, void (*kernel)(const Args&, int64_t, int64_t), const Args& args) {
    if (threads < 1) bad_value("threads", "at least 1", std::to_string(threads));
    struct Call {
        void (*kernel)(const Args&, int64_t, int64_t);
        const Args& args;
    } call{kernel, args};
    const int64_t grain = 1 + (kGroupElements - 1) / tensors.vocabulary();
    const nb::gil_scoped_release released;
    parallel_for(
        tensors.count(), grain, threads,
        [](const void* context, int64_t begin, int64_t end) {
            const Call& mine = *static_cast<const Call*>(context);
            mine.kernel(mine.args, begin, end);
        },
        &call);
}

double checked_softcap(std::optional<double> softcap) {
    if (softcap && !(*softcap > 0 && std::isfinite(*softcap)))
        bad_value("softcap", "None or a finite number above 0", std::to_string(*softcap));
    return softcap.value_or(0);
}

void token_stats(nb::handle logits, nb::handle labels, nb::handle out, int threads) {
    Tensors tensors;
    TokenStatsArgs args{};
    args.logits = tensors.rows("logits", logits, false);
    args.vocabulary = tensors.vocabulary();
    args.labels = tensors.labels(labels);
    args.out = tensors.per_row("out", out, 3);
    run(tensors, threads, current_kernels().token_stats, args);
}

void pair_stats(nb::handle logits_factual, nb::handle logits_counterfactual, nb::handle labels, nb::handle out,
                int threads) {
    Tensors tensors;
    PairStatsArgs args{};
    args.factual = tensors.rows("logits_factual", logits_factual, false);
    args.counterfactual = tensors.rows("logits_counterfactual", logits_counterfactual, false);
    args.vocabulary = tensors.vocabulary();
    args.labels = tensors.labels(labels);
    args.out = tensors.per_row("out", out, 9, 11);
    args.with_divergence = tensors.height() == 11;
    run(tensors, threads, current_kernels().pair_stats, args);
}

void token_grad(nb::handle logits, nb::handle labels, nb::handle stats, nb::handle grad_nll,
                std::optional<double> softcap, double logit_scale, int threads) {
    Tensors tensors;
    TokenGradArgs args{};
    args.logits = tensors.rows("logits", logits, true);
    args.vocabulary = tensors.vocabulary();
    args.labels = tensors.labels(labels);
    args.stats = read_only(tensors.per_row("stats", stats, 3));
    args.grad_nll = tensors.per_row("grad_nll", grad_nll);
    args.softcap = checked_softcap(softcap);
    args.logit_scale = logit_scale;
    run(tensors, threads, current_kernels().token_grad, args);
}

void pair_grad(nb::handle logits_factual, nb::handle logits_counterfactual, nb::handle labels, nb::handle stats,
               nb::handle grad_factual, nb::handle grad_counterfactual, nb::handle grad_effect,
               std::optional<double> softcap, double logit_scale, bool detach_counterfactual, int threads) {
    Tensors tensors;
    PairGradArgs args{};
    args.factual = tensors.rows("logits_factual", logits_factual, true);
    args.counterfactual = tensors.rows("logits_counterfactual", logits_counterfactual, !detach_counterfactual);
    args.vocabulary = tensors.vocabulary();
    args.labels = tensors.labels(labels);
    args.stats = read_only(tensors.per_row("stats", stats, 9));
    args.grad_factual = tensors.per_row("grad_factual", grad_factual);
    if (!grad_counterfactual.is_none() && !detach_counterfactual)
        args.grad_counterfactual = tensors.per_row("grad_counterfactual", grad_counterfactual);
    args.grad_effect = tensors.per_row("grad_effect", grad_effect);
    args.softcap = checked_softcap(softcap);
    args.logit_scale = logit_scale;
    args.detach_counterfactual = detach_counterfactual;
    run(tensors, threads, current_kernels().pair_grad, args);
}

double checked_beta(double beta) {
    if (!(beta >= 0 && beta <= 1)) bad_value("beta", "a number in [0, 1]", std::to_string(beta));
    return beta;
}

void jsd_stats(nb::handle logits_student, nb::handle logits_teacher, nb::handle out, double beta, bool normalised,
               int threads) {
    Tensors tensors;
    JsdStatsArgs args{};
    args.student = tensors.rows("logits_student", logits_student, false);
    args.teacher = tensors.rows("logits_teacher", logits_teacher, false);
    args.vocabulary = tensors.vocabulary();
    args.out = tensors.per_row("out", out, 6);
    args.beta = checked_beta(beta);
    args.normalised = normalised;
    run(tensors, threads, current_kernels().jsd_stats, args);
}

void jsd_grad(nb::handle logits_student, nb::handle logits_teacher, nb::handle stats, nb::handle grad_jsd, double beta,
              std::optional<double> softcap, double logit_scale, int threads) {
    Tensors tensors;
    JsdGradArgs args{};
    args.student = tensors.rows("logits_student", logits_student, true);
    args.teacher = tensors.rows("logits_teacher", logits_teacher, false);
    args.vocabulary = tensors.vocabulary();
    args.stats = read_only(tensors.per_row("stats", stats, 6));
    args.grad = tensors.per_row("grad_jsd", grad_jsd);
    args.beta = checked_beta(beta);
    args.softcap = checked_softcap(softcap);
    args.logit_scale = logit_scale;
    run(tensors, threads, current_kernels().jsd_grad, args);
}

nb::tuple available_isas() {
    nb::list names;
    for (const KernelTable* kernels : available_kernels()) names.append(kernels->name);
    return nb::tuple(names);
}

}  // namespace
}  // namespace nextquill

NB_MODULE(_core, module) {
    using namespace nextquill;
    using namespace nb::literals;
    module.def("token_stats", token_stats, "logits"_a, "labels"_a, "out"_a, "threads"_a = 1);
    module.def("pair_stats", pair_stats, "logits_factual"_a, "logits_counterfactual"_a, "labels"_a, "out"_a,
               "threads"_a = 1);
    module.def("token_grad_", token_grad, "logits"_a, "labels"_a, "stats"_a, "grad_nll"_a, "softcap"_a.none(),
               "logit_scale"_a, "threads"_a = 1);
    module.def("pair_grad_", pair_grad, "logits_factual"_a, "logits_counterfactual"_a, "labels"_a, "stats"_a,
               "grad_factual"_a, "grad_counterfactual"_a.none(), "grad_effect"_a, "softcap"_a.none(), "logit_scale"_a,
               "detach_counterfactual"_a = false, "threads"_a = 1);
    module.def("jsd_stats", jsd_stats, "logits_student"_a, "logits_teacher"_a, "out"_a, "beta"_a,
               "normalised"_a = false, "threads"_a = 1);
    module.def("jsd_grad_", jsd_grad, "logits_student"_a, "logits_teacher"_a, "stats"_a, "grad_jsd"_a, "beta"_a,
               "softcap"_a.none(), "logit_scale"_a, "threads"_a = 1);
    module.def("available_isas", available_isas);
    module.def("current_isa", [] { return current_kernels().name; });
    module.def("use_openmp", [](const std::string& path) { return use_openmp(path.c_str()); }, "path"_a);
    module.def("set_isa", [](const std::string& name) { use_kernels(name); }, "name"_a);
}
