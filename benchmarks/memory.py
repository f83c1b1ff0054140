"""Peak memory by sequence length, ours beside jax.nn's.

    python -m benchmarks.memory --out memory.jsonl --plot memory.png

Two figures: what XLA plans for the compiled program (results and temporaries, known
without running it), and on a GPU the allocator's peak above the operands. A peak is
never reset: a contender's lengths run in a process of its own, from short to long.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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


def _workload(seqlen: int, heads: int, heads_k: int) -> Workload:
    source = "the head_dim of Llama 3, arXiv:2407.21783"
    return Workload(
        f"memory_s{seqlen}", 1, seqlen, heads, heads_k, 128, causal=True, source=source
    )


def measure(
    contender_name: str,
    seqlen: int,
    gradients: bool,
    heads: int = _HEADS,
    heads_k: int | None = None,
) -> dict[str, Any]:
    """Returns the memory that one contender takes for one length.

    Args:
        contender_name: a JAX contender's name.
        seqlen: the sequence length, with one batch entry, heads of 128, causal.
        gradients: the forward and the backward pass instead of the forward alone.
        heads: how many heads.
        heads_k: how many key heads, as many by default.

    Returns:
        A JSON object: `planned_bytes`, and on a GPU `peak_bytes` where the process has
        not held more before, both without the operands; or a `status` and a `reason`.
    """
    workload = _workload(seqlen, heads, heads_k or heads)
    mode = "both" if gradients else "fwd"
    fields: dict[str, Any] = {"contender": contender_name, "seqlen": seqlen}
    fields |= {"mode": mode, "heads": heads, "heads_k": workload.heads_k}
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
            peak = _peak(compiled, arguments)
            fields |= {} if peak is None else {"peak_bytes": peak}
    except Exception as error:
        verdict = failure(error)
        return {**fields, "status": verdict.status, "reason": verdict.reason}
    return {**fields, "status": "ok"}


def _peak(compiled: Any, arguments: Sequence[jax.Array]) -> int | None:
    """The allocator's peak above the operands, None where it was higher before."""
    device = jax.devices()[0]
    before = device.memory_stats()
    jax.block_until_ready(compiled(*arguments))
    peak = device.memory_stats()["peak_bytes_in_use"]
    if peak == before["peak_bytes_in_use"]:
        return None
    return peak - before["bytes_in_use"]


def measure_elsewhere(
    name: str,
    seqlens: Sequence[int],
    mode: str,
    heads: int = _HEADS,
    heads_k: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Runs `measure` in a process of its own, from short to long, as peaks only rise.

    Yields what it prints, line by line.
    """
    lengths = sorted(seqlens)
    key_heads = heads_k or heads
    cells = f"--cells={name};{','.join(map(str, lengths))};{mode};{heads};{key_heads}"
    # Autotuning allocates on the device, too, and would show in the peak. A pool that
    # grows hands out chunks of up to twice what is asked for, and counts them whole.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_FLAGS": flags}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory", cells],
            cwd=environment.ROOT,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                yield json.loads(line)
                lengths.pop(0)
        errors.seek(0)
        reason = (errors.read().splitlines() or ["no output"])[-1]
    fields = {"contender": name, "mode": mode, "heads": heads, "heads_k": key_heads}
    for seqlen in lengths:
        yield {**fields, "seqlen": seqlen, "status": "error", "reason": reason}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Peak memory by length.")
    add = parser.add_argument
    add("--contenders", default="ours,jax-xla", help="default: %(default)s")
    add("--seqlens", default=_LENGTHS, help="default: %(default)s")
    add("--key-heads", type=int, help="default: as many as heads, 16")
    add("--out", type=Path, default=Path("memory.jsonl"), help="default: %(default)s")
    add("--plot", type=Path, help="PNG to write")
    add("--cells", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the memory benchmark's command line; returns the exit status."""
    options = _parser().parse_args(argv)
    if options.cells:
        name, seqlens, mode, heads, heads_k = options.cells.split(";")
        for seqlen in seqlens.split(","):
            line = measure(name, int(seqlen), mode == "both", int(heads), int(heads_k))
            print(json.dumps(line), flush=True)
        return 0
    seqlens = [int(seqlen) for seqlen in options.seqlens.split(",")]
    names = options.contenders.split(",")
    bar = tqdm(total=2 * len(names) * len(seqlens), desc="memory")
    lines = []
    with options.out.open("w") as file, bar:
        for mode, name in itertools.product(("fwd", "both"), names):
            for line in measure_elsewhere(
                name, seqlens, mode, heads_k=options.key_heads
            ):
                lines.append(line)
                file.write(json.dumps({"kind": "memory", **line}) + "\n")
                file.flush()
                bar.update()
    if options.plot:
        from benchmarks import plot

        plot.save_memory(lines, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
