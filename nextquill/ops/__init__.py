"""The engine room: row plans, chunk kernels, autograd functions, dispatch by `impl`. Imports no public module.

The path of `loss_fn(h1, h0, W, labels)` to a kernel, with the file of each step, and what each makes (─►):

    losses          PairLoss.forward checks and flattens: h1, h0 [N, D], labels [N]       ─► HeadInputs (validation)
    loss_operator   torch.ops.nextquill.pair_loss, with the objective as text (objective_spec)
    row_groups      plan_rows finds the n rows that count and sorts them by sequence      ─► RowPlan
    registration    open_head takes W, b, softcap, scale, and chooses kernels (dispatch)  ─► ChunkedHead
    fused_loss      PairLossEngine.run, for each group of whole sequences                 ─► RowGroup
    chunks, head      one product writes the logits of h1 and h0 into a buffer            ─► Chunk
    chunk_*           kernels.pair_stats reads them: three nll's a row                    ─► PairNLL
    objective         weights and denominators, from the nll's                            ─► RowCoefficients
    chunk_*           kernels.pair_grad_ overwrites the logits with their gradient
    gradients         two or three products: dh1, dh0 [N, D], dW [V, D], db [V]           ─► HeadGradients

`loss.backward()` scales those. The operators `linear_*` take the same path through nll_operators and nll, and compute
their gradients in the backward.
"""
