// The kernels in GCC's and Clang's portable vectors: SSE2 on x86-64, NEON on aarch64, and scalar code on machines
// without vectors.
#include <stdint.h>
#include <string.h>

#include "exp_constants.hpp"

namespace nextquill {
namespace {

struct Vec {
    typedef float Reg __attribute__((vector_size(16)));
    typedef int32_t Bits __attribute__((vector_size(16)));
    static constexpr int64_t kLanes = 4;

    static Reg load(const float* from) {
        Reg x;
        memcpy(&x, from, sizeof x);
        return x;
    }
    static void store(float* to, Reg x) { memcpy(to, &x, sizeof x); }
    static Reg load_tail(const float* from, int64_t count, float fill) {
        Reg x = set1(fill);
        for (int64_t i = 0; i < count; ++i) x[i] = from[i];
        return x;
    }
    static void store_tail(float* to, int64_t count, Reg x) {
        for (int64_t i = 0; i < count; ++i) to[i] = x[i];
    }
    static Reg keep_tail(Reg x, int64_t count, float fill) {
        for (int64_t i = count; i < kLanes; ++i) x[i] = fill;
        return x;
    }
    static Reg set1(float x) { return Reg{x, x, x, x}; }
    static Reg add(Reg a, Reg b) { return a + b; }
    static Reg sub(Reg a, Reg b) { return a - b; }
    static Reg mul(Reg a, Reg b) { return a * b; }
    static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
    static Reg fnma(Reg a, Reg b, Reg c) { return c - a * b; }
    static Reg max(Reg a, Reg b) { return a > b ? a : b; }
    static Reg above_zero(Reg x, Reg yes, Reg no) { return x > set1(0) ? yes : no; }
    static void split(Reg& x, Reg& exponent) {
        const Bits bits = reinterpret_cast<Bits>(x), n = (bits - kSqrtHalfBits) >> 23;
        exponent = __builtin_convertvector(n, Reg);
        x = reinterpret_cast<Reg>(bits - (n << 23));
    }

    // e^x = 2^n e^r with x = n ln 2 + r.
    template <Precision kPrecision, int K>
    NQ_INLINE static void exp(Reg (&x)[K]) {
        constexpr int kTop = kCoefficients[kPrecision] - 1;
        Reg n[K], r[K], q[K];
        Bits kept[K];
        NQ_EACH {
            kept[k] = ~(x[k] < set1(kLowest));  // true for NaN
            if (kPrecision == kPrecise) x[k] = x[k] > set1(kHighest) ? set1(kHighest) : x[k];
        }
        NQ_EACH n[k] = x[k] * set1(kLog2E) + set1(kRounding);
        NQ_EACH r[k] = x[k] - (n[k] - set1(kRounding)) * set1(kLn2High);
        NQ_EACH r[k] = r[k] - (n[k] - set1(kRounding)) * set1(kLn2Low);
        NQ_EACH q[k] = set1(kExpPoly[kPrecision][kTop]);
        for (int i = kTop - 1; i >= 0; --i) NQ_EACH q[k] = q[k] * r[k] + set1(kExpPoly[kPrecision][i]);
        NQ_EACH q[k] = q[k] * r[k] + set1(1);
        NQ_EACH {
            const Reg power = reinterpret_cast<Reg>((reinterpret_cast<Bits>(n[k]) << 23) + 0x3f800000);
            x[k] = reinterpret_cast<Reg>(kept[k] & reinterpret_cast<Bits>(q[k] * power));
        }
    }

};

}  // namespace
}  // namespace nextquill

#include "jsd_kernels.hpp"

namespace nextquill {

const KernelTable kBaselineKernels = {"baseline", token_stats, pair_stats, token_grad, pair_grad, jsd_stats, jsd_grad};

}  // namespace nextquill
