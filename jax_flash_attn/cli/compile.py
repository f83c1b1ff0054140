r"""Compiles kernels into the disk cache ahead of their first use.

No GPU is needed, only NVRTC, so an image or a login node can prepare the cache for
other machines. Kernels are compiled for every combination of the features given:
with --causal --dropout a call with both, one of them or none finds its kernels.
The values of the options (a window's size, a cap, a dropout rate) make no difference;
where short sequences, or few or many heads, have kernels of their own, all of these
are compiled.

  python -m jax_flash_attn compile --causal
  python -m jax_flash_attn compile --architecture sm_80 --architecture sm_90 \
      --head-dim 128 --causal --window --forward-only
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jax_flash_attn import _arguments, _ffi, _spec, _support
from jax_flash_attn.cli import progress

_WINDOW = 1024
_LONG = 1 << 16
"""Queries of a call that is longer than all that tiles tell apart."""
_FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"window_right": 0},
    "window": {"window_left": _WINDOW, "window_right": _WINDOW},
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi": True},
    "dropout": {"dropout_p": 0.1},
    "deterministic": {"deterministic": True},
}
_FEATURE_HELP = {
    "causal": "causal masks",
    "window": "windows limited on both sides, or on the left of a causal mask",
    "softcap": "softcap",
    "alibi": "ALiBi slopes",
    "dropout": "dropout",
    "deterministic": "deterministic gradients",
}
_HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Job:
    """One operation for one architecture: what `_native.compile` takes."""

    operation: str
    spec: _spec.AttentionSpec
    dtype: str
    head_dim: int
    architecture: str
    sizes: tuple[tuple[str, int], ...]
    """Lengths and numbers of heads that tiles depend on."""

    def __str__(self) -> str:
        return f"{self.architecture} {self.operation} D={self.head_dim} {self.dtype}"

    def run(self) -> list[dict[str, Any]]:
        """Compiles the operation's kernels, or reads them from the cache."""
        rows: list[dict[str, Any]] = _ffi.native.compile(
            self.operation,
            _ffi.attributes(self.spec),
            self.dtype,
            self.head_dim,
            self.architecture,
            **dict(self.sizes),
        )
        return rows


@dataclasses.dataclass
class Summary:
    """The kernels that the jobs asked for, each counted once."""

    compiled: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    found: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    failures: dict[Job, str] = dataclasses.field(default_factory=dict)
    bytes: int = 0

    def add(self, job: Job, rows: list[dict[str, Any]]) -> None:
        """Counts the kernels of a job."""
        for row in rows:
            kernel = (row["source"], job.architecture)
            if kernel in self.compiled | self.found:
                continue
            self.bytes += len(row["cubin"])
            (self.found if row["from_disk"] else self.compiled).add(kernel)

    def __str__(self) -> str:
        return (
            f"{len(self.compiled)} compiled, {len(self.found)} already there, "
            f"{len(self.failures)} failed"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `compile`."""
    add = parser.add_argument
    add(
        "--architecture",
        action="append",
        metavar="SM",
        help="of the GPUs to run on, such as sm_90; repeatable; default: this "
        "machine's devices",
    )
    add(
        "--head-dim",
        action="append",
        type=int,
        metavar="D",
        help=f"repeatable; default: {' and '.join(map(str, _HEAD_DIMS))}",
    )
    add(
        "--dtype",
        action="append",
        choices=("bfloat16", "float16"),
        help="repeatable; default: bfloat16",
    )
    for name, text in _FEATURE_HELP.items():
        add(f"--{name}", action="store_true", help=f"also with {text}")
    add("--forward-only", action="store_true", help="leave out the backward")
    add(
        "--threads",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="default: one for each core",
    )


def main(options: argparse.Namespace) -> int:
    """Fills the cache; returns 0, 1 where something failed, 2 for wrong arguments."""
    obstacle = _obstacle()
    if obstacle:
        print(f"Nothing can be compiled: {obstacle}", file=sys.stderr)
        return 1
    try:
        jobs = list(_jobs(options))
    except (ValueError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    directory = str(_ffi.native.cache()["directory"])
    before = _entries(directory)
    summary = _run(jobs, max(options.threads or 1, 1))
    num_stored = len(_entries(directory) - before)
    for job, text in summary.failures.items():
        print(f"FAILED {job}: {text}", file=sys.stderr)
    print(f"{directory}: {summary} ({summary.bytes / 2**20:.1f} MiB)")
    if num_stored < len(summary.compiled):
        print(
            f"Only {num_stored} of {len(summary.compiled)} compiled kernels could be "
            f"written to {directory}: is there space left?",
            file=sys.stderr,
        )
        return 1
    return int(bool(summary.failures))


def _entries(directory: str) -> set[tuple[Path, int]]:
    """The cache's files and when each was written."""
    paths = Path(directory).rglob("*.cubin")
    return {(path, path.stat().st_mtime_ns) for path in paths}


def _obstacle() -> str:
    """Why nothing can be compiled into the cache; empty where it can."""
    if _ffi.native is None:
        return _ffi.native_missing
    cache = _ffi.native.cache()
    if not cache["enabled"]:
        where = f"{cache['directory']} " if cache["directory"] else ""
        return f"the disk cache {where}is {cache['reason_disabled']}"
    try:
        _ffi.native.nvrtc()
    except RuntimeError as error:
        return str(error)
    return ""


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Every job asked for; raises where the native module refuses one."""
    architectures = [
        _arguments.architecture(name) for name in options.architecture or ()
    ] or _architectures_here()
    operations = ("forward",) if options.forward_only else ("forward", "backward")
    for dtype, head_dim, architecture, spec, operation in itertools.product(
        options.dtype or ("bfloat16",),
        options.head_dim or _HEAD_DIMS,
        architectures,
        _specs([name for name in _FEATURES if getattr(options, name)]),
        operations,
    ):
        obstacle = _support.call_obstacle(jnp.dtype(dtype), head_dim, spec.softcap)
        if obstacle:
            raise ValueError(obstacle)
        padded = _support.padded_head_dim(head_dim)
        target = (operation, _ffi.attributes(spec), dtype, padded, architecture)
        limits = _ffi.native.seqlen_limits
        # Choosing tiles is quick and finds what no kernel can do.
        by_tiles = {
            _ffi.native.tiles(*target, **sizes): sizes
            for seqlen in (*limits, limits[-1] + 1, _LONG)
            for sizes in (
                {"seqlen_q": seqlen},
                _of_heads(seqlen, batch=1 << 20),  # keep every multiprocessor busy
                _of_heads(seqlen, batch=1),
            )
        }
        for sizes in by_tiles.values():
            fixed = tuple(sizes.items())
            yield Job(operation, spec, dtype, padded, architecture, fixed)


def _of_heads(seqlen: int, batch: int) -> dict[str, int]:
    """Sizes of a call with so many heads."""
    return {
        "seqlen_q": seqlen,
        "seqlen_k": seqlen,
        "batch": batch,
        "heads": 1,
        "heads_k": 1,
    }


def _specs(names: list[str]) -> list[_spec.AttentionSpec]:
    """One spec for each combination of the features."""
    specs = []
    for switches in itertools.product((False, True), repeat=len(names)):
        fields: dict[str, Any] = {"softmax_scale": 1.0}
        chosen = [name for name, on in zip(names, switches, strict=True) if on]
        for name in reversed(chosen):  # a causal mask is the tighter right limit
            fields |= _FEATURES[name]
        specs.append(_spec.AttentionSpec(**fields))
    return specs


def _architectures_here() -> list[str]:
    try:
        devices = _ffi.native.devices()
    except RuntimeError as error:
        raise RuntimeError(
            "--architecture must name the architecture to compile for, such as sm_90, "
            f"since this machine has no device to take it from. {error}"
        ) from error
    return sorted({str(device["architecture"]) for device in devices})


def _run(jobs: list[Job], threads: int) -> Summary:
    """Runs the jobs side by side: the compiler holds no interpreter lock."""
    summary = Summary()
    bar = progress.start(len(jobs), "compile")
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        running = {pool.submit(job.run): job for job in jobs}
        for future in concurrent.futures.as_completed(running):
            job = running[future]
            try:
                summary.add(job, future.result())
            except (RuntimeError, ValueError, NotImplementedError) as error:
                summary.failures[job] = str(error)
            bar.set_postfix_str(str(job))
            bar.update()
    finally:
        # An interrupt leaves after the kernels at hand, not after all of them.
        pool.shutdown(cancel_futures=True)
        bar.close()
    return summary
