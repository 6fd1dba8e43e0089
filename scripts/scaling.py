"""Predicts step time and efficiency on many accelerators, from the compiled step of a config.

Compiles the training step for meshes of simulated devices, from shapes alone, and reads arithmetic,
memory traffic and collectives off the partitioned program; then divides by the peak numbers of the
hardware. Nothing runs: these are predictions. See docs/scaling.md.

Example:
    python scripts/scaling.py --config do_pfn --mesh 8 4x2 64 32x2 256 128x2 --output scaling.json
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopfn_jax.config import Config, TableShape
from dopfn_jax.sharding import parse_mesh


@dataclass(frozen=True)
class Hardware:
    """Peak numbers of one kind of accelerator, from its vendor's data sheet.

    Attributes:
        flops: bfloat16 matrix FLOP/s.
        memory_bandwidth: bytes/s.
        link: bytes/s that a chip sends, and receives, within a group of `group` chips.
        outer_link: the same beyond the group.
        latency: seconds of one collective, start to end, on top of its bytes.
        fused_attention: whether the scores of attention stay on the chip.
    """

    name: str
    flops: float
    memory_bandwidth: float
    link: float
    outer_link: float
    group: int
    latency: float
    fused_attention: bool


HARDWARE = (
    Hardware("H100 SXM", 989e12, 3.35e12, 450e9, 50e9, 8, 20e-6, True),
    Hardware("TPU v5e", 197e12, 0.819e12, 100e9, 100e9, 256, 10e-6, False),
)
# Assumed share of the peak that matrix products of these widths reach.
MATRIX_EFFICIENCY = 0.4
# Assumed times that a layer reads or writes an array of all tokens: two attentions at 12 and an MLP
# at 17, once forward, once recomputed, and twice as much backward.
ACTIVATION_PASSES = 4 * (12 + 12 + 17)

_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s64": 8, "u64": 8}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(f32|bf16|f16|s32|u32|pred|s64|u64)\[([\d,]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One line of a compiled program."""

    name: str
    arrays: list[tuple[str, tuple[int, ...]]]
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of its inputs."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    def attribute(self, pattern: str) -> str | None:
        """First group of a pattern in its attributes, or None."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None


def read_program(text: str, context: int, head_width: int) -> dict[str, Any]:
    """Arithmetic, traffic and collectives of one device in one run of a compiled program.

    Loops count as often as they run, which XLA's own cost analysis leaves out.

    Args:
        text: from `compiled.as_text()`.
        context: size of the context axis; arrays of five axes that end in it are attention scores,
            or else, where the axis before is a head's width, keys and values.
        head_width: that width.

    Returns:
        flops: of matrix products. bytes: read and written outside fusions, without attention
        scores. score_bytes: those of attention scores. collectives: rows of kind, devices in a
        group, bytes of the whole array, and times run.
    """
    computations = dict(_computations(text))
    totals: dict[str, float] = defaultdict(float)
    collectives: dict[tuple[str, int, int], float] = defaultdict(float)

    def visit(name: str, times: float, fused: bool) -> None:
        instructions = {i.name: i for i in computations[name]}
        for i in instructions.values():
            if i.operation == "dot":
                totals["flops"] += times * _dot_flops(i, instructions)
            kind = i.operation.removesuffix("-start")
            if kind in _COLLECTIVES:
                arrays = i.arrays[-1:] if i.operation.endswith("-start") else i.arrays
                size, group = sum(map(_size, arrays)), _group_size(i)
                collectives[kind, group, size * group if kind == "reduce-scatter" else size] += (
                    times
                )
            if not fused and i.operation not in (
                "parameter",
                "constant",
                "tuple",
                "while",
                "call",
                "get-tuple-element",
                "bitcast",
                "conditional",
            ):
                read = [a for o in i.operands if o in instructions for a in instructions[o].arrays]
                if i.operation in ("dynamic-slice", "gather", "dynamic-update-slice"):
                    read = []
                for array in [*i.arrays, *read]:
                    ends = array[1][-2:] if len(array[1]) == 5 else ()
                    scores = len(ends) == 2 and ends[1] == context and ends[0] != head_width
                    totals["score_bytes" if scores else "bytes"] += times * _size(array)
            trips = float(i.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            for key in ("body", "calls", "to_apply"):
                called = i.attribute(rf"\b{key}=%?([\w.\-]+)")
                if called and (key != "to_apply" or i.operation == "call"):
                    visit(called, times * trips, fused or key == "calls")

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    assert entry is not None
    visit(entry[1], 1.0, False)
    rows = [
        {"kind": kind, "group": group, "bytes": size, "times": times}
        for (kind, group, size), times in sorted(collectives.items())
    ]
    return {**totals, "collectives": rows}


def _computations(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    name = ""
    lines: list[Instruction] = []
    for line in text.splitlines():
        if line.endswith("{") and "->" in line:
            name, lines = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%"), []
        elif line.startswith("}"):
            yield name, lines
        elif found := _INSTRUCTION.match(line):
            arrays = [
                (dtype, tuple(int(n) for n in dims.split(",") if n))
                for dtype, dims in _ARRAY.findall(found[2])
            ]
            lines.append(Instruction(found[1], arrays, found[3], found[4]))


def _size(array: tuple[str, tuple[int, ...]]) -> int:
    return _BYTES[array[0]] * math.prod(array[1])


def _dot_flops(dot: Instruction, instructions: dict[str, Instruction]) -> float:
    left = instructions[dot.operands[0]].arrays[0][1]
    contracted = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    inner = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    return 2.0 * inner * math.prod(dot.arrays[0][1])


def _group_size(collective: Instruction) -> int:
    """Devices that take part in one collective; XLA writes groups in three ways."""
    iota = collective.attribute(r"replica_groups=\[\d+,(\d+)\]")
    if iota:
        return int(iota)
    by_axis = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", collective.rest)
    if by_axis:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axis[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", by_axis[2]))
    listed = collective.attribute(r"replica_groups=\{\{([\d,]+)\}")
    if listed is None:
        raise ValueError(f"{collective.name}: cannot read its replica groups: {collective.rest}")
    return len(listed.split(","))


def predict(program: dict[str, Any], hardware: Hardware) -> dict[str, float]:
    """Milliseconds of a step by part.

    `memory_low` is the traffic of activations between fused kernels, `memory_high` that of the
    program as it was compiled here, for CPUs, in float32 and with little fusion. A step takes as
    long as arithmetic or memory, whichever is slower, and then its collectives.
    """
    _, model = parse_mesh(program["mesh"])
    scores = 0.0 if hardware.fused_attention else program["score_bytes"]
    compute = program["flops"] / (MATRIX_EFFICIENCY * hardware.flops)
    low = (program["activation_bytes"] + scores) / hardware.memory_bandwidth
    high = (program["bytes"] + scores) / hardware.memory_bandwidth
    collectives = 0.0
    for row in program["collectives"]:
        group = row["group"]
        # The model axis has neighbouring devices, the data axis every model-th one.
        reach = group if group == model else group * model
        link = hardware.link if reach <= hardware.group else hardware.outer_link
        passes = 2 if row["kind"] == "all-reduce" else 1  # a ring reduces, then gathers
        seconds = hardware.latency + passes * (group - 1) / group * row["bytes"] / link
        collectives += row["times"] * seconds if group > 1 else 0.0
    milliseconds = {
        "compute": compute,
        "memory_low": low,
        "memory_high": high,
        "collectives": collectives,
        "step_low": max(compute, low) + collectives,
        "step_high": max(compute, high) + collectives,
    }
    return {name: 1e3 * seconds for name, seconds in milliseconds.items()}


def activation_bytes(config: Config, shape: TableShape) -> float:
    """Bytes that fused kernels move for one batch: ACTIVATION_PASSES of 16-bit tokens a layer."""
    model = config.model
    group = model.features_per_token
    tokens = -(-config.prior.covariates // group) + 2 if group else 1
    rows = shape.context[1] + shape.rows - shape.context[0]  # as padded
    return 2.0 * shape.tasks * rows * tokens * model.width * model.layers * ACTIVATION_PASSES


def measure(config: Config, shape: TableShape, mesh_text: str) -> dict[str, Any]:
    """The program of one device of this mesh; in a process of its own, see `main`."""
    import jax

    from dopfn_jax.sharding import make_mesh
    from dopfn_jax.training.flops import model_flops
    from dopfn_jax.training.step import Trainer

    jax.config.update("jax_disable_most_optimizations", True)  # partitioned all the same
    mesh = make_mesh(parse_mesh(mesh_text))
    training = dataclasses.replace(config.training, shapes=(shape,))
    training = dataclasses.replace(
        training, validation=dataclasses.replace(training.validation, tasks=mesh.shape["data"])
    )
    trainer = Trainer(dataclasses.replace(config, training=training), mesh)
    compiled = trainer.lower_step(shape).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # CPU has both
    return {
        "mesh": mesh_text,
        "tasks": shape.tasks,
        "model_flops": model_flops(config, shape) / mesh.size,
        "activation_bytes": activation_bytes(config, shape) / mesh.size,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        **read_program(text, shape.context[1], config.model.width // config.model.heads),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="do_pfn", help="a preset or a TOML file")
    add("--mesh", nargs="+", default=["8", "4x2", "64", "32x2", "256", "128x2"])
    add("--tasks-per-device", type=int, default=1, help="of the data axis: weak scaling")
    add("--shape", type=int, default=-1, help="which of the config's shapes")
    add("--output", type=Path, help="JSON file for what was read off the programs")
    add("--programs", type=Path, help="such a file: predict from it, and compile nothing")
    add("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    config = Config.load(options.config)
    shape = config.training.shapes[options.shape]
    if options.measure:
        (mesh,) = options.mesh
        tasks = options.tasks_per_device * parse_mesh(mesh)[0]
        print(json.dumps(measure(config, dataclasses.replace(shape, tasks=tasks), mesh)))
        return 0
    if options.output:  # which is written after minutes of compiling
        options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.programs:
        programs = json.loads(options.programs.read_text())
    else:
        words = [sys.executable, __file__, "--measure", "--config", options.config]
        words += ["--shape", str(options.shape)]
        words += ["--tasks-per-device", str(options.tasks_per_device)]
        programs = []
        for mesh in options.mesh:
            print(f"compiling for {mesh}", file=sys.stderr)
            result = subprocess.run(
                [*words, "--mesh", mesh],
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            programs.append(json.loads(result.stdout))
    if options.output:
        options.output.write_text(json.dumps(programs, indent=1) + "\n")
    print(table(programs))
    return 0


def table(programs: Sequence[dict[str, Any]]) -> str:
    """Markdown: predicted milliseconds a step, for every program and kind of hardware.

    Efficiency is tasks per second and chip, relative to the first program.
    """
    lines = [
        "| chips | mesh | tasks | compute | memory | collectives | step | tasks/s | efficiency "
        "| bottleneck |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for hardware in HARDWARE:
        rates = []
        for program in programs:
            data, model = parse_mesh(program["mesh"])
            chips, tasks, part = data * model, program["tasks"], predict(program, hardware)
            rates.append(tasks / chips / part["step_low"])
            names = {"compute": "compute", "memory_low": "memory", "collectives": "collectives"}
            slowest = max(names, key=lambda name: part[name])
            fastest, longest = (1e3 * tasks / part[f"step_{end}"] for end in ("low", "high"))
            lines.append(
                f"| {chips} {hardware.name} | {data}x{model} | {tasks} | {part['compute']:.1f} | "
                f"{part['memory_low']:.1f} to {part['memory_high']:.0f} | "
                f"{part['collectives']:.1f} | {part['step_low']:.1f} to {part['step_high']:.0f} | "
                f"{longest:,.0f} to {fastest:,.0f} | {rates[-1] / rates[0]:.0%} | "
                f"{names[slowest]} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
