"""Finds the fastest tiles of the kernels on Hopper, on the device at hand.

    python -m jax_flash_attn tune --head-dim 128 --mask causal --seqlens 2048,16384
    python -m jax_flash_attn tune --operation backward --head-dim 256 --mask full

Every candidate is compiled, and left out where the compiler spills registers or warns;
it is checked against the oracle; then all are timed in turns, on each length. Printed
are the figures and the row of csrc/launchers/*_tiles.cc that wins by the geometric mean
of its speed over the lengths. Where all of them are short, it is a row for short
sequences alone.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
from tqdm import tqdm

from benchmarks import arrays, modes, timing, workloads
from benchmarks.contenders import Ours, on_gpu
from benchmarks.correctness import Checker
from benchmarks.workloads import Workload
from jax_flash_attn import _ffi, _spec

TOKENS = 16384
WIDTH = 2048
"""Batch times length, and heads times head dim, of what is timed."""

_SHARED_BYTES = 227 * 1024
_BARRIER_BYTES = 512
"""Barriers and places take less."""
_REGISTERS = {2: 240, 3: 160}
"""Of a thread, by the number of consumer warpgroups."""
_DQ_REGISTERS = 200
_WIDE_DQ_REGISTERS = 224
"""The same where dq is computed by itself, up to head dim 128 and above."""
_REGISTERS_BESIDE = 30
"""What a consumer needs besides accumulators and probabilities, at least."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One choice of tiles; the fields are those of csrc/launchers/sm90_tiles.h."""

    family: ClassVar[str] = "sm90"

    def __str__(self) -> str:
        return ", ".join(map(str, dataclasses.astuple(self)))

    @property
    def text(self) -> str:
        """As `jax_flash_attn.testing.override_tiles` takes it."""
        return f"{self.family}:{','.join(map(str, dataclasses.astuple(self)))}"


@dataclasses.dataclass(frozen=True)
class ForwardTiles(Tiles):
    """Tiles of sm90/forward.cuh."""

    tile_q: int
    tile_k: int
    query_stages: int
    key_stages: int
    value_stages: int
    prob_buffers: int

    def fits(self, head_dim: int) -> bool:
        """Returns whether shared memory and registers can hold it."""
        rows = self.query_stages * self.tile_q
        rows += (self.key_stages + self.value_stages) * self.tile_k
        if 2 * rows * _panel_columns(head_dim) > _SHARED_BYTES - _BARRIER_BYTES:
            return False
        scores = self.tile_k // 2
        probs = self.prob_buffers * self.tile_k // 4
        out = -(-head_dim // 16) * 8
        limit = _REGISTERS[self.tile_q // 64]
        return scores + probs + out + _REGISTERS_BESIDE <= limit


@dataclasses.dataclass(frozen=True)
class BackwardTiles(Tiles):
    """Tiles of sm90/backward.cuh."""

    tile_q: int
    tile_k: int
    query_stages: int
    dout_stages: int

    def fits(self, head_dim: int) -> bool:
        """Returns whether there is a kernel for it, and shared memory."""
        if head_dim > (64 if self.tile_q == 128 else 128):
            return False
        stages = self.query_stages + self.dout_stages
        rows = 2 * self.tile_k + stages * self.tile_q
        dscores = 2 * 2 * self.tile_q * self.tile_k
        fp32_columns = -(-head_dim // 16) * 16
        needed = 2 * rows * _panel_columns(head_dim) + dscores
        needed += 4 * self.tile_q * (fp32_columns + stages)
        needed += 7 * 4096  # of its row service
        return needed <= _SHARED_BYTES - _BARRIER_BYTES


@dataclasses.dataclass(frozen=True)
class SplitBackwardTiles(Tiles):
    """Tiles of sm90/key_gradient.cuh (64 keys: wide_) and sm90/query_gradient.cuh."""

    family: ClassVar[str] = "sm90split"
    tile_q: int
    tile_k: int
    query_stages: int
    dout_stages: int
    dq_tile_q: int
    dq_tile_k: int
    dq_query_stages: int
    dq_key_stages: int
    dq_value_stages: int

    def fits(self, head_dim: int) -> bool:
        """Returns whether there are kernels for it, and shared memory."""
        is_wide = self.tile_k == 64
        if (head_dim <= 64) if is_wide else (head_dim > 128):
            return False
        stages = self.query_stages + self.dout_stages
        rows = (1 if is_wide else 2) * 2 * self.tile_k + stages * self.tile_q
        probs = 4 * self.tile_q * self.tile_k if is_wide else 0
        dq_rows = 2 * self.dq_query_stages * self.dq_tile_q
        dq_rows += (self.dq_key_stages + self.dq_value_stages) * self.dq_tile_k
        row_bytes = 2 * _panel_columns(head_dim)
        needed = max(
            rows * row_bytes + probs + 4 * stages * self.tile_q,
            dq_rows * row_bytes + 2 * 8 * self.dq_tile_q,
        )
        dq_registers = -(-head_dim // 16) * 8 + self.dq_tile_k * 5 // 4
        limit = _DQ_REGISTERS if head_dim <= 128 else _WIDE_DQ_REGISTERS
        fits_registers = dq_registers + _REGISTERS_BESIDE <= limit
        return needed <= _SHARED_BYTES - _BARRIER_BYTES and fits_registers


@dataclasses.dataclass(frozen=True)
class HeadBackwardTiles(Tiles):
    """Tiles of sm90/head_backward.cuh."""

    family: ClassVar[str] = "sm90head"
    tile_q: int
    tile_k: int
    query_stages: int
    dout_stages: int
    head_tiles: int
    passes: int

    def fits(self, head_dim: int) -> bool:
        """Returns whether there is a kernel for it, and shared memory."""
        if head_dim > 64:
            return False
        stages = self.query_stages + self.dout_stages
        rows = 2 * self.tile_k + stages * self.tile_q
        dscores = 2 * self.tile_q * self.tile_k
        fp32_columns = -(-head_dim // 16) * 16
        needed = 2 * rows * _panel_columns(head_dim) + dscores
        needed += 4 * self.tile_q * (self.head_tiles * fp32_columns + stages)
        return needed <= _SHARED_BYTES - _BARRIER_BYTES


@dataclasses.dataclass(frozen=True)
class ClusterBackwardTiles(Tiles):
    """Tiles of sm90/cluster_backward.cuh."""

    family: ClassVar[str] = "sm90cluster"
    tile_q: int
    tile_k: int
    query_stages: int
    dout_stages: int

    def fits(self, head_dim: int) -> bool:
        """Returns whether there is a kernel for it, and shared memory."""
        if head_dim <= 128:
            return False
        stages = self.query_stages + self.dout_stages
        rows = 2 * self.tile_k + stages * self.tile_q
        tile = self.tile_q * self.tile_k
        sent = 2 * 2 * tile
        needed = 2 * rows * _panel_columns(head_dim) + 4 * tile
        needed += 4 * stages * self.tile_q + _BARRIER_BYTES
        return -(-needed // 1024) * 1024 + sent <= _SHARED_BYTES - _BARRIER_BYTES


def _panel_columns(head_dim: int) -> int:
    """Columns that a row takes in shared memory."""
    return -(-head_dim // 64) * 64


def forward_candidates(head_dim: int) -> Iterator[ForwardTiles]:
    """Yields the tiles worth trying for a head dim: two query stages where they fit."""
    some_stages = ((2, 2), (2, 3), (3, 3))
    for tile_q, tile_k, stages, prob_buffers in itertools.product(
        (128, 192), range(48, 209, 16), some_stages, (1, 2)
    ):
        for query_stages in (2, 1):
            candidate = ForwardTiles(
                tile_q, tile_k, query_stages, *stages, prob_buffers
            )
            if candidate.fits(head_dim):
                yield candidate
                break


def backward_candidates(head_dim: int) -> Iterator[BackwardTiles]:
    """Yields the tiles worth trying for a head dim."""
    for tile_q, query_stages, dout_stages in itertools.product(
        (64, 128), (2, 3), (2, 3)
    ):
        candidate = BackwardTiles(tile_q, 128, query_stages, dout_stages)
        if candidate.fits(head_dim):
            yield candidate


def split_backward_candidates(head_dim: int) -> Iterator[SplitBackwardTiles]:
    """Yields the tiles worth trying for a head dim."""
    some_stages = ((2, 2), (3, 2), (3, 3), (4, 4))
    for tile_k, stages, dq_tile_k, dq_query_stages, dq_stages in itertools.product(
        (128, 64), some_stages, (32, 48, 64, 96, 128), (2, 1), some_stages
    ):
        candidate = SplitBackwardTiles(
            64, tile_k, *stages, 128, dq_tile_k, dq_query_stages, *dq_stages
        )
        if candidate.fits(head_dim):
            yield candidate


def head_backward_candidates(head_dim: int) -> Iterator[HeadBackwardTiles]:
    """Yields the tiles worth trying for a head dim."""
    for stages, passes in itertools.product(
        itertools.product((2, 3, 4), (2, 3, 4)), (1, 2)
    ):
        candidate = HeadBackwardTiles(64, 128, *stages, 8, passes)
        if candidate.fits(head_dim):
            yield candidate


def cluster_backward_candidates(head_dim: int) -> Iterator[ClusterBackwardTiles]:
    """Yields the tiles worth trying for a head dim."""
    for query_stages, dout_stages in itertools.product((2, 3, 4), (2, 3, 4)):
        candidate = ClusterBackwardTiles(64, 64, query_stages, dout_stages)
        if candidate.fits(head_dim):
            yield candidate


CANDIDATES: Mapping[str, Callable[[int], Iterator[Tiles]]] = {
    "forward": forward_candidates,
    "backward": backward_candidates,
    "split_backward": split_backward_candidates,
    "head_backward": head_backward_candidates,
    "cluster_backward": cluster_backward_candidates,
}
TILES: Mapping[str, Callable[..., Tiles]] = {
    "forward": ForwardTiles,
    "backward": BackwardTiles,
    "split_backward": SplitBackwardTiles,
    "head_backward": HeadBackwardTiles,
    "cluster_backward": ClusterBackwardTiles,
}
OPERATIONS = {
    "forward": "forward",
    "backward": "backward",
    "split_backward": "backward",
    "head_backward": "backward",
    "cluster_backward": "backward",
}
"""Of a table, what its tiles compute."""
MODES = {"forward": "fwd", "backward": "bwd"}
"""What the benchmark calls timing an operation."""


def table_row(
    head_dim: int, features: str, candidate: Tiles, max_seqlen_q: int | None = None
) -> str:
    """Returns a row of csrc/launchers/sm90_tiles.cc, for some lengths or for all."""
    limit = f", {max_seqlen_q}" if max_seqlen_q else ""
    return f"    {{{head_dim}, Features::{features}, {{{candidate}}}{limit}}},"


def geometric_mean(values: Sequence[float]) -> float:
    """Returns the geometric mean of positive values."""
    return math.exp(sum(map(math.log, values)) / len(values))


def winner(speeds: Mapping[Tiles, Sequence[float]]) -> Tiles:
    """Returns whose speeds have the largest geometric mean."""
    return max(speeds, key=lambda candidate: geometric_mean(speeds[candidate]))


def _workload(head_dim: int, seqlen: int, options: argparse.Namespace) -> Workload:
    heads = max(1, WIDTH // head_dim)
    return Workload(
        f"tune_d{head_dim}_{options.mask}_s{seqlen}",
        max(1, TOKENS // seqlen),
        seqlen,
        heads,
        heads,
        head_dim,
        causal=options.mask == "causal",
        dropout_p=0.1 if options.features == "any" else 0.0,
        alibi=options.features == "any",
        softcap=30.0 if options.features == "any" else 0.0,
        source="the grid of the benchmark",
    )


def _is_clean(candidate: Tiles, operation: str, head_dim: int, attributes: Any) -> bool:
    """Whether the compiler neither spills nor warns."""
    try:
        kernels = _ffi.native.compile(
            operation,
            attributes,
            "bfloat16",
            head_dim,
            "sm_90",
            fresh=True,
            tiles=candidate.text,
        )
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return not any(
        kernel["spill_bytes"] or kernel["stack_bytes"] or kernel["warnings"]
        for kernel in kernels
    )


def clean_candidates(
    operation: str, head_dim: int, workload: Workload, among: Sequence[Tiles]
) -> list[Tiles]:
    """Returns those that compile for a workload without spills and warnings."""
    spec = _spec.AttentionSpec(
        softmax_scale=head_dim**-0.5,
        window_right=0 if workload.causal else -1,
        softcap=workload.softcap,
        alibi=workload.alibi,
        dropout_p=workload.dropout_p,
    )
    is_clean = functools.partial(
        _is_clean,
        operation=operation,
        head_dim=head_dim,
        attributes=_ffi.attributes(spec),
    )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = tqdm(pool.map(is_clean, among), "compile", total=len(among))
        return [c for c, ok in zip(among, verdicts, strict=True) if ok]


def _speeds(
    workload: Workload, among: Sequence[Tiles], options: argparse.Namespace
) -> dict[Tiles, float]:
    """TFLOP/s of the candidates whose results are right."""
    operands = arrays.make(workload)
    checker = Checker(workload, operands)
    operation = OPERATIONS[options.operation]
    mode = MODES[operation]
    flops = workloads.flops(workload, mode)
    running: dict[Tiles, tuple[Ours, timing.Sampler]] = {}
    for candidate in tqdm(among, f"check {workload.name}"):
        ours = Ours(candidate.text, forced={operation: candidate.text})
        with ours.running():
            verdict = checker.verdict(ours, mode)
            if verdict.status != "ok":
                print(f"{candidate}: {verdict.status}: {verdict.reason}")
                continue
            sampler = modes.sampler(
                ours,
                workload,
                mode,
                operands,
                guess=flops / 5e14,
                sample_seconds=options.sample_ms / 1e3,
            )
        running[candidate] = (ours, sampler)
    samples: dict[Tiles, list[float]] = {c: [] for c in running}
    for _ in tqdm(range(options.rounds), f"time {workload.name}"):
        for candidate, (ours, sampler) in running.items():
            with ours.running():
                samples[candidate].append(sampler.sample())
    return {
        candidate: flops / timing.summarise(taken, running[candidate][1]).seconds / 1e12
        for candidate, taken in samples.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--operation",
        choices=tuple(TILES),
        default="forward",
        help="split_backward: dq by itself, dk and dv by themselves; head_backward: "
        "CTAs take whole heads, of up to 1,024 queries",
    )
    add("--head-dim", type=int, default=128, metavar="D", help="default: %(default)s")
    add("--mask", choices=("full", "causal"), default="causal")
    add(
        "--features",
        choices=("plain", "any"),
        default="plain",
        help="any: with dropout, ALiBi and softcap",
    )
    add("--seqlens", default="512,2048,16384", help="default: %(default)s")
    add("--tiles", metavar="A;B", help="only these, as `testing` takes them")
    add("--rounds", type=int, default=10, help="samples each; default: %(default)s")
    add("--sample-ms", type=float, default=15.0, help="default: %(default)s")
    return parser


def _chosen(options: argparse.Namespace) -> list[Tiles]:
    if not options.tiles:
        return list(CANDIDATES[options.operation](options.head_dim))
    numbers = (text.split(":")[-1] for text in options.tiles.split(";"))
    return [TILES[options.operation](*map(int, text.split(","))) for text in numbers]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tuner's command line; returns 0, 1 where nothing could be tuned."""
    options = _parser().parse_args(argv)
    chosen = _chosen(options)
    if not chosen:
        asked = f"{options.operation} tiles fit {options.head_dim}"
        print(f"No {asked}.", file=sys.stderr)
        return 1
    if not on_gpu() or jax.devices()[0].compute_capability != "9.0":
        print("tune needs a GPU of compute capability 9.0.", file=sys.stderr)
        return 1
    lengths = [int(text) for text in options.seqlens.split(",")]
    tried = [_workload(options.head_dim, seqlen, options) for seqlen in lengths]
    among = clean_candidates(
        OPERATIONS[options.operation], options.head_dim, tried[0], chosen
    )
    by_length = [_speeds(workload, among, options) for workload in tried]
    speeds = {
        candidate: [found[candidate] for found in by_length]
        for candidate in among
        if all(candidate in found for found in by_length)
    }
    if not speeds:
        print("No candidate compiles and is right.", file=sys.stderr)
        return 1
    for candidate in sorted(speeds, key=lambda c: -geometric_mean(speeds[c])):
        figures = "  ".join(f"{x:6.1f}" for x in speeds[candidate])
        print(f"{geometric_mean(speeds[candidate]):6.1f}   {figures}   {candidate}")
    kind = "kAny" if options.features == "any" else "kPlain"
    kind = "kFull" if options.mask == "full" and kind == "kPlain" else kind
    longest = [x for x in _ffi.native.seqlen_limits if x >= max(lengths)]
    limit = longest[0] if longest else None
    print(table_row(options.head_dim, kind, winner(speeds), limit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
