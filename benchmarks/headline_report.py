"""Tables and plots of the headline benchmarks, from their JSON lines.

    python -m benchmarks.headline_report headlines_bert.jsonl

The lines of a run that ended early serve as well: of its last model those samples count
that were taken.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import plot, results
from benchmarks.training import WITHOUT

Lines = Sequence[dict[str, Any]]

_MIB, _GIB = 2**20, 2**30
_DPI = 150
_WINDOW = 50
"""Steps over which a loss curve is averaged before two are compared."""
_DROPPING = "jax-xla-dropout"
"""Exact attention where attention drops: `results.EXACT` has no dropout."""
_APART = 1e-3
"""Relative difference of one step's losses from which two runs count as apart."""


_Key = tuple[str, int, float]


def _key(line: dict[str, Any]) -> _Key:
    return line["model"], line["seqlen"], line["dropout_p"]


def _groups(lines: Lines) -> dict[_Key, dict[str, dict[str, Any]]]:
    """Step lines by contender, for each model, length and dropout."""
    groups: dict[_Key, dict[str, dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "step":
            groups.setdefault(_key(line), {})[line["contender"]] = line
    return groups


def completed(lines: Lines) -> list[dict[str, Any]]:
    """Returns the lines, and a step line for whoever was compiled but never summed up.

    Its figure is the median of the samples that were taken; before the first it is
    the one step of the warm-up.
    """
    added = [dict(line) for line in lines]
    done = {(_key(x), x["contender"]) for x in lines if x["kind"] == "step"}
    for line in lines:
        if line["kind"] != "contender" or (_key(line), line["contender"]) in done:
            continue
        samples = [
            other["seconds"]
            for other in lines
            if other["kind"] == "sample"
            and other["contender"] == line["contender"]
            and _key(other) == _key(line)
        ]
        step = {**line, "kind": "step"}
        if line["status"] == "ok":
            low, median, high = np.percentile(
                samples or [line["seconds"]], (10, 50, 90)
            )
            step["seconds"], step["spread"] = median, (high - low) / median
        added.append(step)
    return added


def steps_table(lines: Lines) -> str:
    """Returns training speed as a Markdown table.

    Attention's share is what the step loses where attention is left out; the last two
    columns divide a contender's time by that of ours, of the whole step and of the
    attention part alone. The loss is that after two steps from the same state.
    """
    header = ["model", "S", "dropout", "attention", "steps/s", "spread", "share"]
    header += ["GiB", "loss", "step / ours", "attention part / ours"]
    body = []
    for (model, seqlen, dropout_p), found in _groups(lines).items():
        floor = found.get(WITHOUT, {}).get("seconds")
        ours = found.get(results.OURS, {}).get("seconds")
        for name, line in found.items():
            cells = [model, str(seqlen), f"{dropout_p:g}", name]
            if line["status"] != "ok":
                body.append([*cells, line["status"], *[""] * (len(header) - 5)])
                continue
            seconds = line["seconds"]
            part = seconds - floor if floor and name != WITHOUT else None
            cells += [f"{1 / seconds:.3g}", f"{line['spread']:.1%}"]
            cells.append(f"{part / seconds:.0%}" if part is not None else "")
            cells.append(f"{line['planned_bytes'] / _GIB:.3g}")
            cells.append(f"{line['loss']:.4f}")
            cells.append(f"{seconds / ours:.2f}" if ours else "")
            whole = ours - floor if ours and floor else 0.0
            cells.append(f"{part / whole:.2f}" if part and whole > 0 else "")
            body.append(cells)
    return results.markdown(header, body)


def factors(lines: Lines) -> str:
    """Returns how much faster ours is than exact attention, and what bounds it.

    A step in which attention costs nothing is the fastest that any attention can make
    it: what separates the whole step's factor from the attention part's is all the
    rest, the same for both.
    """
    found = []
    for (model, seqlen, dropout_p), group in _groups(lines).items():
        seconds = {n: x["seconds"] for n, x in group.items() if x["status"] == "ok"}
        exact = next((n for n in (results.EXACT, _DROPPING) if n in seconds), None)
        if exact is None or not {results.OURS, WITHOUT} <= seconds.keys():
            continue
        ours, floor = seconds[results.OURS], seconds[WITHOUT]
        theirs = seconds[exact]
        if ours <= floor:
            continue  # too small an attention part to be told from noise
        found.append(
            f"- {model}, S={seqlen}, dropout {dropout_p:g}: ours is "
            f"{theirs / ours:.2f} times {exact}; attention alone "
            f"{(theirs - floor) / (ours - floor):.2f} times, {1 - floor / ours:.0%} of "
            f"our step and {1 - floor / theirs:.0%} of {exact}'s; without any "
            f"attention {theirs / floor:.2f} times"
        )
    return "\n".join(found)


def refusals(lines: Lines) -> str:
    """Returns the reasons of all that has no figure."""
    reasons = {
        f"- {line['contender']}: {line['status']}: {line['reason']}": None
        for line in lines
        if line.get("status", "ok") != "ok"
    }
    return "\n".join(reasons)


def accuracy_table(lines: Lines) -> str:
    """Returns held-out accuracies over the seeds as a Markdown table.

    Beside them stands what guessing the commonest label would score.
    """
    found: dict[tuple[str, str], list[float]] = {}
    guessing: dict[str, float] = {}
    for line in lines:
        if line["kind"] == "accuracy":
            key = line["model"], line["contender"]
            found.setdefault(key, []).append(line["accuracy"])
            if "guessing" in line:
                guessing[line["model"]] = line["guessing"]
    body = [
        [
            model,
            name,
            f"{np.mean(values):.3f}",
            f"{np.std(values):.3f}",
            str(len(values)),
            f"{guessing[model]:.3f}" if model in guessing else "",
        ]
        for (model, name), values in found.items()
    ]
    header = ["task", "attention", "accuracy", "deviation over seeds", "seeds"]
    header.append("by guessing")
    return results.markdown(header, body) if body else ""


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Returns the means over windows of steps, at most 50 long."""
    window = min(_WINDOW, len(losses))
    kernel = np.ones(window) / window
    return np.convolve(np.asarray(losses), kernel, mode="valid")


def curves_of(lines: Lines) -> dict[str, list[float]]:
    """Returns the losses of each contender, step by step."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line["kind"] == "curve":
            found.setdefault(line["contender"], []).extend(line["losses"])
    return found


def differences(curve: Sequence[float], exact: Sequence[float]) -> np.ndarray:
    """Returns the relative differences of two smoothed loss curves, step by step.

    Where one is longer, its further steps are left out.
    """
    shared = min(len(curve), len(exact))
    ours, theirs = smoothed(curve[:shared]), smoothed(exact[:shared])
    return (ours - theirs) / theirs


def largest_difference(curve: Sequence[float], exact: Sequence[float]) -> float:
    """Returns the largest relative difference of two smoothed loss curves."""
    return float(np.max(np.abs(differences(curve, exact))))


def curves_table(curves: Mapping[str, Sequence[float]]) -> str:
    """Returns where loss curves end and how far from exact attention's they ever are.

    Training amplifies any rounding until two runs are apart, so that one difference
    tells nothing: beside ours stand attentions that round as well as ours, and below
    what separates any two of those, exact attention among them.
    """
    exact = curves[results.EXACT]
    body = []
    for name, losses in curves.items():
        cells = [name, f"{smoothed(losses)[-1]:.4f}"]
        if name != results.EXACT:
            between = differences(losses, exact)
            apart = [
                step
                for step, (a, b) in enumerate(zip(losses, exact, strict=False))
                if abs(a - b) > _APART * b
            ]
            cells += [f"{np.max(np.abs(between)):.3%}", f"{between[-1]:+.3%}"]
            cells.append(str(apart[0]) if apart else "never")
        body.append(cells + [""] * (5 - len(cells)))
    header = ["attention", "smoothed loss at the end"]
    header += [f"largest difference from {results.EXACT}", "at the end"]
    header.append(f"first step {_APART:.1%} apart")
    lines = [
        f"{min(map(len, curves.values()))} steps, means of {_WINDOW}:",
        results.markdown(header, body),
    ]
    others = [x for name, x in curves.items() if name != results.OURS]
    if len(others) > 1:
        largest = max(
            largest_difference(b, a) for a, b in itertools.combinations(others, 2)
        )
        lines.append(
            f"largest difference between two without {results.OURS}: {largest:.3%}"
        )
    return "\n\n".join(lines)


def memory_table(lines: Lines) -> str:
    """Returns memory by length as a Markdown table, in MiB beside the operands."""
    found = {(line["contender"], line["seqlen"]): line for line in lines}
    names = list(dict.fromkeys(line["contender"] for line in lines))

    def cell(name: str, seqlen: int) -> str:
        line = found.get((name, seqlen))
        if line is None:
            return ""
        if line["status"] != "ok":
            return line["status"]
        num_bytes = line.get("peak_bytes", line["planned_bytes"])
        return results.three_digits(num_bytes / _MIB)

    lengths = sorted({line["seqlen"] for line in lines})
    body = [[str(n), *(cell(name, n) for name in names)] for n in lengths]
    return results.markdown(["S", *(f"{name}, MiB" for name in names)], body)


def plot_steps(lines: Lines, path: Path) -> None:
    """Writes steps per second as bars, a panel for each model, length and dropout."""
    groups = {
        key: {n: x for n, x in found.items() if x["status"] == "ok"}
        for key, found in _groups(lines).items()
    }
    groups = {key: found for key, found in groups.items() if found}
    names = list(dict.fromkeys(n for found in groups.values() for n in found))
    figure, axes = plt.subplots(
        1,
        max(len(groups), 1),
        figsize=(1 + 3 * max(len(groups), 1), 4),
        squeeze=False,
        layout="constrained",
    )
    for axis, (key, found) in zip(axes[0], groups.items(), strict=False):
        model, seqlen, dropout_p = key
        for index, (name, line) in enumerate(found.items()):
            colour = (
                "0.75" if name == WITHOUT else plot.style(names.index(name))["color"]
            )
            bar = axis.bar(index, 1 / line["seconds"], color=colour)
            axis.bar_label(bar, fmt="%.3g", fontsize=8)
        axis.set_xticks(range(len(found)), list(found), rotation=40, ha="right")
        axis.set_title(f"{model}, S={seqlen}, dropout {dropout_p:g}", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("training steps per second")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def plot_curves(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Writes smoothed loss curves over each other, and their differences below."""
    figure, axes = plt.subplots(
        2, sharex=True, height_ratios=(2, 1), figsize=(7, 6), layout="constrained"
    )
    exact = curves[results.EXACT]
    for index, (name, losses) in enumerate(curves.items()):
        line = {"color": plot.style(index)["color"], "ls": ("-", "--")[index % 2]}
        axes[0].plot(smoothed(losses), label=name, lw=1.4, **line)
        if name != results.EXACT:
            axes[1].plot(100 * differences(losses, exact), lw=1.2, **line)
    axes[0].set_ylabel(f"loss, nats per byte, mean of {_WINDOW} steps")
    axes[0].legend()
    axes[1].set_ylabel(f"% above {results.EXACT}")
    axes[1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tables and plots of headline runs.")
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines of runs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of every file and writes its plots beside it."""
    for path in _parser().parse_args(argv).files:
        _report(path)
    return 0


def _report(path: Path) -> None:
    lines = results.read_lines(path)
    steps = completed(
        [x for x in lines if x["kind"] in ("contender", "sample", "step")]
    )
    measured = [line for line in lines if line["kind"] == "memory"]
    curves = curves_of(lines)
    refused = [x for x in lines if x["kind"] == "left_out"]
    texts = [steps_table(steps) if steps else "", factors(steps)]
    texts.append(refusals([*steps, *refused]))
    texts += [accuracy_table(lines), memory_table(measured) if measured else ""]
    texts.append(curves_table(curves) if results.EXACT in curves else "")
    print("\n\n".join([f"# {path}", *filter(None, texts)]), end="\n\n")
    if steps:
        plot_steps(steps, path.with_suffix(".png"))
    if measured:
        plot.save_memory(measured, path.with_suffix(".png"))
    if results.EXACT in curves:
        plot_curves(curves, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
