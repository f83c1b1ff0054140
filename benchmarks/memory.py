"""Peak memory by sequence length, ours beside jax.nn's.

    python -m benchmarks.memory --out memory.jsonl --plot memory.png

Two figures: what XLA plans for the compiled program (results and temporaries, known
without running it), and on a GPU the allocator's peak above the operands, each from a
process of its own, since a peak is never reset.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import arrays, environment, modes
from benchmarks.contenders import contenders, on_gpu
from benchmarks.correctness import failure
from benchmarks.workloads import Workload

_LENGTHS = "512,1024,2048,4096,8192,16384,32768,65536"


_HEADS = 16


def _workload(seqlen: int, heads: int) -> Workload:
    source = "the head_dim of Llama 3, arXiv:2407.21783"
    return Workload(
        f"memory_s{seqlen}", 1, seqlen, heads, heads, 128, causal=True, source=source
    )


def measure(
    contender_name: str, seqlen: int, gradients: bool, heads: int = _HEADS
) -> dict[str, Any]:
    """Returns the memory that one contender takes for one length.

    Args:
        contender_name: a JAX contender's name.
        seqlen: the sequence length, with one batch entry, heads of 128, causal.
        gradients: the forward and the backward pass instead of the forward alone.
        heads: how many heads.

    Returns:
        A JSON object: `planned_bytes`, and on a GPU `peak_bytes`, both without the
        operands; or a `status` and a `reason`.
    """
    workload = _workload(seqlen, heads)
    mode = "both" if gradients else "fwd"
    fields: dict[str, Any] = {"contender": contender_name, "seqlen": seqlen}
    fields |= {"mode": mode, "heads": heads}
    try:
        attend = contenders()[contender_name].build(workload)
        operands = jax.block_until_ready(arrays.make(workload).every)
        arguments = operands if gradients else operands[:3]
        step = modes.forward_and_backward(attend) if gradients else attend
        compiled = jax.jit(step).lower(*arguments).compile()
        planned: Any = compiled.memory_analysis()
        fields["planned_bytes"] = (
            planned.temp_size_in_bytes + planned.output_size_in_bytes
        )
        if on_gpu():
            fields["peak_bytes"] = _peak(compiled, arguments)
    except Exception as error:
        verdict = failure(error)
        return {**fields, "status": verdict.status, "reason": verdict.reason}
    return {**fields, "status": "ok"}


def _peak(compiled: Any, arguments: Sequence[jax.Array]) -> int:
    device = jax.devices()[0]
    before = device.memory_stats()["bytes_in_use"]
    jax.block_until_ready(compiled(*arguments))
    return device.memory_stats()["peak_bytes_in_use"] - before


def measure_elsewhere(
    name: str, seqlen: int, mode: str, heads: int = _HEADS
) -> dict[str, Any]:
    """Runs `measure` in a process of its own and returns what it printed."""
    cell = f"--cell={name},{seqlen},{mode},{heads}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", cell],
        cwd=environment.ROOT,
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    fields = {"contender": name, "seqlen": seqlen, "mode": mode, "status": "error"}
    return {**fields, "reason": (done.stderr.splitlines() or ["no output"])[-1]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Peak memory by length.")
    add = parser.add_argument
    add("--contenders", default="ours,jax-xla", help="default: %(default)s")
    add("--seqlens", default=_LENGTHS, help="default: %(default)s")
    add("--out", type=Path, default=Path("memory.jsonl"), help="default: %(default)s")
    add("--plot", type=Path, help="PNG to write")
    add("--cell", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the memory benchmark's command line; returns the exit status."""
    options = _parser().parse_args(argv)
    if options.cell:
        name, seqlen, mode, heads = options.cell.split(",")
        print(json.dumps(measure(name, int(seqlen), mode == "both", int(heads))))
        return 0
    cells = [
        (name, int(seqlen), mode)
        for mode in ("fwd", "both")
        for name in options.contenders.split(",")
        for seqlen in options.seqlens.split(",")
    ]
    lines = []
    with options.out.open("w") as file:
        for cell in tqdm(cells, desc="memory"):
            lines.append(measure_elsewhere(*cell))
            file.write(json.dumps({"kind": "memory", **lines[-1]}) + "\n")
            file.flush()
    if options.plot:
        from benchmarks import plot

        plot.save_memory(lines, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
