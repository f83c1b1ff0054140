"""Loss curves of training runs: one CSV file for a run, one plot for some runs."""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def write(losses: Sequence[float], path: Path) -> None:
    """Writes the loss of every step as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        writer.writerows(enumerate(losses))


def read(path: Path) -> list[float]:
    """Returns what `write` wrote."""
    with path.open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def plot(curves: dict[str, Sequence[float]], path: Path) -> None:
    """Writes loss curves as a PNG, thin lines over each other."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in curves.items():
        axis.plot(losses, label=name, lw=0.9)
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per byte")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
