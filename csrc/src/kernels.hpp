// What the instruction-set levels share: the arguments of a call and the table of functions that a level offers.
//
// Plain structs and C headers only. The files behind a table are compiled with instructions that the machine may lack;
// an inline function of the standard library, compiled there, could be the copy that the linker keeps for everyone.
#pragma once

#include <stdint.h>

namespace nextquill {

// One or two dimensions of a tensor that somebody else owns; strides in elements.
template <class T>
struct Strided {
    T* data;
    int64_t row_stride;
    int64_t stride;

    T& at(int64_t i) const { return data[i * stride]; }
    T& at(int64_t row, int64_t i) const { return data[row * row_stride + i * stride]; }
};

// Rows [n, V] of logits; the elements of a row lie next to each other.
struct Rows {
    float* data;
    int64_t row_stride;

    float* row(int64_t i) const { return data + i * row_stride; }
};

// The statistics of a row are its largest logit, the sum of exp(z - max), and the nll. With them p = exp(z - max) / sum;
// a logsumexp in float32 would be off by 2^-25 of itself, which at |z| = 1e4 is 5e-4 of every probability.

struct TokenStatsArgs {
    Rows logits;
    int64_t vocabulary;
    Strided<const int64_t> labels;
    Strided<float> out;  // rows: max, sum, nll
};

struct PairStatsArgs {
    Rows factual, counterfactual;
    int64_t vocabulary;
    Strided<const int64_t> labels;
    Strided<float> out;  // rows: max, sum, nll of z1, of z0, of z1 - z0; with_divergence: KL(p1 || p0), entropy of p1
    bool with_divergence;
};

struct TokenGradArgs {
    Rows logits;
    int64_t vocabulary;
    Strided<const int64_t> labels;
    Strided<const float> stats, grad_nll;  // `stats` as token_stats wrote them
    double softcap;  // 0: none
    double logit_scale;
};

struct PairGradArgs {
    Rows factual, counterfactual;
    int64_t vocabulary;
    Strided<const int64_t> labels;
    Strided<const float> stats;  // as pair_stats wrote them
    Strided<const float> grad_factual, grad_counterfactual, grad_effect;  // grad_counterfactual.data: null for zero
    double softcap;  // 0: none
    double logit_scale;
    bool detach_counterfactual;
};

// Each function works on rows [begin, end). A row is computed from its start to its end by one call, so how the rows
// are shared among threads cannot be seen in the result.
struct KernelTable {
    const char* name;
    void (*token_stats)(const TokenStatsArgs&, int64_t begin, int64_t end);
    void (*pair_stats)(const PairStatsArgs&, int64_t begin, int64_t end);
    void (*token_grad)(const TokenGradArgs&, int64_t begin, int64_t end);
    void (*pair_grad)(const PairGradArgs&, int64_t begin, int64_t end);
};

extern const KernelTable kBaselineKernels;
extern const KernelTable kAvx2Kernels;    // x86-64 only
extern const KernelTable kAvx512Kernels;  // x86-64 only

}  // namespace nextquill
