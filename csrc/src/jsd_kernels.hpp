// The Jensen-Shannon divergence of a student's softmax p1 from a teacher's p0, and its gradient by the logits of p1.
//
// With m = beta p0 + (1 - beta) p1, the logarithms come from the difference d of log-probabilities, so that they are
// exact where a probability underflows:
//
//     d = log(p0 / p1) = (z0 - max0) - (z1 - max1) - log(sum0 / sum1)
//     r = log(m / max(p0, p1)) = log(beta + (1 - beta) exp(-d)) if d > 0, else log(1 - beta + beta exp(d))
//     log(m / p1) = r + max(d, 0)        log(m / p0) = r + max(-d, 0)
//
// A divergence KL(p || m) sums p log(p / m) + m - p, which is never negative. All m - p of a row add up to 0, up to the
// rounding of the softmaxes: without them that rounding would be an error of the divergence.
//
// `Vec` also offers above_zero(d, yes, no), and split, which divides positive numbers into a mantissa from sqrt(1/2) to
// sqrt(2) and an exponent.
#pragma once

#include "row_kernels.hpp"

namespace nextquill {
namespace {

// log(1 + f) = f - f²/2 + f³·q(f) on [sqrt(1/2) - 1, sqrt(2) - 1]: a fit of the relative error, which is 3e-8.
constexpr int kLogTop = 6;
constexpr float kLogPoly[kLogTop + 1] = {0x1.5556d8p-2f,  -0x1.000382p-2f, 0x1.98d7f2p-3f, -0x1.538248p-3f,
                                         0x1.317458p-3f, -0x1.2432c0p-3f, 0x1.645eb6p-4f};
constexpr float kLn2 = 0x1.62e430p-1f;

// The logarithm of normal positive numbers; of others, some finite number. log(1) is 0.
template <int K>
NQ_INLINE void log(Reg (&x)[K]) {
    Reg exponent[K], q[K], square[K];
    NQ_EACH Vec::split(x[k], exponent[k]);
    NQ_EACH x[k] = Vec::sub(x[k], Vec::set1(1));
    NQ_EACH square[k] = Vec::mul(x[k], x[k]);
    NQ_EACH q[k] = Vec::set1(kLogPoly[kLogTop]);
    for (int i = kLogTop - 1; i >= 0; --i) NQ_EACH q[k] = Vec::fma(q[k], x[k], Vec::set1(kLogPoly[i]));
    NQ_EACH q[k] = Vec::fma(q[k], x[k], Vec::set1(-0.5f));
    NQ_EACH x[k] = Vec::fma(q[k], square[k], x[k]);
    NQ_EACH x[k] = Vec::fma(exponent[k], Vec::set1(kLn2), x[k]);
}

enum class Beta { kBetween, kZero, kOne };

// Both softmaxes of a row and their mixture.
template <Beta kBeta>
struct Mixture {
    Reg max1, max0, weight1, weight0, gap, beta, rest;  // a weight is 1 / sum; rest is 1 - beta

    Mixture(float top1, double sum1, float top0, double sum0, double weight_of_teacher)
        : max1(Vec::set1(top1)), max0(Vec::set1(top0)), weight1(Vec::set1(static_cast<float>(1 / sum1))),
          weight0(Vec::set1(static_cast<float>(1 / sum0))), gap(Vec::set1(static_cast<float>(::log(sum0 / sum1)))),
          beta(Vec::set1(static_cast<float>(weight_of_teacher))), rest(Vec::sub(Vec::set1(1), beta)) {}

    // Returns p1, p0, log(m / p1) and log(m / p0).
    template <int K>
    NQ_INLINE void apply(const Reg (&z1)[K], const Reg (&z0)[K], Reg (&p1)[K], Reg (&p0)[K], Reg (&above1)[K],
                         Reg (&above0)[K]) const {
        // Finite also in a masked column, where d would be inf - inf; its probabilities stay 0. NaN passes.
        const Reg lowest = Vec::set1(-FLT_MAX), zero = Vec::set1(0);
        constexpr int kExps = kBeta == Beta::kBetween ? 3 : 2;
        Reg x[kExps * K], d[K], minus_d[K], r[K];
        NQ_EACH {
            x[k] = Vec::max(lowest, Vec::sub(z1[k], max1));
            x[K + k] = Vec::max(lowest, Vec::sub(z0[k], max0));
            d[k] = Vec::sub(Vec::sub(x[K + k], x[k]), gap);
            minus_d[k] = Vec::sub(zero, d[k]);
            if (kExps == 3) x[(kExps - 1) * K + k] = Vec::sub(zero, Vec::max(d[k], minus_d[k]));
        }
        Vec::exp<kPrecise>(x);
        NQ_EACH {
            p1[k] = Vec::mul(weight1, x[k]);
            p0[k] = Vec::mul(weight0, x[K + k]);
        }
        if (kBeta == Beta::kBetween) {
            NQ_EACH r[k] = Vec::fma(Vec::above_zero(d[k], rest, beta), x[(kExps - 1) * K + k],
                                    Vec::above_zero(d[k], beta, rest));
            log(r);
            NQ_EACH {
                above1[k] = Vec::add(r[k], Vec::max(d[k], zero));
                above0[k] = Vec::add(r[k], Vec::max(minus_d[k], zero));
            }
        } else {
            NQ_EACH {
                above1[k] = kBeta == Beta::kZero ? zero : d[k];
                above0[k] = kBeta == Beta::kZero ? minus_d[k] : zero;
            }
        }
    }
};

// KL(p1 || m) and KL(p0 || m) over a block.
template <Beta kBeta>
struct DivergenceBlock {
    const Mixture<kBeta>& mixture;
    Reg sum1[kPairsTogether], sum0[kPairsTogether];

    explicit DivergenceBlock(const Mixture<kBeta>& of_row) : mixture(of_row) {
        for (int k = 0; k < kPairsTogether; ++k) sum1[k] = sum0[k] = Vec::set1(0);
    }
    template <int K>
    NQ_INLINE void add(const float* z1, const float* z0) {
        Reg a[K], b[K];
        NQ_EACH {
            a[k] = Vec::load(z1 + k * kLanes);
            b[k] = Vec::load(z0 + k * kLanes);
        }
        add(a, b);
    }
    template <int K>
    NQ_INLINE void add(const Reg (&z1)[K], const Reg (&z0)[K]) {
        Reg p1[K], p0[K], above1[K], above0[K];
        mixture.apply(z1, z0, p1, p0, above1, above0);
        NQ_EACH {
            const Reg surplus = Vec::sub(p0[k], p1[k]);
            sum1[k] = Vec::fma(mixture.beta, surplus, Vec::fnma(p1[k], above1[k], sum1[k]));
            sum0[k] = Vec::fnma(mixture.rest, surplus, Vec::fnma(p0[k], above0[k], sum0[k]));
        }
    }
};

// The largest logit, and the sum of exp(z - max).
struct Normaliser {
    float top;
    double mass;
};

// Computes a row's normaliser into rows `first` and `first + 1` of the statistics, or reads it from there.
Normaliser normaliser(const JsdStatsArgs& args, const Rows& logits, int64_t row, int first) {
    if (args.normalised) return {args.out.at(first, row), args.out.at(first + 1, row)};
    const ExpSum found = exp_sum(logits.row(row), args.vocabulary);
    const Normaliser own{found.reference, found.sum.total()};
    args.out.at(first, row) = own.top;
    args.out.at(first + 1, row) = static_cast<float>(own.mass);
    return own;
}

template <Beta kBeta>
void jsd_stats_rows(const JsdStatsArgs& args, int64_t begin, int64_t end) {
    const int64_t vocabulary = args.vocabulary;
    for (int64_t row = begin; row < end; ++row) {
        const float *z1 = args.student.row(row), *z0 = args.teacher.row(row);
        const Normaliser student = normaliser(args, args.student, row, 0);
        const Normaliser teacher = normaliser(args, args.teacher, row, 2);
        const Mixture<kBeta> mixture(student.top, student.mass, teacher.top, teacher.mass, args.beta);
        RowSum sum1, sum0;
        for (int64_t start = 0; start < vocabulary; start += kBlock) {
            const int64_t count = vocabulary - start < kBlock ? vocabulary - start : kBlock;
            const int64_t tail = count % kLanes, whole = count - tail;
            const float *block1 = z1 + start, *block0 = z0 + start;
            DivergenceBlock<kBeta> block(mixture);
            int64_t i = 0;
            for (; i + kPairsTogether * kLanes <= whole; i += kPairsTogether * kLanes) {
                for (int k = 0; k < kPairsTogether; ++k) {
                    prefetch(block1 + i + kAhead + k * kLanes);
                    prefetch(block0 + i + kAhead + k * kLanes);
                }
                block.template add<kPairsTogether>(block1 + i, block0 + i);
            }
            for (; i < whole; i += kLanes) block.template add<1>(block1 + i, block0 + i);
            if (tail) {
                const Reg last1[1] = {Vec::load_tail(block1 + whole, tail, -kInfinity)};
                const Reg last0[1] = {Vec::load_tail(block0 + whole, tail, -kInfinity)};
                block.add(last1, last0);
            }
            sum1.add(block.sum1);
            sum0.add(block.sum0);
        }
        const double kl1 = sum1.total(), kl0 = sum0.total();
        const double jsd = kBeta == Beta::kZero ? kl0
                           : kBeta == Beta::kOne ? kl1
                                                 : args.beta * kl0 + (1 - args.beta) * kl1;
        args.out.at(4, row) = static_cast<float>(kl1);
        args.out.at(5, row) = static_cast<float>(jsd < 0 ? 0 : jsd);  // below 0 by rounding only; NaN passes
    }
}

void jsd_stats(const JsdStatsArgs& args, int64_t begin, int64_t end) {
    (args.beta == 0   ? jsd_stats_rows<Beta::kZero>
     : args.beta == 1 ? jsd_stats_rows<Beta::kOne>
                      : jsd_stats_rows<Beta::kBetween>)(args, begin, end);
}

template <bool kCap, Beta kBeta>
struct JsdGrad {
    const Mixture<kBeta>& mixture;
    Reg divergence, weight, inverse_cap;

    // Replaces the student's logits by their gradients.
    template <int K>
    NQ_INLINE void apply(Reg (&z1)[K], const Reg (&z0)[K]) const {
        Reg p1[K], p0[K], above1[K], above0[K];
        mixture.apply(z1, z0, p1, p0, above1, above0);
        NQ_EACH {
            const Reg dz = kBeta == Beta::kZero ? Vec::sub(p0[k], p1[k])
                                                : Vec::mul(p1[k], Vec::add(above1[k], divergence));
            z1[k] = through_cap<kCap>(z1[k], inverse_cap, Vec::mul(weight, dz));
        }
    }
    template <int K>
    NQ_INLINE void apply(float* z1, const float* z0) const {
        Reg a[K], b[K];
        NQ_EACH {
            a[k] = Vec::load(z1 + k * kLanes);
            b[k] = Vec::load(z0 + k * kLanes);
        }
        apply(a, b);
        NQ_EACH Vec::store(z1 + k * kLanes, a[k]);
    }
};

template <bool kCap, Beta kBeta>
void jsd_grad_rows(const JsdGradArgs& args, int64_t begin, int64_t end) {
    const int64_t vocabulary = args.vocabulary, tail = vocabulary % kLanes, whole = vocabulary - tail;
    const double own = kBeta == Beta::kBetween ? 1 - args.beta : 1;
    for (int64_t row = begin; row < end; ++row) {
        float* z1 = args.student.row(row);
        const float* z0 = args.teacher.row(row);
        const Mixture<kBeta> mixture(args.stats.at(0, row), args.stats.at(1, row), args.stats.at(2, row),
                                     args.stats.at(3, row), args.beta);
        const JsdGrad<kCap, kBeta> gradient{mixture, Vec::set1(args.stats.at(4, row)),
                                            Vec::set1(static_cast<float>(-own * args.grad.at(row) * args.logit_scale)),
                                            Vec::set1(kCap ? static_cast<float>(1 / args.softcap) : 0)};
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
            Reg last1[1] = {Vec::load_tail(z1 + whole, tail, 0)};
            const Reg last0[1] = {Vec::load_tail(z0 + whole, tail, 0)};
            gradient.apply(last1, last0);
            Vec::store_tail(z1 + whole, tail, last1[0]);
        }
    }
}

template <bool kCap>
void jsd_grad_capped(const JsdGradArgs& args, int64_t begin, int64_t end) {
    (args.beta == 0   ? jsd_grad_rows<kCap, Beta::kZero>
     : args.beta == 1 ? jsd_grad_rows<kCap, Beta::kOne>
                      : jsd_grad_rows<kCap, Beta::kBetween>)(args, begin, end);
}

void jsd_grad(const JsdGradArgs& args, int64_t begin, int64_t end) {
    (args.softcap > 0 ? jsd_grad_capped<true> : jsd_grad_capped<false>)(args, begin, end);
}

}  // namespace
}  // namespace nextquill
