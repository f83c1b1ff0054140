"""Tables and plots of the headline benchmarks, from their JSON lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import plot, results
from benchmarks.training import WITHOUT

Lines = Sequence[dict[str, Any]]

_GIB = 2**30
_DPI = 150
_WINDOW = 50
"""Steps over which a loss curve is averaged before two are compared."""


def _groups(lines: Lines) -> dict[tuple[str, int, float], dict[str, dict[str, Any]]]:
    """Step lines by contender, for each model, length and dropout."""
    groups: dict[tuple[str, int, float], dict[str, dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "step":
            key = line["model"], line["seqlen"], line["dropout_p"]
            groups.setdefault(key, {})[line["contender"]] = line
    return groups


def steps_table(lines: Lines) -> str:
    """Returns training speed as a Markdown table.

    Attention's share is what the step loses where attention is left out; the last two
    columns divide a contender's time by that of ours, of the whole step and of the
    attention part alone.
    """
    header = ["model", "S", "dropout", "attention", "steps/s", "spread", "share"]
    header += ["GiB", "step / ours", "attention part / ours"]
    body = []
    for (model, seqlen, dropout_p), found in _groups(lines).items():
        floor = found.get(WITHOUT, {}).get("seconds")
        ours = found.get(results.OURS, {}).get("seconds")
        for name, line in found.items():
            cells = [model, str(seqlen), f"{dropout_p:g}", name]
            if line["status"] != "ok":
                body.append([*cells, line["status"], *[""] * 5])
                continue
            seconds = line["seconds"]
            part = seconds - floor if floor and name != WITHOUT else None
            cells += [f"{1 / seconds:.3g}", f"{line['spread']:.1%}"]
            cells.append(f"{part / seconds:.0%}" if part is not None else "")
            cells.append(f"{line['planned_bytes'] / _GIB:.3g}")
            cells.append(f"{seconds / ours:.2f}" if ours else "")
            whole = ours - floor if ours and floor else 0.0
            cells.append(f"{part / whole:.2f}" if part and whole > 0 else "")
            body.append(cells)
    return results.markdown(header, body)


def refusals(lines: Lines) -> str:
    """Returns the reasons of all that has no figure."""
    reasons = {
        f"- {line['contender']}: {line['status']}: {line['reason']}": None
        for line in lines
        if line.get("status", "ok") != "ok"
    }
    return "\n".join(reasons)


def accuracy_table(lines: Lines) -> str:
    """Returns held-out accuracies over the seeds as a Markdown table."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if line["kind"] == "accuracy":
            key = line["model"], line["contender"]
            found.setdefault(key, []).append(line["accuracy"])
    body = [
        [
            model,
            name,
            f"{np.mean(values):.3f}",
            f"{np.std(values):.3f}",
            str(len(values)),
        ]
        for (model, name), values in found.items()
    ]
    header = ["task", "attention", "accuracy", "deviation over seeds", "seeds"]
    return results.markdown(header, body) if body else ""


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Returns the means over windows of steps, at most 50 long."""
    window = min(_WINDOW, len(losses))
    kernel = np.ones(window) / window
    return np.convolve(np.asarray(losses), kernel, mode="valid")


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the largest relative difference of two smoothed loss curves."""
    a, b = smoothed(first), smoothed(second)
    return float(np.max(np.abs(a - b) / b))


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
            bar = axis.bar(index, line["steps_per_second"], color=colour)
            axis.bar_label(bar, fmt="%.3g", fontsize=8)
        axis.set_xticks(range(len(found)), list(found), rotation=40, ha="right")
        axis.set_title(f"{model}, S={seqlen}, dropout {dropout_p:g}", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("training steps per second")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def plot_curves(curves: dict[str, Sequence[float]], path: Path) -> None:
    """Writes smoothed loss curves over each other, the second dashed."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for index, (name, losses) in enumerate(curves.items()):
        line = {"color": plot.style(index)["color"], "ls": ("-", "--")[index % 2]}
        axis.plot(smoothed(losses), label=name, lw=1.4, **line)
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss, nats per byte, mean of {_WINDOW} steps")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
