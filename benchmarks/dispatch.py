"""Host time of a jitted call: a tiny attention beside a custom call that does nothing.

    python -m benchmarks.dispatch --out dispatch.jsonl

Both take the same operands and give a result of the same shape. A figure is the time
until the call returns to Python, which on a GPU is before the result is there. Calls
take turns, and each is waited for before the next, so that no queue fills up. What
both cost is JAX's own dispatch; the difference is ours. On a CPU a call may compute
before it returns, so there the difference says nothing about dispatch.

A runtime that launches from a thread of its own hides what a launch costs the host, so
two more figures stand beside the first: the time until the result is there (`ready`),
the kernel's included, and the time of a call in a row that nobody waits for
(`queued`), which is the host's where that is slower than the GPU.

The empty call launches nothing. What a launch costs any program shows a third
callable, a sum of the operands, for which XLA launches one kernel of its own.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks import arrays, environment
from benchmarks.cells import Log
from benchmarks.contenders import contenders, on_gpu
from benchmarks.workloads import Workload
from jax_flash_attn import _ffi

TINY = Workload("tiny", 1, 64, 1, 1, 64, source="one tile of one head")
OURS, EMPTY, SUM = "ours", "empty", "sum"

_WARM_UP_CALLS = 100
_QUEUED_CALLS = 500
_QUEUED_ROUNDS = 21


def callables(workload: Workload) -> dict[str, Callable[..., jax.Array]]:
    """Returns what is timed, by name: functions of q, k and v."""

    def empty(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _ffi.empty_call([q, k, v], [jax.ShapeDtypeStruct(q.shape, q.dtype)])[0]

    return {
        OURS: jax.jit(contenders()[OURS].build(workload)),
        EMPTY: jax.jit(empty),
        SUM: jax.jit(lambda q, k, v: q + k + v),
    }


def sample(
    calls: dict[str, Callable[..., jax.Array]],
    operands: Sequence[jax.Array],
    count: int,
    clock: Callable[[], int] = time.perf_counter_ns,
    quiet: bool = False,
) -> dict[str, list[int]]:
    """Returns the nanoseconds of each call, by name; the calls take turns.

    Under the name with `_ready`, those until its result was there.

    Args:
        calls: what is timed.
        operands: what each is called with.
        count: how often each is called, a warm-up aside.
        clock: gives nanoseconds.
        quiet: no progress bar.
    """
    for call in calls.values():
        for _ in range(_WARM_UP_CALLS):
            call(*operands).block_until_ready()
    taken: dict[str, list[int]] = {name: [] for name in calls}
    taken |= {f"{name}_ready": [] for name in calls}
    for _ in tqdm(range(count), desc="calls", disable=quiet):
        for name, call in calls.items():
            start = clock()
            result = call(*operands)
            returned = clock()
            result.block_until_ready()
            taken[name].append(returned - start)
            taken[f"{name}_ready"].append(clock() - start)
    return taken


def sample_queued(
    calls: dict[str, Callable[..., jax.Array]],
    operands: Sequence[jax.Array],
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, list[float]]:
    """Returns the nanoseconds of a call in each of some rows; the rows take turns."""
    taken: dict[str, list[float]] = {f"{name}_queued": [] for name in calls}
    for _ in range(_QUEUED_ROUNDS):
        for name, call in calls.items():
            start = clock()
            for _ in range(_QUEUED_CALLS):
                result = call(*operands)
            result.block_until_ready()
            taken[f"{name}_queued"].append((clock() - start) / _QUEUED_CALLS)
    return taken


def summarise(taken: dict[str, Any]) -> dict[str, Any]:
    """Returns medians in microseconds with their spread, and ours against the empty."""
    summary: dict[str, Any] = {}
    for name, nanoseconds in taken.items():
        low, median, high = np.percentile(nanoseconds, (10, 50, 90)) / 1e3
        summary[f"{name}_us"] = float(median)
        summary[f"{name}_spread"] = float((high - low) / median)
    ours, empty = summary[f"{OURS}_us"], summary[f"{EMPTY}_us"]
    return {**summary, "difference_us": ours - empty, "ratio": ours / empty}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Host time of a jitted call.")
    add = parser.add_argument
    add("--calls", type=int, default=10_000, help="of each; default: %(default)s")
    add("--out", type=Path, default=Path("dispatch.jsonl"), help="default: %(default)s")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the dispatch benchmark's command line; returns the exit status."""
    options = _parser().parse_args(argv)
    if options.calls < 1:
        print(f"--calls takes 1 or more, got {options.calls}", file=sys.stderr)
        return 2
    if _ffi.native is None:
        print(_ffi.native_missing, file=sys.stderr)
        return 1
    every = contenders()
    with options.out.open("a") as file:
        log = Log(file)
        log.write("run", **environment.describe([every[OURS]], "benchmarks.dispatch"))
        operands = jax.block_until_ready(arrays.make(TINY).qkv)
        calls = callables(TINY)
        taken = sample(calls, operands, options.calls, quiet=options.quiet)
        figures = summarise({**taken, **sample_queued(calls, operands)})
        log.write("dispatch", calls=options.calls, on_gpu=on_gpu(), **figures)
    for name in ("", "_ready", "_queued"):
        ours, empty, kernel = (figures[f"{who}{name}_us"] for who in (OURS, EMPTY, SUM))
        print(
            f"{name[1:] or 'returned'}: ours {ours:.1f} us, empty {empty:.1f} us, "
            f"a kernel of XLA's own {kernel:.1f} us"
        )
    print(
        f"difference of ours and the empty, returned: "
        f"{figures['difference_us']:.1f} us, ratio {figures['ratio']:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
