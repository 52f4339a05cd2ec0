"""The kernels compiled for other GPUs: no spills, shared memory that fits, wide accesses, 64-bit addresses.

Under the interpreter the kernels are Python functions, so they are compiled in processes without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nextquill_kernels import chunk_grad
from nextquill_kernels.crosscompile import SHARED_LIMIT, TARGETS, Resources, refuse
from nextquill_kernels.launch import INTERPRETED

pytestmark = pytest.mark.compiles


def variants(*names: str) -> set[str]:
    """These cases, each also for a V that is not a multiple of 16, and with bias, scale and cap."""
    return {f"{name}{more}" for name in names for more in ("", "/odd_vocabulary", "/finishing")}


JSD = ("jsd_stats", "jsd_stats/normalised", "jsd_grad/fp32", "jsd_grad/bf16")
CASES = {
    "chunk_stats": variants("token_stats", "pair_stats", "pair_stats/moments"),
    "chunk_grad": variants(
        "token_grad/fp32", "token_grad/bf16", "pair_grad/fp32", "pair_grad/bf16", "pair_grad/detached_bf16"
    ),
    "jsd": variants(*JSD) | {f"{name}/beta_{end}" for name in JSD for end in (0, 1)},
    "coefficients": {f"row_coefficients/{scheme}" for scheme in ("uniform", "threshold", "clip", "exp_clip")},
}

ROWS = CASES["chunk_stats"] | CASES["chunk_grad"] | CASES["jsd"]  # the kernels that walk along rows of logits

# Looks at the assembly and the intermediate representation of every case; prints a JSON object by case and target.
LOOK = r"""
import dataclasses, json, re, sys, triton, triton.language as tl
from nextquill_kernels import chunk_grad, chunk_stats, coefficients, jsd
from nextquill_kernels.crosscompile import CompileCase

@triton.jit
def narrow_address_kernel(x_ptr, x_stride, row_stride):
    row = tl.program_id(0)
    tl.store(x_ptr + row * x_stride + tl.program_id(1).to(tl.int64) * row_stride, 1.0)

@triton.jit
def spilling_kernel(x_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    b_x = tl.load(x_ptr + lanes)
    b_total = tl.zeros([N], tl.float32)
    for step in range(100):
        b_y = tl.load(x_ptr + step * N + lanes)
        b_total += tl.sum(b_x * b_y, axis=0) + b_y
    tl.store(out_ptr + lanes, b_total)

def uses_in_32_bits(ttir):
    "Lines that use a stride or a program's index other than to extend it to 64 bits."
    head = re.search(r"tt\.func public .*", ttir)[0]
    names = re.findall(r"(%\w*stride\w*): i32", head) + re.findall(r"(%\w+) = tt\.get_program_id", ttir)
    lines = [line.split(" loc(")[0].strip() for line in ttir.splitlines() if "tt.func" not in line]
    used = [(name, line) for line in lines for name in names if re.search(name + r"\b(?!\s*=)", line)]
    return [line for name, line in used if f"arith.extsi {name} : i32 to i64" not in line], len(names)

target = sys.argv[1]
WIDE_LOAD = r"(?:global|buffer)_load_dwordx4|ld\.global[\w.:]*\.v4"
WIDE_COPY = r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (?:16|0x10)"
modules = chunk_stats, chunk_grad, jsd, coefficients
cases = [case for module in modules for case in module.compile_cases()]
strides = {"x_ptr": "*fp32", "x_stride": "i32", "row_stride": "i32"}
cases.append(CompileCase("narrow_address", narrow_address_kernel, strides, {}))
known = [name for name in cases[0].divisible_by_16 if name != "x_stride"]
cases.append(dataclasses.replace(cases[0], name="unknown_stride", divisible_by_16=known))
cases.append(CompileCase("spilling", spilling_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32"}, {"N": 32768}))
found = {}
for case in cases:
    resources = case.compile(target)
    text = resources.assembly
    uses, names = uses_in_32_bits(resources.ttir)
    found[case.name] = {
        "uses_in_32_bits": uses,
        "names": names,
        "spill_bytes": resources.spill_bytes,
        "registers": resources.registers,
        "shared_bytes": resources.shared_bytes,
        "num_warps": case.num_warps,
        "wide_loads": len(re.findall(f"{WIDE_LOAD}|{WIDE_COPY}", text)),
        "wide_copies": len(re.findall(WIDE_COPY, text)),
        "readonly_loads": len(re.findall(r"ld\.global[\w.:]*\.nc", text)),
    }
print(json.dumps(found))
"""


def run(*arguments: str, cache: Path, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """An empty compiler cache, so that it holds no other version of a kernel."""
    return tmp_path_factory.mktemp("triton_cache")


@pytest.fixture(scope="module", params=["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def look(request, cache, tmp_path_factory) -> dict[str, dict]:
    script = tmp_path_factory.mktemp("look") / "look.py"  # Triton reads the source of a kernel from its file
    script.write_text(LOOK)
    done = run(str(script), request.param, cache=cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_fits(cache, target):
    modules = [argument for name in CASES for argument in ("--module", name)]
    done = run("-m", "nextquill_kernels.crosscompile", *modules, "--target", target, cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    mine = {record["case"]: record for record in map(json.loads, done.stdout.splitlines())}
    assert {record["target"] for record in mine.values()} == {target}
    assert mine.keys() == set().union(*CASES.values())
    for record in mine.values():
        assert record["error"] is None
        assert record["spill_bytes"] == 0
        assert 0 <= record["shared_bytes"] <= SHARED_LIMIT[target]
        if "coefficients" not in record["case"] and target in ("sm_80", "sm_90"):
            assert 0 < 3 * 32 * record["num_warps"] * record["registers"] <= 65536


def test_addresses_are_computed_in_64_bits(look):
    for name, found in look.items():
        assert found["names"] > 0 or name == "spilling"
        if name == "narrow_address":
            assert len(found["uses_in_32_bits"]) > 0
        else:
            assert found["uses_in_32_bits"] == []


def test_spills_are_found(look):
    assert look["spilling"]["spill_bytes"] > 0


def test_accesses_are_16_bytes_wide(look):
    for name in ROWS:
        assert look[name]["wide_loads"] >= 1, name
        # A read-only load of memory that the kernel writes may come from a stale cache.
        assert look[name]["readonly_loads"] == 0


# Programs that a multiprocessor should hold at once, so that enough bytes are in flight; moments are for evaluation.
PROGRAMS = {"token_stats": 6, "pair_stats": 4, "pair_stats/moments": 3, "token_grad": 6, "pair_grad": 5}
PROGRAMS |= {"jsd_stats": 4, "jsd_grad": 6}


def test_tiles_are_copied_ahead(look, request):
    """The next tiles of a row are copied to shared memory meanwhile. A prefetch into registers would be undone."""
    if request.node.callspec.params["look"] != "sm_90":
        pytest.skip("asynchronous copies are NVIDIA's")
    for name in ROWS:
        streams = 1 if name.startswith("token") else 2
        loops = 2 if name.startswith("jsd_stats") and "normalised" not in name else 1
        found = look[name]
        # Two tiles before a loop and one in it, of each stream and of the bias.
        assert found["wide_copies"] == 3 * loops * (streams + ("finishing" in name)), name
        assert found["spill_bytes"] == 0
        kernel = name if "moments" in name else name.split("/")[0]
        programs = PROGRAMS[kernel.removesuffix("/odd_vocabulary").removesuffix("/finishing")]
        assert programs * 32 * found["num_warps"] * found["registers"] <= 65536, f"{name}: {found['registers']}"
        assert programs * (found["shared_bytes"] + 1024) <= 228 * 1024


def test_wide_loads_need_a_known_row_stride(look):
    """The check of wide loads can fail: without a known stride, there are none."""
    assert look["unknown_stride"]["wide_loads"] == 0


def test_claims_of_alignment_that_no_launch_makes_are_refused(cache):
    code = """
import dataclasses
from nextquill_kernels import chunk_grad
case = chunk_grad.compile_cases()[0]
try:
    dataclasses.replace(case, divisible_by_16=["x_ptr", "grad_ptr"]).compile("sm_90")
except ValueError as error:
    print(error)
"""
    done = run("-c", code, cache=cache)
    assert "divisible_by_16: expected arguments that the kernel is specialised on, got ['grad_ptr']" in done.stdout


def test_refuse_names_the_figures():
    with pytest.raises(ValueError, match="sm_90: expected no spills, got 24 bytes at 255 registers"):
        refuse(Resources("sm_90", 255, 24, 0))
    with pytest.raises(ValueError, match="gfx942: expected at most 65536 bytes of shared memory, got 65537"):
        refuse(Resources("gfx942", 100, 0, 65537))
    for target, limit in {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}.items():
        refuse(Resources(target, 255, 0, limit))


def test_unknown_target():
    with pytest.raises(ValueError, match=r"target: expected one of sm_80, sm_90, sm_100, gfx942, sm_86, .*got 'sm_75'"):
        chunk_grad.compile_cases()[0].compile("sm_75")


@pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here")
def test_interpreted_kernels_are_refused():
    case = chunk_grad.compile_cases()[0]
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected it to be unset"):
        case.compile("sm_90")


def test_command_line_refuses_the_interpreter(cache):
    done = run("-m", "nextquill_kernels.crosscompile", "--target", "sm_90", cache=cache, interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET: expected it to be unset" in done.stderr


@pytest.mark.slow
def test_command_line_reports_a_refusal(cache):
    code = """
import dataclasses, sys
from nextquill_kernels import chunk_stats, crosscompile
good = chunk_stats.compile_cases()[0]
too_large = dataclasses.replace(good, name="too_large", constexprs={**good.constexprs, "BLOCK_V": 32768})
incomplete = dataclasses.replace(good, name="incomplete", constexprs={})
chunk_stats.compile_cases = lambda: [too_large, incomplete, good]
sys.exit(crosscompile.main(["--target", "sm_90", "--module", "chunk_stats"]))
"""
    done = run("-c", code, cache=cache)
    assert done.returncode == 1, done.stderr
    errors = {record["case"]: record["error"] for record in map(json.loads, done.stdout.splitlines())}
    assert errors["token_stats"] is None
    assert errors["too_large"].startswith("ValueError: sm_90: expected no spills")
    assert errors["incomplete"].startswith("ValueError: signature, constexprs: expected")
