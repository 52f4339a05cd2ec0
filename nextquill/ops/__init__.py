"""The engine room: row plans, chunk kernels, autograd functions, dispatch by `impl`. Imports no public module.

How `loss_fn(h1, h0, W, labels)` reaches a kernel: the file of each step, and the object it makes (─►):

    losses          PairLoss.forward checks and flattens: h1, h0 [N, D], labels [N]       ─► HeadInputs (validation)
    loss_operator   torch.ops.nextquill.pair_loss, with the objective as text (objective_spec)
    row_groups      plan_rows finds the n rows that count and sorts them by sequence      ─► RowPlan
    registration    open_head takes W, b, softcap, scale, and chooses kernels (dispatch)  ─► ChunkedHead
    fused_loss      PairLossEngine.run, for each group of whole sequences                 ─► RowGroup
    chunks, head      one product writes the logits of h1 and h0 into a buffer            ─► Chunk
    chunk_*           kernels.pair_stats reads them: three NLLs per row                   ─► PairNLL
    objective         weights and denominators, from the NLLs                             ─► RowCoefficients
    chunk_*           kernels.pair_grad makes their gradient of them
    chunks            collects it until there are rows enough for a fast product (on GPUs)  ─► GradientBuffer
    gradients         two or three products: dh1, dh0 [N, D], dW [V, D], db [V]           ─► HeadGradients

If processes divide the vocabulary, W is one part of it (shard_exchange). Its OpenShard completes the statistics before
PairNLL, and HeadGradients adds up dh.

`loss.backward()` scales those gradients. For MIRROR the kernels are jsd_stats and jsd_grad. The operators `linear_*` go
through nll_operators and nll (or jsd) instead of loss_operator and fused_loss, and compute their gradients in the
backward.
"""
