"""Attention split over N GPUs: its rate beside N times that of one GPU.

    python -m benchmarks.scaling --devices 2,4,8 --out scaling.jsonl

Forward, and forward with backward, split over batch, over heads, and over both, through
`jax.jit` of operands with shardings, or with `--ways` through `shard_map`. The whole
problem has N times one GPU's batch, so that each GPU has one GPU's work, however it is
split. No two GPUs are equally fast, so each is measured alone, too: N times one GPU's
rate is the sum of theirs. The rates of a table are measured in turns, in one process. A
run stops where a program holds communication: there ought to be none.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from tqdm import tqdm

from benchmarks import arrays, environment, modes, results, timing, workloads
from benchmarks.cells import Log
from benchmarks.contenders import Attention, contenders
from benchmarks.workloads import Mode, Workload

MODES: tuple[Mode, ...] = ("fwd", "both")
SPLITS = ("batch", "heads", "both")
WAYS = ("jit", "shard_map")

_SPEC = Spec("batch", None, "heads")
_COMMUNICATION = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute"
    r"|reduce-scatter)(?:-start)?\("
)


def grid_of(split: str, count: int) -> tuple[int, int]:
    """Returns into how many parts batch and heads are split over `count` devices.

    Both: as nearly as many parts of one as of the other.
    """
    if split == "batch":
        return count, 1
    if split == "heads":
        return 1, count
    heads = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    return count // heads, heads


def make_mesh(devices: Sequence[jax.Device], grid: tuple[int, int]) -> Mesh:
    """Returns a mesh over the first devices, batch by heads."""
    placed = np.array(devices[: math.prod(grid)]).reshape(grid)
    return Mesh(placed, ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)


def grown(workload: Workload, count: int) -> Workload:
    """Returns a workload with `count` times the batch."""
    fields = {**vars(workload), "batch": count * workload.batch}
    return Workload(**fields)


def communication(program: Any) -> set[str]:
    """Returns the kinds of communication in a compiled program."""
    return set(_COMMUNICATION.findall(program.as_text()))


def sampler(
    attend: Attention,
    workload: Workload,
    mode: Mode,
    mesh: Mesh,
    way: str,
    **timed: Any,
) -> timing.MeshSampler:
    """Returns one program, compiled.

    Args:
        attend: what is timed.
        workload: what all devices of the mesh compute.
        mode: which pass.
        mesh: of one device or several.
        way: what splits, of `WAYS`.
        **timed: arguments of `timing.MeshSampler`.

    Raises:
        RuntimeError: the program communicates.
    """
    sharding = NamedSharding(mesh, _SPEC)
    placed = jax.jit(lambda: arrays.make(workload).every, out_shardings=sharding)()
    step: Callable[..., Any] = attend
    if mode == "fwd":
        placed = placed[:3]
    else:
        step = modes.forward_and_backward(attend)
    if way == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=_SPEC, out_specs=_SPEC)
    result = timing.MeshSampler(step, placed, **timed)
    found = communication(result.program)
    if found:
        raise RuntimeError(f"{workload.name} {mode} {way} holds {sorted(found)}")
    return result


def measure(
    workload: Workload,
    mode: Mode,
    meshes: dict[str, Mesh],
    way: str,
    rounds: int,
    sample_seconds: float,
) -> list[dict[str, Any]]:
    """Returns a JSON object for each mesh.

    Args:
        workload: what one device computes.
        mode: which pass.
        meshes: by the name of how they split; one for each device alone come first.
        way: what splits, of `WAYS`.
        rounds: samples of each.
        sample_seconds: how long one sample should take.
    """
    attend = contenders()["ours"].build(workload)
    samplers: dict[str, timing.MeshSampler] = {}
    trips: int | None = None
    for name, mesh in meshes.items():
        whole = grown(workload, mesh.size)
        samplers[name] = sampler(
            attend, whole, mode, mesh, way, trips=trips, sample_seconds=sample_seconds
        )
        trips = samplers[name].trips  # each device has the same work in every program
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, each in samplers.items():
            samples[name].append(each.sample())
    lines: list[dict[str, Any]] = []
    alone: dict[jax.Device, float] = {}
    for name, mesh in meshes.items():
        summary = timing.summarise(samples[name], samplers[name])
        rate = (
            workloads.flops(grown(workload, mesh.size), mode) / summary.seconds / 1e12
        )
        if mesh.size == 1:
            alone[mesh.devices.item()] = rate
        rates = [alone[device] for device in mesh.devices.flat]
        lines.append(
            {
                "workload": workload.name,
                "mode": mode,
                "way": way,
                "split": name,
                "devices": mesh.size,
                "tflops": rate,
                "spread": summary.spread,
                "samples": summary.samples,
                "trips": summary.trips,
                "ratio": rate / sum(rates),
                "ratio_to_slowest": rate / (mesh.size * min(rates)),
            }
        )
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Returns the lines as a Markdown table."""
    header = ("workload", "mode", "way", "split", "devices", "TFLOP/s")
    header += ("of N x one", "of N x the slowest", "spread")
    body = (
        (
            line["workload"],
            line["mode"],
            line["way"],
            line["split"],
            str(line["devices"]),
            results.three_digits(line["tflops"]),
            f"{line['ratio']:.3f}",
            f"{line['ratio_to_slowest']:.3f}",
            f"{line['spread']:.1%}",
        )
        for line in lines
    )
    return results.markdown(header, body)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Attention over several devices.")
    add = parser.add_argument
    add("--filter", default="^d128_causal_s4096$", help="default: %(default)s")
    add("--devices", metavar="2,4", help="numbers of devices; default: all there are")
    add("--ways", default="jit", help=f"of {','.join(WAYS)}; default: %(default)s")
    add("--rounds", type=int, default=15, help="samples each; default: %(default)s")
    add("--sample-ms", type=float, default=100.0, help="default: %(default)s")
    add("--out", type=Path, default=Path("scaling.jsonl"), help="default: %(default)s")
    return parser


def _meshes(counts: Sequence[int], workload: Workload) -> dict[str, Mesh]:
    """Each device alone, then every split that heads allow; says which they don't."""
    devices = jax.devices()
    used = enumerate(devices[: max(counts)])
    found = {f"none, {n}": make_mesh([device], (1, 1)) for n, device in used}
    for count in counts:
        if not 2 <= count <= len(devices):
            raise ValueError(
                f"--devices takes numbers from 2 to {len(devices)}, got {count}"
            )
        for split in SPLITS:
            grid = grid_of(split, count)
            if workload.heads_k % grid[1]:
                print(f"{workload.name}: {grid[1]} devices don't divide its key heads")
            elif grid not in {mesh.devices.shape for mesh in found.values()}:
                found[f"{split} {grid[0]} x {grid[1]}"] = make_mesh(devices, grid)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the scaling benchmark's command line; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        ways = options.ways.split(",")
        if set(ways) - set(WAYS):
            raise ValueError(f"--ways takes {','.join(WAYS)}, got {options.ways}")
        if jax.device_count() < 2:
            raise ValueError("this needs two devices or more, and JAX has one")
        chosen = workloads.select(options.filter)
        text = options.devices or str(jax.device_count())
        counts = [int(count) for count in text.split(",")]
        cells = [(w, m, way) for way in ways for w in chosen for m in MODES]
        meshes = {w.name: _meshes(counts, w) for w in chosen}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with options.out.open("a") as file:
        log = Log(file)
        ours = [contenders()["ours"]]
        log.write("run", **environment.describe(ours, "benchmarks.scaling"))
        for workload, mode, way in tqdm(cells, desc="cells"):
            found = measure(
                workload,
                mode,
                meshes[workload.name],
                way,
                options.rounds,
                options.sample_ms / 1e3,
            )
            for line in found:
                log.write("scaling", **line)
            tqdm.write(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
