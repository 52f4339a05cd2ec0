// The kernels with AVX-512F: sixteen lanes, masked tails.
#include <immintrin.h>
#include <stdint.h>

#include "exp_constants.hpp"

namespace nextquill {
namespace {

struct Vec {
    typedef __m512 Reg;
    static constexpr int64_t kLanes = 16;

    static Reg load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Reg x) { _mm512_storeu_ps(to, x); }
    static Reg load_tail(const float* from, int64_t count, float fill) {
        return _mm512_mask_loadu_ps(set1(fill), mask(count), from);
    }
    static void store_tail(float* to, int64_t count, Reg x) { _mm512_mask_storeu_ps(to, mask(count), x); }
    static Reg keep_tail(Reg x, int64_t count, float fill) { return _mm512_mask_mov_ps(set1(fill), mask(count), x); }
    static Reg set1(float x) { return _mm512_set1_ps(x); }
    static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
    static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
    static Reg fnma(Reg a, Reg b, Reg c) { return _mm512_fnmadd_ps(a, b, c); }
    static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
    static Reg above_zero(Reg x, Reg yes, Reg no) {
        return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, set1(0), _CMP_GT_OQ), yes);
    }
    static void split(Reg& x, Reg& exponent) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i n = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(kSqrtHalfBits)), 23);
        exponent = _mm512_cvtepi32_ps(n);
        x = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(n, 23)));
    }

    // e^x = 2^n 2^r with x log2(e) = n + r. `min` returns its second operand if either is NaN.
    template <Precision kPrecision, int K>
    NQ_INLINE static void exp(Reg (&x)[K]) {
        constexpr int kTop = kCoefficients[kPrecision] - 1;
        Reg n[K], r[K], q[K];
        __mmask16 kept[K];
        NQ_EACH {
            // "Not less than" is true for NaN, so NaN is kept. Where the result is set to 0, q may be anything.
            kept[k] = _mm512_cmp_ps_mask(x[k], set1(kLowest), _CMP_NLT_UQ);
            if (kPrecision == kPrecise) x[k] = _mm512_min_ps(set1(kHighest), x[k]);
        }
        NQ_EACH n[k] = fma(x[k], set1(kLog2E), set1(kRounding));
        NQ_EACH n[k] = sub(n[k], set1(kRounding));
        NQ_EACH r[k] = _mm512_fmsub_ps(x[k], set1(kLog2E), n[k]);
        NQ_EACH if (kPrecision == kPrecise) r[k] = fma(x[k], set1(kLog2ELow), r[k]);
        NQ_EACH q[k] = set1(kExp2Poly[kPrecision][kTop]);
        for (int i = kTop - 1; i >= 0; --i) NQ_EACH q[k] = fma(q[k], r[k], set1(kExp2Poly[kPrecision][i]));
        NQ_EACH q[k] = fma(q[k], r[k], set1(1));
        NQ_EACH x[k] = _mm512_maskz_scalef_ps(kept[k], q[k], n[k]);
    }

private:
    static __mmask16 mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
};

}  // namespace
}  // namespace nextquill

#include "jsd_kernels.hpp"

namespace nextquill {

const KernelTable kAvx512Kernels = {"avx512", token_stats, pair_stats, token_grad, pair_grad, jsd_stats, jsd_grad};

}  // namespace nextquill
