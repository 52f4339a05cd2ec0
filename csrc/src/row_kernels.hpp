// The kernels of labels and their likelihoods, written once for a vector type `Vec`, which the including file defines first.
//
// `Vec` offers Reg, kLanes, load, store, load_tail (lanes past the tail are filled), store_tail, keep_tail, set1, add,
// sub, mul, max, fma(a, b, c) = ab + c, fnma(a, b, c) = c - ab, and exp<precision> for K vectors in place. Everything
// here has internal linkage, for the reason in kernels.hpp.
//
// Statistics read memory once. A row is cut into blocks that fit the L1 cache. The kernel finds a block's maximum, then
// sums its exponentials relative to the largest logit so far, while the next block is prefetched. Within a block, a
// lane adds 16 (AVX-512) to 128 (baseline) terms in float32, with an error of about 1e-7. Blocks are added in double.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>

#include "exp_constants.hpp"
#include "kernels.hpp"

namespace nextquill {
namespace {

using Reg = Vec::Reg;
constexpr int64_t kLanes = Vec::kLanes;
constexpr int64_t kBlock = 1024;  // 4 KiB per stream
constexpr int64_t kAhead = 512;   // the gradients prefetch 2 KiB ahead
constexpr float kInfinity = __builtin_inff();

NQ_INLINE void prefetch(const float* address) { __builtin_prefetch(address); }

NQ_INLINE float horizontal_max(Reg x) {
    float lanes[kLanes];
    Vec::store(lanes, x);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// The largest of `last` and `count` numbers, which fill whole vectors. Several maxima run side by side, because each
// step of one waits for the step before.
NQ_INLINE float block_max(const float* z, int64_t count, Reg last) {
    constexpr int K = 4;
    Reg top[K] = {last, last, last, last};
    int64_t i = 0;
    for (; i + K * kLanes <= count; i += K * kLanes) NQ_EACH top[k] = Vec::max(top[k], Vec::load(z + i + k * kLanes));
    for (; i < count; i += kLanes) top[0] = Vec::max(top[0], Vec::load(z + i));
    return horizontal_max(Vec::max(Vec::max(top[0], top[1]), Vec::max(top[2], top[3])));
}

struct PairMax {
    float factual, counterfactual, effect;
};

NQ_INLINE PairMax block_max(const float* z1, const float* z0, int64_t count, Reg last1, Reg last0, Reg last_e) {
    constexpr int K = 2;
    Reg top1[K] = {last1, last1}, top0[K] = {last0, last0}, top_e[K] = {last_e, last_e};
    const auto add = [&](int64_t i, int k) __attribute__((always_inline)) {
        const Reg a = Vec::load(z1 + i), b = Vec::load(z0 + i);
        top1[k] = Vec::max(top1[k], a);
        top0[k] = Vec::max(top0[k], b);
        top_e[k] = Vec::max(top_e[k], Vec::sub(a, b));
    };
    int64_t i = 0;
    for (; i + K * kLanes <= count; i += K * kLanes) NQ_EACH add(i + k * kLanes, k);
    if (i < count) add(i, 0);
    return {horizontal_max(Vec::max(top1[0], top1[1])), horizontal_max(Vec::max(top0[0], top0[1])),
            horizontal_max(Vec::max(top_e[0], top_e[1]))};
}

// A sum over a row, with one double per lane.
struct RowSum {
    double lanes[kLanes] = {};

    template <int K>
    NQ_INLINE void add(const Reg (&sums)[K]) {
        Reg sum = sums[0];
        for (int k = 1; k < K; ++k) sum = Vec::add(sum, sums[k]);
        float terms[kLanes];
        Vec::store(terms, sum);
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] += terms[i];
    }
    NQ_INLINE void scale(double factor) {
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] *= factor;
    }
    NQ_INLINE void add_scaled(const RowSum& other, double factor) {
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] += factor * other.lanes[i];
    }
    double total() const {
        double sum = 0;
        for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
        return sum;
    }
};

// The sum of exp(z - reference) over a row, where `reference` is the largest logit of the blocks so far. It starts at
// the lowest finite number, so that a block of -inf gives zeros instead of NaN.
struct ExpSum {
    float reference = -FLT_MAX;
    RowSum sum;

    // Returns the rise of the reference. Sums relative to the old reference must be multiplied by `factor`.
    NQ_INLINE double rise(float block_max, double* factor) {
        *factor = 1;
        if (!(block_max > reference)) return 0;
        const double difference = static_cast<double>(block_max) - reference;
        *factor = ::exp(-difference);
        reference = block_max;
        return difference;
    }
    NQ_INLINE void rise(float block_max) {
        double factor;
        if (rise(block_max, &factor) != 0) sum.scale(factor);
    }
    // Writes the three statistics into the rows of `out` from `first` on; z is the label's logit.
    void write(const Strided<float>& out, int64_t first, int64_t row, float z) const {
        const double total = sum.total();
        out.at(first, row) = reference;
        out.at(first + 1, row) = static_cast<float>(total);
        out.at(first + 2, row) = static_cast<float>((static_cast<double>(reference) - z) + ::log(total));
    }
};

// The number of vectors that go through the exponential together.
constexpr int kTogether = 4;      // for tokens, one exponential each
constexpr int kPairsTogether = 2;  // for pairs, three exponentials each

// The sums of exp(z - reference) over a block.
struct TokenBlock {
    Reg reference, sums[kTogether];

    template <int K>
    NQ_INLINE void add(const float* z) {
        Reg x[K];
        NQ_EACH x[k] = Vec::load(z + k * kLanes);
        add(x);
    }
    template <int K>
    NQ_INLINE void add(Reg (&x)[K]) {
        NQ_EACH x[k] = Vec::sub(x[k], reference);
        Vec::exp<kSum>(x);
        NQ_EACH sums[k] = Vec::add(sums[k], x[k]);
    }
};

// The sum over a row.
ExpSum exp_sum(const float* z, int64_t vocabulary) {
    ExpSum own;
    for (int64_t start = 0; start < vocabulary; start += kBlock) {
        const int64_t count = vocabulary - start < kBlock ? vocabulary - start : kBlock;
        const int64_t tail = count % kLanes, whole = count - tail;
        const float* block = z + start;
        Reg last[1] = {Vec::set1(-kInfinity)};
        if (tail) last[0] = Vec::load_tail(block + whole, tail, -kInfinity);

        own.rise(block_max(block, whole, last[0]));

        TokenBlock sums;
        sums.reference = Vec::set1(own.reference);
        for (Reg& sum : sums.sums) sum = Vec::set1(0);
        int64_t i = 0;
        for (; i + kTogether * kLanes <= whole; i += kTogether * kLanes) {
            for (int k = 0; k < kTogether; ++k) prefetch(block + i + kBlock + k * kLanes);
            sums.add<kTogether>(block + i);
        }
        for (; i < whole; i += kLanes) sums.add<1>(block + i);
        if (tail) sums.add(last);
        own.sum.add(sums.sums);
    }
    return own;
}

// A label equal to the vocabulary is not among the columns, and has no logit.
NQ_INLINE float label_logit(const float* z, int64_t label, int64_t vocabulary) {
    return label < vocabulary ? z[label] : NAN;
}

void token_stats(const TokenStatsArgs& args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float* z = args.logits.row(row);
        exp_sum(z, args.vocabulary).write(args.out, 0, row, label_logit(z, args.labels.at(row), args.vocabulary));
    }
}

// The sums over a block of a pair of rows: the three exponentials, and, for KL and entropy, exp(x1)·x1 and exp(x1)·xe,
// where x = z - reference.
template <bool kDivergence>
struct PairBlock {
    Reg reference1, reference0, reference_e;
    Reg sum1[kPairsTogether], sum0[kPairsTogether], sum_e[kPairsTogether];
    Reg weighted1[kPairsTogether], weighted_e[kPairsTogether];

    template <int K>
    NQ_INLINE void add(const float* z1, const float* z0) {
        Reg a[K], b[K], effect[K];
        NQ_EACH {
            a[k] = Vec::load(z1 + k * kLanes);
            b[k] = Vec::load(z0 + k * kLanes);
            effect[k] = Vec::sub(a[k], b[k]);
        }
        add(a, b, effect);
    }
    template <int K>
    NQ_INLINE void add(const Reg (&z1)[K], const Reg (&z0)[K], const Reg (&effect)[K]) {
        Reg x[3 * K], x1[K], xe[K];
        NQ_EACH {
            x[k] = x1[k] = Vec::sub(z1[k], reference1);
            x[K + k] = Vec::sub(z0[k], reference0);
            x[2 * K + k] = xe[k] = Vec::sub(effect[k], reference_e);
        }
        Vec::exp<kSum>(x);
        NQ_EACH {
            sum1[k] = Vec::add(sum1[k], x[k]);
            sum0[k] = Vec::add(sum0[k], x[K + k]);
            sum_e[k] = Vec::add(sum_e[k], x[2 * K + k]);
        }
        if (!kDivergence) return;
        // 0 · -inf must be 0, as a masked entry contributes nothing.
        const Reg lowest = Vec::set1(-FLT_MAX);
        NQ_EACH {
            weighted1[k] = Vec::fma(x[k], Vec::max(lowest, x1[k]), weighted1[k]);
            weighted_e[k] = Vec::fma(x[k], Vec::max(lowest, xe[k]), weighted_e[k]);
        }
    }
};

// The sums over a pair of rows.
template <bool kDivergence>
struct PairSums {
    ExpSum factual, counterfactual, effect;
    RowSum weighted1, weighted_e;

    NQ_INLINE void rise(const PairMax& top) {
        double factor, factor_e;
        const double rise1 = factual.rise(top.factual, &factor), rise_e = effect.rise(top.effect, &factor_e);
        counterfactual.rise(top.counterfactual);
        if (rise_e != 0) {
            if (kDivergence) weighted_e.add_scaled(factual.sum, -rise_e);
            effect.sum.scale(factor_e);
        }
        if (rise1 != 0) {
            if (kDivergence) {
                weighted1.add_scaled(factual.sum, -rise1);
                weighted1.scale(factor);
                weighted_e.scale(factor);
            }
            factual.sum.scale(factor);
        }
    }

    NQ_INLINE PairBlock<kDivergence> begin_block() const {
        PairBlock<kDivergence> block;
        block.reference1 = Vec::set1(factual.reference);
        block.reference0 = Vec::set1(counterfactual.reference);
        block.reference_e = Vec::set1(effect.reference);
        for (int k = 0; k < kPairsTogether; ++k) {
            block.sum1[k] = block.sum0[k] = block.sum_e[k] = Vec::set1(0);
            block.weighted1[k] = block.weighted_e[k] = Vec::set1(0);
        }
        return block;
    }

    NQ_INLINE void add(const PairBlock<kDivergence>& block) {
        factual.sum.add(block.sum1);
        counterfactual.sum.add(block.sum0);
        effect.sum.add(block.sum_e);
        if (!kDivergence) return;
        weighted1.add(block.weighted1);
        weighted_e.add(block.weighted_e);
    }

    void write(const Strided<float>& out, int64_t row, float z1, float z0) const {
        factual.write(out, 0, row, z1);
        counterfactual.write(out, 3, row, z0);
        effect.write(out, 6, row, z1 - z0);
        if (!kDivergence) return;
        // KL = E[z1 - z0] - lse1 + lse0 and H = lse1 - E[z1], with expectations under p1.
        const double mass = factual.sum.total(), mass0 = counterfactual.sum.total();
        const double rise = static_cast<double>(effect.reference) - factual.reference + counterfactual.reference;
        out.at(9, row) = static_cast<float>(weighted_e.total() / mass + rise + ::log(mass0 / mass));
        out.at(10, row) = static_cast<float>(::log(mass) - weighted1.total() / mass);
    }
};

template <bool kDivergence>
void pair_stats_rows(const PairStatsArgs& args, int64_t begin, int64_t end) {
    const int64_t vocabulary = args.vocabulary;
    for (int64_t row = begin; row < end; ++row) {
        const float *z1 = args.factual.row(row), *z0 = args.counterfactual.row(row);
        PairSums<kDivergence> sums;
        for (int64_t start = 0; start < vocabulary; start += kBlock) {
            const int64_t count = vocabulary - start < kBlock ? vocabulary - start : kBlock;
            const int64_t tail = count % kLanes, whole = count - tail;
            const float *block1 = z1 + start, *block0 = z0 + start;
            Reg last1[1] = {Vec::set1(-kInfinity)}, last0[1] = {last1[0]}, last_e[1] = {last1[0]};
            if (tail) {
                last1[0] = Vec::load_tail(block1 + whole, tail, -kInfinity);
                last0[0] = Vec::load_tail(block0 + whole, tail, -kInfinity);
                last_e[0] = Vec::keep_tail(Vec::sub(last1[0], last0[0]), tail, -kInfinity);
            }

            sums.rise(block_max(block1, block0, whole, last1[0], last0[0], last_e[0]));

            PairBlock<kDivergence> block = sums.begin_block();
            int64_t i = 0;
            for (; i + kPairsTogether * kLanes <= whole; i += kPairsTogether * kLanes) {
                for (int k = 0; k < kPairsTogether; ++k) {
                    prefetch(block1 + i + kBlock + k * kLanes);
                    prefetch(block0 + i + kBlock + k * kLanes);
                }
                block.template add<kPairsTogether>(block1 + i, block0 + i);
            }
            for (; i < whole; i += kLanes) block.template add<1>(block1 + i, block0 + i);
            if (tail) block.add(last1, last0, last_e);
            sums.add(block);
        }
        const int64_t y = args.labels.at(row);
        sums.write(args.out, row, label_logit(z1, y, vocabulary), label_logit(z0, y, vocabulary));
    }
}

void pair_stats(const PairStatsArgs& args, int64_t begin, int64_t end) {
    (args.with_divergence ? pair_stats_rows<true> : pair_stats_rows<false>)(args, begin, end);
}

// A row's softmax, from the statistics in rows from `first` on: p = exp(z - max) / sum; at the label, p = exp(-nll).
struct Softmax {
    float max;
    double sum, nll;

    Softmax(const Strided<const float>& stats, int64_t first, int64_t row)
        : max(stats.at(first, row)), sum(stats.at(first + 1, row)), nll(stats.at(first + 2, row)) {}
    // The factor that turns exp(z - max) into `grad` · p.
    Reg weight(double grad) const { return Vec::set1(static_cast<float>(grad / sum)); }
    // p - 1 at the label, which stays exact if p is near 1.
    double label_minus_one() const { return ::expm1(-nll); }
};

// The entry at the label, which is computed separately.
struct LabelGrad {
    double softcap, logit_scale;

    double through_cap(double z) const {
        const double ratio = softcap > 0 ? z / softcap : 0;
        return logit_scale * (1 - ratio * ratio);
    }
};

// x · (1 - (z / softcap)²), where inverse_cap = 1 / softcap.
template <bool kCap>
NQ_INLINE Reg through_cap(Reg z, Reg inverse_cap, Reg x) {
    if (!kCap) return x;
    const Reg ratio = Vec::mul(z, inverse_cap);
    return Vec::mul(Vec::fnma(ratio, ratio, Vec::set1(1)), x);
}

template <bool kCap>
struct TokenGrad {
    Reg max, weight, inverse_cap;

    // Replaces logits by their gradients.
    template <int K>
    NQ_INLINE void apply(Reg (&z)[K]) const {
        Reg x[K];
        NQ_EACH x[k] = Vec::sub(z[k], max);
        Vec::exp<kPrecise>(x);
        NQ_EACH z[k] = through_cap<kCap>(z[k], inverse_cap, Vec::mul(weight, x[k]));
    }
    template <int K>
    NQ_INLINE void apply(float* z) const {
        Reg x[K];
        NQ_EACH x[k] = Vec::load(z + k * kLanes);
        apply(x);
        NQ_EACH Vec::store(z + k * kLanes, x[k]);
    }
};

template <bool kCap>
void token_grad_rows(const TokenGradArgs& args, int64_t begin, int64_t end) {
    const LabelGrad label{args.softcap, args.logit_scale};
    const int64_t vocabulary = args.vocabulary, tail = vocabulary % kLanes, whole = vocabulary - tail;
    TokenGrad<kCap> gradient;
    gradient.inverse_cap = Vec::set1(kCap ? static_cast<float>(1 / args.softcap) : 0);
    for (int64_t row = begin; row < end; ++row) {
        float* z = args.logits.row(row);
        const int64_t y = args.labels.at(row);
        const double grad = args.grad_nll.at(row);
        const Softmax softmax(args.stats, 0, row);
        const float at_label = static_cast<float>(label.through_cap(label_logit(z, y, vocabulary)) * (grad * softmax.label_minus_one()));

        gradient.max = Vec::set1(softmax.max);
        gradient.weight = softmax.weight(grad * args.logit_scale);
        int64_t i = 0;
        for (; i + kTogether * kLanes <= whole; i += kTogether * kLanes) {
            for (int k = 0; k < kTogether; ++k) prefetch(z + i + kAhead + k * kLanes);
            gradient.template apply<kTogether>(z + i);
        }
        for (; i < whole; i += kLanes) gradient.template apply<1>(z + i);
        if (tail) {
            Reg last[1] = {Vec::load_tail(z + whole, tail, 0)};
            gradient.apply(last);
            Vec::store_tail(z + whole, tail, last[0]);
        }
        if (y < vocabulary) z[y] = at_label;
    }
}

void token_grad(const TokenGradArgs& args, int64_t begin, int64_t end) {
    (args.softcap > 0 ? token_grad_rows<true> : token_grad_rows<false>)(args, begin, end);
}

enum class Counterfactual { kOwnGrad, kNoOwnGrad, kDetached };

template <bool kCap, Counterfactual kMode>
struct PairGrad {
    Reg max1, max0, max_e, weight1, weight0, weight_e, inverse_cap;

    // Replaces both logits by their gradients; a detached z0 stays as it is.
    template <int K>
    NQ_INLINE void apply(Reg (&z1)[K], Reg (&z0)[K]) const {
        constexpr int kExps = kMode == Counterfactual::kOwnGrad ? 3 : 2;
        Reg x[kExps * K];
        NQ_EACH {
            x[k] = Vec::sub(z1[k], max1);
            x[K + k] = Vec::sub(Vec::sub(z1[k], z0[k]), max_e);
            if (kExps == 3) x[(kExps - 1) * K + k] = Vec::sub(z0[k], max0);
        }
        Vec::exp<kPrecise>(x);
        NQ_EACH {
            const Reg shared = Vec::mul(weight_e, x[K + k]);
            z1[k] = through_cap<kCap>(z1[k], inverse_cap, Vec::fma(weight1, x[k], shared));
            if (kMode == Counterfactual::kDetached) continue;
            Reg grad0 = Vec::sub(Vec::set1(0), shared);
            if (kExps == 3) grad0 = Vec::fma(weight0, x[(kExps - 1) * K + k], grad0);
            z0[k] = through_cap<kCap>(z0[k], inverse_cap, grad0);
        }
    }
    template <int K>
    NQ_INLINE void apply(float* z1, float* z0) const {
        Reg a[K], b[K];
        NQ_EACH {
            a[k] = Vec::load(z1 + k * kLanes);
            b[k] = Vec::load(z0 + k * kLanes);
        }
        apply(a, b);
        NQ_EACH {
            Vec::store(z1 + k * kLanes, a[k]);
            if (kMode != Counterfactual::kDetached) Vec::store(z0 + k * kLanes, b[k]);
        }
    }
};

template <bool kCap, Counterfactual kMode>
void pair_grad_rows(const PairGradArgs& args, int64_t begin, int64_t end) {
    const LabelGrad label{args.softcap, args.logit_scale};
    const int64_t vocabulary = args.vocabulary, tail = vocabulary % kLanes, whole = vocabulary - tail;
    PairGrad<kCap, kMode> gradient;
    gradient.inverse_cap = Vec::set1(kCap ? static_cast<float>(1 / args.softcap) : 0);
    for (int64_t row = begin; row < end; ++row) {
        float *z1 = args.factual.row(row), *z0 = args.counterfactual.row(row);
        const int64_t y = args.labels.at(row);
        const Softmax softmax1(args.stats, 0, row), softmax0(args.stats, 3, row), softmax_e(args.stats, 6, row);
        const double g1 = args.grad_factual.at(row), g_e = args.grad_effect.at(row);
        const double g0 = kMode == Counterfactual::kOwnGrad ? args.grad_counterfactual.at(row) : 0;
        const double shared = g_e * softmax_e.label_minus_one();
        const double own1 = g1 * softmax1.label_minus_one();
        const double own0 = kMode == Counterfactual::kOwnGrad ? g0 * softmax0.label_minus_one() : 0;
        const float y1 = label_logit(z1, y, vocabulary), y0 = label_logit(z0, y, vocabulary);
        const float at_label1 = static_cast<float>(label.through_cap(y1) * (own1 + shared));
        const float at_label0 = static_cast<float>(label.through_cap(y0) * (own0 - shared));

        gradient.max1 = Vec::set1(softmax1.max);
        gradient.max0 = Vec::set1(softmax0.max);
        gradient.max_e = Vec::set1(softmax_e.max);
        gradient.weight1 = softmax1.weight(g1 * args.logit_scale);
        gradient.weight0 = softmax0.weight(g0 * args.logit_scale);
        gradient.weight_e = softmax_e.weight(g_e * args.logit_scale);
        int64_t i = 0;
        for (; i + kPairsTogether * kLanes <= whole; i += kPairsTogether * kLanes) {
            for (int k = 0; k < kPairsTogether; ++k) {
                prefetch(z1 + i + kAhead + k * kLanes);
                prefetch(z0 + i + kAhead + k * kLanes);
            }
            gradient.template apply<kPairsTogether>(z1 + i, z0 + i);
        }
        for (; i < whole; i += kLanes) gradient.template apply<1>(z1 + i, z0 + i);
        if (tail) {
            Reg last1[1] = {Vec::load_tail(z1 + whole, tail, 0)}, last0[1] = {Vec::load_tail(z0 + whole, tail, 0)};
            gradient.apply(last1, last0);
            Vec::store_tail(z1 + whole, tail, last1[0]);
            if (kMode != Counterfactual::kDetached) Vec::store_tail(z0 + whole, tail, last0[0]);
        }
        if (y == vocabulary) continue;
        z1[y] = at_label1;
        if (kMode != Counterfactual::kDetached) z0[y] = at_label0;
    }
}

template <bool kCap>
void pair_grad_capped(const PairGradArgs& args, int64_t begin, int64_t end) {
    if (args.detach_counterfactual) {
        pair_grad_rows<kCap, Counterfactual::kDetached>(args, begin, end);
    } else if (args.grad_counterfactual.data == nullptr) {
        pair_grad_rows<kCap, Counterfactual::kNoOwnGrad>(args, begin, end);
    } else {
        pair_grad_rows<kCap, Counterfactual::kOwnGrad>(args, begin, end);
    }
}

void pair_grad(const PairGradArgs& args, int64_t begin, int64_t end) {
    (args.softcap > 0 ? pair_grad_capped<true> : pair_grad_capped<false>)(args, begin, end);
}

}  // namespace
}  // namespace nextquill
