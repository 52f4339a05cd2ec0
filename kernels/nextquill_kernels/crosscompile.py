"""Compile kernels for GPUs that this machine does not have, and report registers, spills and shared memory.

A kernel module registers its configurations in a function `compile_cases() -> list[CompileCase]`. This command compiles
all of them and writes one JSON line each:

    python -m nextquill_kernels.crosscompile --target sm_90 --target gfx942

It exits with status 1 if a case does not compile, spills, or exceeds the target's shared memory. It must run without
TRITON_INTERPRET, which replaces the kernels by Python functions.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import nextquill_kernels
from nextquill_kernels.launch import INTERPRETED, RowTile

_GPU_TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TARGETS = tuple(_GPU_TARGETS)
# GPUs that use the tiles of another target, or the portable ones: compiled on request, without entries in the table.
OTHER_TARGETS = {
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_120": ("cuda", 120, 32),
    "sm_121": ("cuda", 121, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}

# Bytes of shared memory one program may use.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99 * 1024),
    **dict.fromkeys(("gfx90a", "gfx1100"), 64 * 1024),
}


@dataclass(frozen=True)
class Resources:
    """The resources that one program of a compiled kernel uses.

    Attributes:
        target: a name of `TARGETS` or `OTHER_TARGETS`.
        registers: 32-bit registers per thread (vector registers on AMD).
        spill_bytes: bytes per thread spilled to memory: stores plus loads, or 4 per spilled vector register on AMD.
        shared_bytes: bytes of shared memory per program.
        assembly: the PTX or AMD assembly.
        ttir: Triton's own intermediate representation, before layouts are chosen.
    """

    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    assembly: str = dataclasses.field(default="", repr=False)
    ttir: str = dataclasses.field(default="", repr=False)


@dataclass(frozen=True)
class CompileCase:
    """One configuration to compile.

    Attributes:
        name: name of the case.
        kernel: a function decorated with `triton.jit`.
        signature: the type of each run-time argument, such as "*fp32", "i64" or "fp32"; None for one that is left out.
        constexprs: the value of each compile-time argument.
        num_warps: warps per program; half as many on AMD GPUs, whose warps have 64 threads, with `halve_on_amd`.
        num_stages: stages of software pipelining.
        divisible_by_16: names of pointers and integers that are multiples of 16; at a launch Triton detects this.
        targets: the targets it is meant for.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | None]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible_by_16: Sequence[str] = ()
    targets: Sequence[str] = TARGETS
    halve_on_amd: bool = False

    def warps(self, target: str) -> int:
        """Return the warps per program on a target."""
        return self.num_warps // 2 if self.halve_on_amd and target.startswith("gfx") else self.num_warps

    def compile(self, target: str) -> Resources:
        """Compile for a target such as "sm_90" and return the resources that the kernel uses there; needs no GPU.

        Raises:
            ValueError: the target is unknown; an argument of the kernel is in neither or both of the mappings; the
                kernel forbids Triton to specialise on an argument in `divisible_by_16`.
            RuntimeError: the kernels were imported under TRITON_INTERPRET.
        """
        known = _GPU_TARGETS | OTHER_TARGETS
        if target not in known:
            raise ValueError(f"target: expected one of {', '.join(known)}, got {target!r}")
        if INTERPRETED:
            raise RuntimeError("TRITON_INTERPRET: expected it to be unset when triton is imported, got 1")
        source = self._source()
        knobs = triton.knobs
        # ptxas reports while it compiles: a kernel found in the cache would have no report.
        with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(io.StringIO()) as ptxas_report:
            knobs.nvidia.dump_ptxas_log = True
            knobs.compilation.always_compile = True
            compiled = triton.compile(
                source,
                target=GPUTarget(*known[target]),
                options={"num_warps": self.warps(target), "num_stages": self.num_stages},
            )
        is_amd = target.startswith("gfx")
        assembly = compiled.asm["amdgcn" if is_amd else "ptx"]
        registers, spills = _amd_usage(assembly) if is_amd else _nvidia_usage(ptxas_report.getvalue())
        return Resources(target, registers, spills, int(compiled.metadata.shared), assembly, compiled.asm["ttir"])

    def _source(self) -> ASTSource:
        names, params = list(self.kernel.arg_names), self.kernel.params
        if sorted(names) != sorted([*self.signature, *self.constexprs]):
            raise ValueError(
                f"signature, constexprs: expected {names} to be divided between them, "
                f"got {list(self.signature)} and {list(self.constexprs)}"
            )
        forbidden = {each.name for each in params if each.do_not_specialize or each.do_not_specialize_on_alignment}
        if unspecialised := sorted(forbidden.intersection(self.divisible_by_16)):
            raise ValueError(
                f"divisible_by_16: expected arguments that the kernel is specialised on, got {unspecialised}"
            )
        left_out = {name: None for name, kind in self.signature.items() if kind is None}
        return ASTSource(
            fn=self.kernel,
            signature={name: self.signature.get(name) or "constexpr" for name in names},
            constexprs={**self.constexprs, **left_out},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible_by_16},
        )


def row_case(name: str, kernel: Any, tile: RowTile, signature: Mapping[str, str | None], **flags: Any) -> CompileCase:
    """Return the case of a kernel that walks along rows of logits: no bias, scale or cap, and V a multiple of 16."""
    aligned = [name for name, kind in signature.items() if kind and name.startswith(("x", "out1", "out0", "V"))]
    # The gradient's `out` is aligned as the logits are; the statistics' is not.
    aligned += [name for name in ("out_ptr", "out_stride") if "stats_ptr" in signature and name in signature]
    constexprs = {**tile.constants, "HAS_SCALE": False, "HAS_CAP": False, **flags}
    return CompileCase(name, kernel, signature, constexprs, tile.threads // 32, 1, aligned, halve_on_amd=True)


def variants(case: CompileCase) -> list[CompileCase]:
    """Return a case, the same for a V that is no multiple of 16 (a row stride is), and with bias, scale and cap."""
    finishing = {"HAS_SCALE": True, "HAS_CAP": True}
    return [
        case,
        dataclasses.replace(
            case,
            name=f"{case.name}/odd_vocabulary",
            divisible_by_16=[name for name in case.divisible_by_16 if name != "V"],
        ),
        dataclasses.replace(
            case,
            name=f"{case.name}/finishing",
            signature={**case.signature, "bias_ptr": "*fp32"},
            constexprs={**case.constexprs, **finishing},
            divisible_by_16=[*case.divisible_by_16, "bias_ptr"],
        ),
    ]


def refuse(resources: Resources) -> None:
    """Raise ValueError if a kernel spills registers or needs more shared memory than its target has."""
    if resources.spill_bytes:
        raise ValueError(
            f"{resources.target}: expected no spills, got {resources.spill_bytes} bytes "
            f"at {resources.registers} registers"
        )
    limit = SHARED_LIMIT[resources.target]
    if resources.shared_bytes > limit:
        raise ValueError(
            f"{resources.target}: expected at most {limit} bytes of shared memory, got {resources.shared_bytes}"
        )


def _nvidia_usage(report: str) -> tuple[int, int]:
    """Return registers and spilled bytes, stores plus loads, as `ptxas -v` reports them."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", report)]
    if not registers or not spills:
        raise RuntimeError(f"ptxas: expected a report of registers and spills, got {report!r}")
    return max(registers), sum(spills)


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Return vector registers and spill slots, from the metadata in the assembly."""
    values = {}
    for name in ("vgpr_count", "vgpr_spill_count"):
        found = re.findall(rf"\.{name}:\s+(\d+)", assembly)
        if not found:
            raise RuntimeError(f"gfx942: expected .{name} in the assembly's metadata, got none")
        values[name] = max(map(int, found))
    # Spills of scalar registers are not counted: they go to lanes of vector registers, without memory traffic.
    return values["vgpr_count"], 4 * values["vgpr_spill_count"]


def registered_cases(modules: Sequence[str] = ()) -> Iterator[CompileCase]:
    """Yield the cases of this package's modules (all of them, or those named), in the modules' order."""
    known = sorted(info.name for info in pkgutil.iter_modules(nextquill_kernels.__path__))
    if unknown := set(modules) - set(known):
        raise ValueError(f"modules: expected some of {known}, got {sorted(unknown)}")
    for name in modules or known:
        module = importlib.import_module(f"nextquill_kernels.{name}")
        if hasattr(module, "compile_cases"):
            yield from module.compile_cases()


def report(targets: Sequence[str], modules: Sequence[str] = ()) -> Iterator[dict[str, object]]:
    """Compile every registered case and yield a record of each: name, target, figures, and why it fails (or None)."""
    for case in registered_cases(modules):
        for target in targets:
            if target not in case.targets:
                continue
            record: dict[str, object] = {"case": case.name, "target": target, "error": None}
            try:
                resources = case.compile(target)
                record.update(
                    registers=resources.registers,
                    spill_bytes=resources.spill_bytes,
                    shared_bytes=resources.shared_bytes,
                    num_warps=case.warps(target),
                )
                refuse(resources)
            except Exception as error:  # noqa: BLE001 - compilers raise anything, and the other cases must still run
                record["error"] = f"{type(error).__name__}: {error}"
            yield record


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the registered cases and write one JSON line each to standard output; the status is 1 if any fails."""
    parser = argparse.ArgumentParser(prog="python -m nextquill_kernels.crosscompile", description=main.__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; all targets by default")
    parser.add_argument("--module", action="append", help="repeatable; all kernel modules by default")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET: expected it to be unset, got 1")
    failed = False
    for record in report(options.target or TARGETS, options.module or ()):
        failed |= record["error"] is not None
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
