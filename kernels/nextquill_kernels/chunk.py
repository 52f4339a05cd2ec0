"""Label statistics of a chunk of logits, and its gradient.

The four launchers walk [n, V] float32 products x = h Wᵀ, one program per row, in tiles of BLOCK_V columns, and compute
the logits z = cap(scale (x + b)) as they go. A chunk of the training engine has at least a few hundred rows, which
fills a GPU of 80 to 200 multiprocessors. So one program computes a whole row and nothing needs combining afterwards: no
atomics, bitwise repeatable.

Memory bandwidth limits all four. While a program works on one tile, the next ones are copied into shared memory
(cp.async). A prefetch into registers, written by hand, does not survive ptxas, which sinks the loads to their use.
Accesses are 16 bytes wide if the row stride is a multiple of 16 numbers. Otherwise, and in the last tile of a row if V
is not a multiple of 16, they are 4 bytes wide (still coalesced).

With y the label of a row, and z1, z0 the logits with and without the user's history:

    nll_f = lse(z1) - z1[y]        nll_c = lse(z0) - z0[y]        nll_e = lse(z1 - z0) - (z1 - z0)[y]
    dz1 = g_f (p1 - onehot) + g_e (pe - onehot)        dz0 = g_c (p0 - onehot) - g_e (pe - onehot)

The statistics of a row are the largest logit, the sum of exp(z - max), and the nll, for each of z1, z0 and z1 - z0.
The gradients compute the softmax from these three:

    p = exp(z - max) / sum        p[y] - 1 = exp(-nll) - 1

A logsumexp has a rounding error in proportion to its size, and exp(z - logsumexp) would inherit it: 5e-4 at |z| = 1e4.

A row with a negative label is ignored: its statistics and gradients are exactly 0, whatever the logits hold. A label of
V or more makes the row's nll NaN. Neither is ever used as an address.
"""

from nextquill_kernels.chunk_grad import pair_grad, token_grad
from nextquill_kernels.chunk_stats import pair_stats, token_stats

__all__ = ["pair_grad", "pair_stats", "token_grad", "token_stats"]
