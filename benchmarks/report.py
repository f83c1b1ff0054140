"""Turns a run's JSON lines into Markdown tables and plots, or compares two runs.

    python -m benchmarks.report h100.jsonl --against jax-cudnn --plot h100.png
    python -m benchmarks.report after.jsonl --compare before.jsonl

A cell is TFLOP/s and, in brackets, the fraction of the roof measured in the same run.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.results import OURS, Cell, Row
from benchmarks.workloads import MODES

Rows = Mapping[tuple[str, str], Row]

BEST = "best"


def _figure(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.tflops is None or cell.roof_fraction is None:
        return cell.status
    return f"{results.three_digits(cell.tflops)} ({cell.roof_fraction:.0%})"


def _versus(row: Row, against: str) -> str:
    ours = row.get(OURS)
    other = results.best_peer(row) if against == BEST else row.get(against)
    speed = results.ratio(ours, other)
    if ours is None or other is None or speed is None:
        return ""
    note = " level" if results.is_level(ours, other) else ""
    return f"{speed:.3f}{note}"


def table(rows: Rows, mode: str, against: str = BEST) -> str:
    """Returns the Markdown table of one mode, empty where nothing was measured.

    Args:
        rows: as `results.read_rows` gives them.
        mode: fwd, bwd or both.
        against: the contender ours is divided by in the last column; `best` takes
            the fastest other one of each row.
    """
    chosen = {key: row for key, row in rows.items() if key[1] == mode}
    names = results.contender_names(chosen.values())
    if not names:
        return ""
    header = ["workload", "roof", *names, f"{OURS} / {against}"]
    body = []
    for (workload, _), row in chosen.items():
        roofs = [cell.roof_tflops for cell in row.values() if cell.roof_tflops]
        roof = results.three_digits(roofs[0]) if roofs else ""
        figures = (_figure(row.get(name)) for name in names)
        body.append([workload, roof, *figures, _versus(row, against)])
    return results.markdown(header, body)


def refusals(rows: Rows) -> str:
    """Returns a list of the cells without a figure, with the reasons."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for (workload, mode), row in rows.items():
        for cell in row.values():
            if cell.tflops is None:
                reason = f"{cell.status}: {cell.reason}"
                where = f"{workload} {mode}"
                reasons.setdefault((cell.contender, reason), []).append(where)
    return "\n".join(
        f"- {contender}: {reason} ({', '.join(places)})"
        for (contender, reason), places in reasons.items()
    )


def comparison(rows: Rows, earlier: Rows) -> str:
    """Returns a table of the cells that two runs share.

    The last column compares fractions of the roof, each measured in its own run, so
    that it means something across two devices or two clocks.
    """
    ratios = ["speed ratio", "roof fraction ratio"]
    header = ["workload", "mode", "contender", "before", "after", *ratios]
    body = []
    for key, row in rows.items():
        for name, cell in row.items():
            before = earlier.get(key, {}).get(name)
            speed = results.ratio(cell, before)
            if before is None or speed is None:
                continue
            share = (cell.roof_fraction or 0.0) / (before.roof_fraction or 1.0)
            figures = _figure(before), _figure(cell), f"{speed:.3f}", f"{share:.3f}"
            body.append([*key, name, *figures])
    return results.markdown(header, body)


def heading(path: Path) -> str:
    """Returns one line for each run of a file: what it ran on, and its roof."""
    lines = []
    for line in results.read_lines(path):
        if line["kind"] == "run":
            versions = ", ".join(f"{n} {v}" for n, v in line["versions"].items())
            driver = line["nvidia_smi"].get("driver_version", "none")
            device = f"{line['device']}, driver {driver}, {versions}"
            lines.append(f"Run {line['run']}, {line['date']}: {device}.")
        elif line["kind"] == "roof":
            rate = line["flops_per_second"] / 1e12
            bandwidth = line["bytes_per_second"] / 1e12
            lines[-1] += (
                f" Roof: {results.three_digits(rate)} TFLOP/s, {bandwidth:.3g} TB/s."
            )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tables and plots of a run.")
    add = parser.add_argument
    add("file", type=Path, help="JSON lines of benchmarks.run")
    add("--against", default=BEST, help="contender to divide by; default: %(default)s")
    add("--plot", type=Path, help="PNG; the mode goes before its suffix")
    add("--compare", type=Path, metavar="EARLIER", help="print what changed since")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the report's command line; returns the exit status."""
    options = _parser().parse_args(argv)
    rows = results.read_rows(options.file)
    print(heading(options.file))
    if options.compare:
        print(heading(options.compare))
        print("\n" + comparison(rows, results.read_rows(options.compare)))
        return 0
    for mode in MODES:
        text = table(rows, mode, options.against)
        if text:
            print(f"\n### {mode}\n\n{text}")
    left_out = refusals(rows)
    if left_out:
        print(f"\nWithout a figure:\n\n{left_out}")
    if options.plot:
        from benchmarks import plot

        for path in plot.save(rows, options.plot):
            print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
