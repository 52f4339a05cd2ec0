// Coefficients of the vectorised exponentials.
//
// 2^r = 1 + r·q(r) on |r| <= 1/2 is a minimax fit of the relative error. The 1 is exact, so that exp(0) = 1. Without a
// fused multiply-add, the same polynomial is used in r·ln 2. There are two of each:
//
// - kPrecise, for gradients, has six coefficients and an error of 2.0e-9, so results are within 2 units in the last
//   place.
// - kSum, for sums of terms up to 1, has five coefficients and an error of 9.1e-8 of either sign. Results for arguments
//   above 0 are undefined.
//
// One exponential is a chain of some 13 dependent operations. Compilers keep their order, and a core looks ahead by
// only a few chains. So each `exp` takes several vectors through the chain together, in the loop NQ_EACH.
#pragma once

#include <stdint.h>

#define NQ_INLINE inline __attribute__((always_inline))
#define NQ_EACH _Pragma("GCC unroll 8") for (int k = 0; k < K; ++k)

namespace nextquill {
namespace {

enum Precision { kPrecise, kSum };

constexpr int kCoefficients[2] = {6, 5};
constexpr float kExp2Poly[2][6] = {
    {0x1.62e430p-1f, 0x1.ebfbdcp-3f, 0x1.c6aee8p-5f, 0x1.3b2d4cp-7f, 0x1.5f3e54p-10f, 0x1.41fbbcp-13f},
    {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f}};
constexpr float kExpPoly[2][6] = {
    {0x1.000000p+0f, 0x1.fffffcp-2f, 0x1.55541ap-3f, 0x1.555822p-5f, 0x1.126782p-7f, 0x1.6ae730p-10f},
    {0x1.fffff6p-1f, 0x1.fffdc6p-2f, 0x1.555a6ap-3f, 0x1.573a54p-5f, 0x1.0fa832p-7f}};

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLog2ELow = 0x1.4ae0c0p-26f;  // log2(e) - kLog2E; left out in sums, where it adds only 1.3e-8·|x|
// ln 2 in two parts. The first has nine bits, so that its product with an exponent is exact.
constexpr float kLn2High = 0x1.63p-1f;
constexpr float kLn2Low = -0x1.bd0106p-13f;

constexpr float kRounding = 0x1.8p23f;  // adding this leaves the nearest integer in the low bits of the sum
constexpr float kLowest = -87.33654f;   // below, exp is set to 0, as the smallest normal number is 1.2e-38
constexpr float kHighest = 89.0f;       // above, exp is infinite
constexpr int32_t kSqrtHalfBits = 0x3f3504f3;  // of sqrt(1/2), from which the logarithm counts exponents

}  // namespace
}  // namespace nextquill
