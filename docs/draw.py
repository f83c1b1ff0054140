"""Draws the pictures of the documentation, docs/pictures/*.svg.

    python docs/draw.py

What a mask hides is asked of the library: with values of one-hot rows, the output of a
query is not zero where it sees a key.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np

import jax_flash_attn

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PICTURES = Path(__file__).resolve().parent / "pictures"
SEEN, HIDDEN, CUT, EDGE = "#0072B2", "#F0F0F0", "#E69F00", "white"
_SETTINGS = {"svg.hashsalt": "jax_flash_attn", "font.size": 9}


def visible(
    attend: Callable[..., Any], seqlen_q: int, seqlen_k: int, **options: Any
) -> np.ndarray:
    """Returns which keys (Sq, Sk) each query of a call sees."""
    q, k = jnp.zeros((1, seqlen_q, 1, seqlen_k)), jnp.zeros((1, seqlen_k, 1, seqlen_k))
    one_hot = jnp.eye(seqlen_k)[None, :, None]
    return np.asarray(attend(q, k, one_hot, **options))[0, :, 0] > 0


def _grid(axis: Axes, colours: np.ndarray, title: str) -> None:
    rows, columns = colours.shape
    for (i, j), colour in np.ndenumerate(colours):
        axis.add_patch(plt.Rectangle((j, i), 1, 1, fc=colour, ec=EDGE, lw=1.2))
    axis.set_xlim(0, columns)
    axis.set_ylim(rows, 0)
    axis.set_aspect("equal")
    axis.set_xticks(np.arange(columns) + 0.5, range(columns))
    axis.set_yticks(np.arange(rows) + 0.5, range(rows))
    axis.tick_params(length=0, labelsize=7)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=9)


def _masks(panels: Sequence[tuple[str, np.ndarray]]) -> Figure:
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.9 * len(panels), 2.9), layout="constrained"
    )
    for axis, (title, seen) in zip(axes, panels, strict=True):
        _grid(axis, np.where(seen, SEEN, HIDDEN), title)
        axis.set_xlabel("key j")
    axes[0].set_ylabel("query i")
    return figure


def masks() -> Figure:
    """Causal masks and windows of flash_attn_func, as many queries as keys."""
    attend = jax_flash_attn.flash_attn_func
    return _masks(
        [
            ("causal=True", visible(attend, 6, 6, causal=True)),
            ("window_size=(2, 0)", visible(attend, 6, 6, window_size=(2, 0))),
            ("window_size=(1, 2)", visible(attend, 6, 6, window_size=(1, 2))),
        ]
    )


def alignment() -> Figure:
    """The two alignments, with more and with fewer keys than queries."""
    flash, nn = jax_flash_attn.flash_attn_func, jax_flash_attn.dot_product_attention
    ours, theirs = "flash_attn_func\nbottom-right", "dot_product_attention\ntop-left"
    return _masks(
        [
            (ours, visible(flash, 3, 6, causal=True)),
            (theirs, visible(nn, 3, 6, is_causal=True)),
            (ours, visible(flash, 6, 3, causal=True)),
            (theirs, visible(nn, 6, 3, is_causal=True)),
        ]
    )


def tiles() -> Figure:
    """Which tiles of the scores a causal mask leaves, and which it cuts."""
    size, count = 3, 4
    seen = visible(
        jax_flash_attn.flash_attn_func, size * count, size * count, causal=True
    )
    blocks = seen.reshape(count, size, count, size)
    any_seen, all_seen = blocks.any((1, 3)), blocks.all((1, 3))
    colours = np.where(all_seen, SEEN, np.where(any_seen, CUT, HIDDEN))
    figure, (forward, backward) = plt.subplots(
        1, 2, figsize=(8, 3.9), layout="constrained"
    )
    for axis, title in ((forward, "forward"), (backward, "backward")):
        _grid(axis, colours, title)
        axis.set_xlabel("key tile")
        axis.set_ylabel("query tile")
    arrow = {"arrowstyle": "->", "lw": 2, "color": "black"}
    forward.annotate("", (0, 2.5), (2.9, 2.5), arrowprops=arrow)
    forward.text(3.05, 2.3, "one CTA", fontsize=8)
    backward.annotate("", (1.5, 4), (1.5, 1.1), arrowprops=arrow)
    backward.text(1.6, 0.8, "one CTA", fontsize=8)
    labels = ((SEEN, "whole"), (CUT, "cut: masked element by element"))
    handles = [plt.Rectangle((0, 0), 1, 1, fc=colour) for colour, _ in labels]
    handles.append(plt.Rectangle((0, 0), 1, 1, fc=HIDDEN))
    names = [label for _, label in labels]
    names.append("hidden: never loaded")
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def turns() -> Figure:
    """The forward on Hopper: who works when, over the end of one query tile.

    Durations are a model: 1 for a product of one consumer, more for its exponentials.
    """
    softmax, write, key_tiles = 1.9, 1.2, 3
    lanes = ("tensor cores", "consumer 0", "consumer 1")
    colours = {"q k": SEEN, "p v": CUT, "softmax": "#56B4E9", "write out": "#999999"}
    figure, axis = plt.subplots(figsize=(8.5, 2.3), layout="constrained")

    def bar(lane: int, start: float, length: float, work: str, text: str) -> None:
        axis.broken_barh(
            [(start, length)], (lane - 0.35, 0.7), fc=colours[work], ec=EDGE
        )
        ink = "white" if work == "q k" else "black"
        axis.text(
            start + length / 2,
            lane,
            text,
            ha="center",
            va="center",
            fontsize=7,
            color=ink,
        )

    tensor_free = 0.0
    ready = [0.0, 0.0]  # when each consumer may start its next products
    for turn in range(2 * key_tiles):
        for consumer in range(2):
            last = turn % key_tiles == key_tiles - 1
            products = ("p v", "q k") if last else ("q k", "p v")
            start = max(tensor_free, ready[consumer])
            for n, work in enumerate(products):
                bar(0, start + n, 1, work, f"{work}\n{consumer}")
            tensor_free = start + 2
            after = start + 1  # scores are there, or out is
            if last:
                bar(1 + consumer, after, write, "write out", "out")
                after = max(after + write, start + 2)
            bar(1 + consumer, after, softmax, "softmax", "softmax")
            ready[consumer] = after + softmax
    axis.set_yticks(range(len(lanes)), lanes)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.set_xlabel("time")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "masks": masks,
    "alignment": alignment,
    "tiles": tiles,
    "turns": turns,
}


def save(folder: Path) -> None:
    """Writes every picture into a folder, the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_SETTINGS):
        for name, draw in DRAWINGS.items():
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws the documentation's pictures.")
    parser.add_argument("--out", type=Path, default=PICTURES)
    save(parser.parse_args().out)
