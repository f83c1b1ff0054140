"""Reads the JSON lines of a run back."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.workloads import WORKLOADS, Workload

OURS = "ours"
EXACT = "jax-xla"
"""Exact attention, the scores in memory: what ours is held against."""
LEVEL_SPREAD = 0.02


@dataclasses.dataclass(frozen=True)
class Cell:
    """One contender's figure for one workload and mode, or why there is none."""

    workload: Workload
    mode: str
    contender: str
    status: str
    reason: str | None = None
    tflops: float | None = None
    spread: float = 0.0
    roof_tflops: float | None = None
    roof_fraction: float | None = None


Row = dict[str, Cell]
"""The cells of one workload and mode, by contender."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns every JSON object of a file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _cell(line: dict[str, Any]) -> Cell:
    names = {field.name for field in dataclasses.fields(Cell)} - {"workload"}
    workload = Workload(
        **{**line["workload"], "window": tuple(line["workload"]["window"])}
    )
    return Cell(workload, **{n: line[n] for n in names if n in line})


def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """Returns the rows of a file by (workload name, mode), in the harness's order.

    Where a row was measured more than once, the last run counts, in full: figures of
    two runs are never put side by side.
    """
    rows: dict[tuple[str, str], Row] = {}
    runs: dict[tuple[str, str], str] = {}
    for line in read_lines(path):
        if line["kind"] != "cell":
            continue
        cell = _cell(line)
        key = cell.workload.name, cell.mode
        if runs.get(key) != line["run"]:
            rows[key], runs[key] = {}, line["run"]
        rows[key][cell.contender] = cell
    order = {workload.name: index for index, workload in enumerate(WORKLOADS)}
    names = sorted(rows, key=lambda key: order.get(key[0], len(order)))
    return {key: rows[key] for key in names}


def contender_names(rows: Iterable[Row]) -> list[str]:
    """Returns who has at least one figure, ours first."""
    seen = dict.fromkeys(n for row in rows for n, c in row.items() if c.tflops)
    return sorted(seen, key=lambda name: not name.startswith(OURS))


def best_peer(row: Row) -> Cell | None:
    """Returns the fastest cell that is not ours."""
    peers = [c for n, c in row.items() if not n.startswith(OURS) and c.tflops]
    return max(peers, key=lambda cell: cell.tflops or 0.0, default=None)


def ratio(cell: Cell | None, other: Cell | None) -> float | None:
    """Returns the speed of one cell over another's, above 1 where it is faster."""
    if not (cell and other and cell.tflops and other.tflops):
        return None
    return cell.tflops / other.tflops


def is_level(cell: Cell, other: Cell) -> bool:
    """Returns whether two cells differ by no more than the spread, at most 2%."""
    speed = ratio(cell, other)
    allowed = min(max(cell.spread, other.spread), LEVEL_SPREAD)
    return speed is not None and abs(speed - 1) <= allowed


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; the first column is left-aligned, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    lines = (f"| {' | '.join(row)} |" for row in (header, rule, *body))
    return "\n".join(lines)


def three_digits(figure: float) -> str:
    """Returns a figure with three digits, or all those before the point."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"
