// The kernels with AVX2 and FMA: eight lanes.
#include <immintrin.h>
#include <stdint.h>

#include "exp_constants.hpp"

namespace nextquill {
namespace {

alignas(32) constexpr int32_t kTailMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};

struct Vec {
    typedef __m256 Reg;
    static constexpr int64_t kLanes = 8;

    static Reg load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Reg x) { _mm256_storeu_ps(to, x); }
    static Reg load_tail(const float* from, int64_t count, float fill) {
        return keep_tail(_mm256_maskload_ps(from, mask(count)), count, fill);
    }
    static void store_tail(float* to, int64_t count, Reg x) { _mm256_maskstore_ps(to, mask(count), x); }
    static Reg keep_tail(Reg x, int64_t count, float fill) {
        return _mm256_blendv_ps(set1(fill), x, _mm256_castsi256_ps(mask(count)));
    }
    static Reg set1(float x) { return _mm256_set1_ps(x); }
    static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
    static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
    static Reg fnma(Reg a, Reg b, Reg c) { return _mm256_fnmadd_ps(a, b, c); }
    static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
    static Reg above_zero(Reg x, Reg yes, Reg no) {
        return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, set1(0), _CMP_GT_OQ));
    }
    static void split(Reg& x, Reg& exponent) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i n = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(kSqrtHalfBits)), 23);
        exponent = _mm256_cvtepi32_ps(n);
        x = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(n, 23)));
    }

    // e^x = 2^n 2^r with x log2(e) = n + r. `min` returns its second operand if either is NaN.
    template <Precision kPrecision, int K>
    NQ_INLINE static void exp(Reg (&x)[K]) {
        constexpr int kTop = kCoefficients[kPrecision] - 1;
        Reg n[K], r[K], q[K], kept[K];
        NQ_EACH {
            kept[k] = _mm256_cmp_ps(x[k], set1(kLowest), _CMP_NLT_UQ);  // true for NaN
            if (kPrecision == kPrecise) x[k] = _mm256_min_ps(set1(kHighest), x[k]);
        }
        NQ_EACH n[k] = fma(x[k], set1(kLog2E), set1(kRounding));
        NQ_EACH r[k] = _mm256_fmsub_ps(x[k], set1(kLog2E), sub(n[k], set1(kRounding)));
        NQ_EACH if (kPrecision == kPrecise) r[k] = fma(x[k], set1(kLog2ELow), r[k]);
        NQ_EACH q[k] = set1(kExp2Poly[kPrecision][kTop]);
        for (int i = kTop - 1; i >= 0; --i) NQ_EACH q[k] = fma(q[k], r[k], set1(kExp2Poly[kPrecision][i]));
        NQ_EACH q[k] = fma(q[k], r[k], set1(1));
        NQ_EACH {
            const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(n[k]), 23);
            const Reg power = _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
            x[k] = _mm256_and_ps(kept[k], mul(q[k], power));
        }
    }

private:
    static __m256i mask(int64_t count) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kTailMask + 8 - count));
    }
};

}  // namespace
}  // namespace nextquill

#include "jsd_kernels.hpp"

namespace nextquill {

const KernelTable kAvx2Kernels = {"avx2", token_stats, pair_stats, token_grad, pair_grad, jsd_stats, jsd_grad};

}  // namespace nextquill
