"""Mutations of the Triton kernels, and of those in C++, which are built again for each."""

from tools.mutation import Mutation

_FOLDER = "kernels/nextquill_kernels"
_NATIVE = ("tests/native", "tests/ops", "tests/test_implementations.py")

MUTATIONS = (
    Mutation(
        "kernels-tail-counted",
        f"{_FOLDER}/logits.py",
        'return b_z if mask is None else tl.where(mask, b_z, float("-inf"))',
        "return b_z",
        "columns beyond the vocabulary add to the sum",
    ),
    Mutation(
        "kernels-effect-label",
        f"{_FOLDER}/chunk_stats.py",
        "label, me, se, y1 - y0)",
        "label, me, se, y1 + y0)",
        "nll_effect takes the labels' logits with a wrong sign",
    ),
    Mutation(
        "kernels-kl-sign",
        f"{_FOLDER}/chunk_stats.py",
        "- (tl.log(s1) - tl.log(s0))",
        "+ (tl.log(s1) - tl.log(s0))",
        "KL is off by twice the difference of the logsums",
    ),
    Mutation(
        "kernels-onehot",
        f"{_FOLDER}/chunk_grad.py",
        "b_dz = tl.where(cols == label, at_label,",
        "b_dz = tl.where(cols == label + 1, at_label,",
        "the gradient pushes the token after the label",
    ),
    Mutation(
        "kernels-ignored-gradient",
        f"{_FOLDER}/chunk_grad.py",
        "b_dx = tl.where(label < 0, 0.0, backward(b_dz, b_z, softcap, factor, HAS_CAP))",
        "b_dx = backward(b_dz, b_z, softcap, factor, HAS_CAP)",
        "ignored rows get a gradient",
    ),
    Mutation(
        "kernels-cap-factor",
        f"{_FOLDER}/chunk_grad.py",
        "logit_scale / softcap**2",
        "logit_scale / softcap",
        "gradients under a softcap are too large by its value",
    ),
    Mutation(
        "kernels-bias-after-scale",
        f"{_FOLDER}/logits.py",
        """\
    if HAS_BIAS:
        b_x += b_bias
    if HAS_SCALE:
        b_x *= logit_scale
""",
        """\
    if HAS_SCALE:
        b_x *= logit_scale
    if HAS_BIAS:
        b_x += b_bias
""",
        "logit_scale leaves the bias out",
    ),
    Mutation(
        "kernels-nan-weight",
        f"{_FOLDER}/coefficients.py",
        "        b_weights = tl.where(b_effect != b_effect, b_effect, b_weights)\n",
        "",
        "a counterfactual of NaN leaves a finite loss on a GPU",
    ),
    Mutation(
        "kernels-coefficients-base",
        f"{_FOLDER}/coefficients.py",
        "start = tl.load(offset_ptr + sequence) - base",
        "start = tl.load(offset_ptr + sequence)",
        "sequences of a later chunk are weighted by other rows",
    ),
    Mutation(
        "kernels-stream-second-pass",
        f"{_FOLDER}/stream_kernel.py",
        "source = tl.load(order_ptr + first_token + slot, mask=is_row, other=0)",
        "source = tl.load(order_ptr + slot, mask=is_row, other=0)",
        "rows beyond the first 8192 are scored as if they were the first",
    ),
    Mutation(
        "kernels-stream-mask",
        f"{_FOLDER}/stream_kernel.py",
        '_fold(tl.where(inside, b_z1 - b_z0, float("-inf")), b_tope, b_sume)',
        "_fold(b_z1 - b_z0, b_tope, b_sume)",
        "nll_effect counts columns beyond the vocabulary",
    ),
    Mutation(
        "kernels-stream-first-ignored",
        f"{_FOLDER}/stream_kernel.py",
        "is_row = token < count",
        "is_row = token <= count",
        "the first ignored row is not 0",
    ),
    Mutation(
        "kernels-stride-unchecked",
        f"{_FOLDER}/launch.py",
        "if dense and tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:",
        "if dense and tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) == 0:",
        "strided logits are read as if they were dense",
    ),
    Mutation(
        "kernels-spills-accepted",
        f"{_FOLDER}/crosscompile.py",
        "    if resources.spill_bytes:\n",
        "    if resources.spill_bytes < 0:\n",
        "kernels that spill pass the check",
    ),
    Mutation(
        "kernels-stages-do-not-fit",
        f"{_FOLDER}/tiles.py",
        "min(self.num_stages, (shared_memory - 1024) // stage)",
        "min(self.num_stages, shared_memory // stage + 1)",
        "a borrowed tile asks for more shared memory than the GPU has",
    ),
    Mutation(
        "csrc-tail-counted",
        "csrc/src/row_kernels.hpp",
        "if (tail) last[0] = Vec::load_tail(block + whole, tail, -kInfinity);",
        "if (tail) last[0] = Vec::load_tail(block + whole, tail, 0);",
        "lanes beyond the vocabulary add exp(0) to the sum",
        _NATIVE,
    ),
    Mutation(
        "kernels-jsd-divergence",
        f"{_FOLDER}/jsd.py",
        "b_dz = -grad * (1.0 - beta) * b_p1 * (b_above1 + kl1)",
        "b_dz = -grad * (1.0 - beta) * b_p1 * b_above1",
        "the gradient of the divergence does not add up to 0",
    ),
    Mutation(
        "csrc-jsd-gap",
        "csrc/src/jsd_kernels.hpp",
        "::log(sum0 / sum1)",
        "::log(sum1 / sum0)",
        "log-probabilities of student and teacher differ by a wrong constant",
        _NATIVE,
    ),
    Mutation(
        "csrc-label-under-cap",
        "csrc/src/row_kernels.hpp",
        "return logit_scale * (1 - ratio * ratio);",
        "return logit_scale * (1 - ratio);",
        "the label's gradient is wrong under a softcap",
        _NATIVE,
    ),
    Mutation(
        "csrc-effect-sign",
        "csrc/src/row_kernels.hpp",
        "effect.write(out, 6, row, z1 - z0);",
        "effect.write(out, 6, row, z0 - z1);",
        "nll_effect takes the labels' logits with a wrong sign",
        _NATIVE,
    ),
    Mutation(
        "csrc-label-of-v",
        "csrc/src/module.cpp",
        "labels.at(i) > vocabulary_)",
        "labels.at(i) > vocabulary_ + 1)",
        "a label above V reads memory that is not the tensor's",
        _NATIVE,
    ),
)
