"""Times attention: every chosen workload, mode and contender, as JSON lines.

    python -m benchmarks.run --filter 'd128_causal' --modes fwd,bwd --out h100.jsonl

The contenders of one cell are checked, then timed in turns, round after round, in one
process. A line is written as soon as its figure is known. Three kinds of lines: `run`
(what it ran on), `roof` (the device at its best), `cell` (one figure, or the reason
why there is none).
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import environment, roof, workloads
from benchmarks.cells import Bench, Log
from benchmarks.contenders import Contender, contenders
from benchmarks.workloads import MODES, Mode, Workload


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench", description="Times attention, ours beside the other libraries'."
    )
    add = parser.add_argument
    add("--filter", metavar="REGEX", help="workload names to run; default: all")
    add(
        "--contenders", metavar="A,B", help="names to run; default: all here but ours-*"
    )
    add("--modes", default="fwd,bwd", help="of fwd, bwd, both; default: %(default)s")
    add("--rounds", type=int, default=20, help="samples each; default: %(default)s")
    add("--sample-ms", type=float, default=30.0, help="default: %(default)s")
    add("--out", type=Path, default=Path("bench.jsonl"), help="default: %(default)s")
    add("--isolate", action="store_true", help="one process for each workload")
    add("--list", action="store_true", help="print workloads and contenders, and stop")
    add("--unchecked", action="store_true", help="time without comparing results")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _chosen_modes(text: str) -> tuple[Mode, ...]:
    names = text.split(",")
    unknown = set(names) - set(MODES)
    if unknown:
        raise ValueError(f"--modes takes {','.join(MODES)}, got {sorted(unknown)}")
    return tuple(mode for mode in MODES if mode in names)


def _named(text: str | None) -> list[Contender]:
    every = contenders()
    names = text.split(",") if text else [n for n in every if every[n].by_default]
    unknown = set(names) - set(every)
    if unknown:
        raise ValueError(f"--contenders takes {','.join(every)}, got {sorted(unknown)}")
    return [every[name] for name in names]


def _list_choices() -> None:
    for workload in workloads.WORKLOADS:
        print(f"{workload.name:24s}{workload.source}")
    for name, contender in contenders().items():
        print(f"{name:24s}{contender.available() or 'available'}")


def _run_isolated(chosen: Sequence[Workload], options: argparse.Namespace) -> int:
    """Runs each workload in a process of its own; returns how many failed."""
    shared = [f"--modes={options.modes}", f"--rounds={options.rounds}", "--quiet"]
    shared += [f"--sample-ms={options.sample_ms}", f"--out={options.out.resolve()}"]
    if options.contenders:
        shared.append(f"--contenders={options.contenders}")
    if options.unchecked:
        shared.append("--unchecked")
    failures = 0
    for workload in tqdm(chosen, desc="workloads", disable=options.quiet):
        only = f"--filter=^{re.escape(workload.name)}$"
        command = [sys.executable, "-m", "benchmarks.run", only, *shared]
        failures += subprocess.run(command, cwd=environment.ROOT).returncode != 0
    return failures


def _run_here(
    chosen: Sequence[Workload],
    mode_names: Sequence[Mode],
    named: Sequence[Contender],
    options: argparse.Namespace,
) -> None:
    missing = {c.name: c.available() for c in named}
    present = [c for c in named if missing[c.name] is None]
    missing = {name: reason for name, reason in missing.items() if reason}
    with options.out.open("a") as file:
        log = Log(file)
        log.write("run", **environment.describe(present), missing=missing)
        measured = roof.measure()
        log.write("roof", **dataclasses.asdict(measured))
        bench = Bench(
            log=log,
            roof=measured,
            contenders=present,
            rounds=options.rounds,
            sample_seconds=options.sample_ms / 1e3,
            quiet=options.quiet,
            checked=not options.unchecked,
        )
        for workload in tqdm(chosen, desc="workloads", disable=options.quiet):
            bench.measure(workload, mode_names)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark's command line.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Returns:
        The exit status: 0, 1 where an isolated workload's process failed, 2 for wrong
        arguments.
    """
    options = _parser().parse_args(argv)
    if options.list:
        _list_choices()
        return 0
    try:
        chosen = workloads.select(options.filter)
        mode_names = _chosen_modes(options.modes)
        named = _named(options.contenders)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    # PyTorch needs its share of the memory, which JAX would take in full.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    started = time.monotonic()
    failures = 0
    if options.isolate:
        failures = _run_isolated(chosen, options)
    else:
        _run_here(chosen, mode_names, named, options)
    elapsed = time.monotonic() - started
    print(f"{options.out}: {len(chosen)} workloads in {elapsed:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
