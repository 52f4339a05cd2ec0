// The arguments of a call and the table of functions, which all instruction-set levels share.
//
// Only plain structs and C headers belong here. The files behind a table are compiled with instructions that the
// machine may lack. If one of them compiled an inline function of the standard library, the linker could keep that copy
// for all callers.
#pragma once

#include <stdint.h>

namespace nextquill {

// A view of one or two dimensions of a tensor; strides count elements.
template <class T>
struct Strided {
    T* data;
    int64_t row_stride;
    int64_t stride;

    T& at(int64_t i) const { return data[i * stride]; }
    T& at(int64_t row, int64_t i) const { return data[row * row_stride + i * stride]; }
};

// Rows [n, V] of logits; the elements of a row are contiguous.
struct Rows {
    float* data;
    int64_t row_stride;

    float* row(int64_t i) const { return data + i * row_stride; }
};

// The statistics of a row are its largest logit, the sum of exp(z - max), and the NLL. So p = exp(z - max) / sum. A
// logsumexp in float32 would have a relative error of 2^-25, which at |z| = 1e4 changes every probability by 5e-4.

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
    Strided<const float> stats, grad_nll;  // `stats` are written by token_stats
    double softcap;  // 0 for none
    double logit_scale;
};

struct PairGradArgs {
    Rows factual, counterfactual;
    int64_t vocabulary;
    Strided<const int64_t> labels;
    Strided<const float> stats;  // written by pair_stats
    Strided<const float> grad_factual, grad_counterfactual, grad_effect;  // grad_counterfactual.data is null for zero
    double softcap;  // 0 for none
    double logit_scale;
    bool detach_counterfactual;
};

struct JsdStatsArgs {
    Rows student, teacher;
    int64_t vocabulary;
    Strided<float> out;  // rows: max and sum of z1, of z0, KL(p1 || m), jsd
    double beta;         // weight of the teacher in m
    bool normalised;     // the first four rows of `out` are given
};

struct JsdGradArgs {
    Rows student, teacher;
    int64_t vocabulary;
    Strided<const float> stats, grad;  // `stats` are written by jsd_stats
    double beta, softcap;              // a softcap of 0 is none
    double logit_scale;
};

// Each function works on rows [begin, end). One call computes a row from start to end, so the result does not depend on
// the division of rows among threads.
struct KernelTable {
    const char* name;
    void (*token_stats)(const TokenStatsArgs&, int64_t begin, int64_t end);
    void (*pair_stats)(const PairStatsArgs&, int64_t begin, int64_t end);
    void (*token_grad)(const TokenGradArgs&, int64_t begin, int64_t end);
    void (*pair_grad)(const PairGradArgs&, int64_t begin, int64_t end);
    void (*jsd_stats)(const JsdStatsArgs&, int64_t begin, int64_t end);
    void (*jsd_grad)(const JsdGradArgs&, int64_t begin, int64_t end);
};

extern const KernelTable kBaselineKernels;
extern const KernelTable kAvx2Kernels;    // x86-64 only
extern const KernelTable kAvx512Kernels;  // x86-64 only

}  // namespace nextquill
