"""Plots of a run: speed by sequence length on the grid, bars for all else."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.results import OURS, Row
from benchmarks.workloads import MODES, Workload

Rows = Mapping[tuple[str, str], Row]

# Okabe and Ito's colours, told apart by every common kind of colour vision.
_COLOURS = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C8C8C",
)
_TITLES = {"fwd": "forward", "bwd": "backward", "both": "forward and backward"}
_MIB = 2**20
_MARKERS = "osD^vPX*"
_ROOF = "0.55"
_DPI = 150


def style(index: int) -> dict[str, Any]:
    """Returns colour and marker of the index-th series; 64 pairs before any repeats."""
    marker = _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)]
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": marker}


def save(rows: Rows, path: Path) -> list[Path]:
    """Writes the plots of every mode that was measured.

    Args:
        rows: as `results.read_rows` gives them.
        path: a PNG; `_fwd` or `_fwd_other` and so on go before its suffix.

    Returns:
        The files written.
    """
    written = []
    for mode in MODES:
        chosen = [row for key, row in rows.items() if key[1] == mode]
        measured = [row for row in chosen if any(c.tflops for c in row.values())]
        grid = [row for row in measured if _is_grid(_workload(row))]
        other = [row for row in measured if not _is_grid(_workload(row))]
        names = results.contender_names(measured)
        if grid:
            written.append(path.with_stem(f"{path.stem}_{mode}"))
            _save_grid(grid, names, mode, written[-1])
        if other:
            written.append(path.with_stem(f"{path.stem}_{mode}_other"))
            _save_bars(other, names, mode, written[-1])
    return written


def save_memory(lines: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes memory by sequence length, a panel for each mode that was measured.

    Args:
        lines: the JSON objects of `benchmarks.memory`.
        path: a PNG.
    """
    found = [line for line in lines if line["status"] == "ok"]
    names = list(dict.fromkeys(line["contender"] for line in found))
    measured = [m for m in MODES if any(line["mode"] == m for line in found)]
    figure, axes = plt.subplots(
        1,
        len(measured),
        figsize=(5 * len(measured), 4),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, mode in zip(axes[0], measured, strict=True):
        for index, name in enumerate(names):
            points = sorted(
                (line["seqlen"], line.get("peak_bytes", line["planned_bytes"]) / _MIB)
                for line in found
                if (line["contender"], line["mode"]) == (name, mode)
            )
            if points:
                axis.plot(*zip(*points, strict=True), label=name, **style(index))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter(_length)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(_TITLES[mode])
        axis.set_xlabel("sequence length")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("MiB beside the operands")
    axes[0][0].legend()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _length(seqlen: float, _: object = None) -> str:
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if seqlen >= size:
            return f"{seqlen / size:g}{unit}"
    return f"{seqlen:g}"


def _workload(row: Row) -> Workload:
    return next(iter(row.values())).workload


def _is_grid(workload: Workload) -> bool:
    mask = "causal" if workload.causal else "full"
    return workload.name == f"d{workload.head_dim}_{mask}_s{workload.seqlen}"


def _save_grid(
    rows: Sequence[Row], names: Sequence[str], mode: str, path: Path
) -> None:
    dims = sorted({_workload(row).head_dim for row in rows})
    masks = sorted({_workload(row).causal for row in rows})
    figure, axes = plt.subplots(
        len(masks),
        len(dims),
        figsize=(1 + 4 * len(dims), 1 + 3.2 * len(masks)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for causal, line in zip(masks, axes, strict=True):
        for head_dim, axis in zip(dims, line, strict=True):
            panel = [
                row
                for row in rows
                if (_workload(row).head_dim, _workload(row).causal)
                == (head_dim, causal)
            ]
            if not panel:
                axis.set_visible(False)
                continue
            _draw_panel(axis, panel, names)
            mask = "causal" if causal else "full"
            axis.set_title(f"D = {head_dim}, {mask}", fontsize=10)
    _finish(figure, axes[0][0], mode)
    figure.supxlabel("sequence length")
    figure.supylabel("TFLOP/s")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _draw_panel(axis: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    rows = sorted(rows, key=lambda row: _workload(row).seqlen)
    lengths = [_workload(row).seqlen for row in rows]
    axis.plot(lengths, _roofs(rows), "--", color=_ROOF, label="roof")
    for index, name in enumerate(names):
        cells = (row.get(name) for row in rows)
        points = [(c.workload.seqlen, c.tflops) for c in cells if c and c.tflops]
        if not points:
            continue
        width = 2.4 if name == OURS else 1.2
        axis.plot(*zip(*points, strict=True), label=name, lw=width, **style(index))
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [_length(n) for n in lengths])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _roofs(rows: Iterable[Row]) -> list[float]:
    return [next(c.roof_tflops for c in r.values() if c.roof_tflops) for r in rows]


def _save_bars(
    rows: Sequence[Row], names: Sequence[str], mode: str, path: Path
) -> None:
    bars = [[name for name in names if _has_figure(row, name)] for row in rows]
    num_lines = sum(len(present) + 1 for present in bars)
    figure, axis = plt.subplots(
        figsize=(9, 1.5 + 0.17 * num_lines), layout="constrained"
    )
    top, middles = 0, []
    for row, present, roof in zip(rows, bars, _roofs(rows), strict=True):
        for y, name in enumerate(present, start=top):
            tflops = row[name].tflops or 0.0
            colour = style(names.index(name))["color"]
            axis.barh(y, tflops, 0.9, color=colour, label=name)
            label = f" {results.three_digits(tflops)}"
            axis.text(tflops, y, label, va="center", fontsize=7)
        bottom = top + len(present)
        axis.vlines(roof, top - 0.5, bottom - 0.5, _ROOF, "--", label="roof")
        middles.append((top + bottom - 1) / 2)
        top = bottom + 1
    axis.set_yticks(middles, [_workload(row).name for row in rows])
    axis.set_ylim(top - 1, -1)
    axis.set_xlabel("TFLOP/s")
    axis.grid(axis="x", alpha=0.3)
    _finish(figure, axis, mode)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _has_figure(row: Row, name: str) -> bool:
    return name in row and row[name].tflops is not None


def _finish(figure: Figure, axis: Axes, mode: str) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))  # several bars share a label
    figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside upper center",
        ncols=min(len(unique), 6),
        fontsize=9,
        title=_TITLES[mode],
    )
