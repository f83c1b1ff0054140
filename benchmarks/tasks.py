"""Data that every machine has or can make: source text by package, and ListOps.

Text: windows of the Python standard library's source, byte by byte; the label is the
package that a window's file is from. ListOps: nested list operations by the grammar of
Nangia and Bowman (arXiv:1804.06028), with the depths and lengths of the long-range
arena (arXiv:2011.04006).
"""

import dataclasses
import random
import statistics
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

NUM_BYTES = 256
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_HELD_OUT_EVERY = 5
_MAX_CLASSES = 8
_FEWEST_FILES = 8

PAD = 0
OPERATORS = ("MIN", "MAX", "MED", "SM")
_DIGIT, _OPERATOR = 1, 11
CLOSE = _OPERATOR + len(OPERATORS)
LISTOPS_VOCAB = CLOSE + 1
_OPERATOR_SHARE = 0.25
_MAX_ARGUMENTS = 10
_MAX_DEPTH = 10
_LISTOPS_SHARES = 500 / 2048, 2000 / 2048
"""Of the length: the arena's expressions have 500 to 2000 tokens, here 2048 places."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Sequences (N, S) uint8 and their labels (N,) int32."""

    tokens: np.ndarray
    labels: np.ndarray

    def commonest(self) -> float:
        """Returns the share of the commonest label: what guessing it would score."""
        return float(np.bincount(self.labels).max() / len(self.labels))


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification problem; no file or expression is in both splits."""

    training: Split
    held_out: Split
    num_classes: int


def source_files() -> list[Path]:
    """Returns the standard library's source files, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted(root.rglob("*.py"))
    return [p for p in found if not _LEFT_OUT & set(p.relative_to(root).parts)]


def source_text() -> np.ndarray:
    """Returns all source files as one array of bytes."""
    return np.frombuffer(b"".join(p.read_bytes() for p in source_files()), np.uint8)


def text_task(seqlen: int, num_training: int, num_held_out: int, seed: int = 0) -> Task:
    """Returns windows of source text, labelled by package, as often from each."""
    root = Path(sysconfig.get_path("stdlib"))
    packages: dict[str, list[bytes]] = {}
    for path in source_files():
        parts = path.relative_to(root).parts
        if len(parts) > 1:
            packages.setdefault(parts[0], []).append(path.read_bytes())
    large = [texts for texts in packages.values() if len(texts) >= _FEWEST_FILES]
    large.sort(key=lambda texts: sum(map(len, texts)), reverse=True)
    chosen = large[:_MAX_CLASSES]
    if len(chosen) < 2:
        raise RuntimeError(f"{root} holds {len(chosen)} packages, and two are needed")
    generator = np.random.default_rng(seed)
    training = [
        [text for i, text in enumerate(texts) if i % _HELD_OUT_EVERY]
        for texts in chosen
    ]
    held_out = [texts[::_HELD_OUT_EVERY] for texts in chosen]
    return Task(
        _windows(training, seqlen, num_training, generator),
        _windows(held_out, seqlen, num_held_out, generator),
        len(chosen),
    )


def _windows(
    packages: Sequence[Sequence[bytes]],
    seqlen: int,
    count: int,
    generator: np.random.Generator,
) -> Split:
    tokens = np.full((count, seqlen), PAD, np.uint8)
    labels = np.arange(count, dtype=np.int32) % len(packages)
    joined = [np.frombuffer(b"".join(texts), np.uint8) for texts in packages]
    for row, label in zip(tokens, labels, strict=True):
        text = joined[label]
        start = generator.integers(max(len(text) - seqlen, 0) + 1)
        window = text[start : start + seqlen]
        row[: len(window)] = window
    order = generator.permutation(count)
    return Split(tokens[order], labels[order])


def listops_task(
    seqlen: int, num_training: int, num_held_out: int, seed: int = 0
) -> Task:
    """Returns expressions that fill a quarter of the length or more; their values."""
    source = random.Random(seed)
    shortest, longest = (int(seqlen * share) for share in _LISTOPS_SHARES)
    rows: dict[bytes, int] = {}
    while len(rows) < num_training + num_held_out:
        tokens = expression(source, longest)
        if len(tokens) >= shortest:
            rows[bytes(tokens)] = evaluate(tokens)
    padded = [row + bytes(seqlen - len(row)) for row in rows]
    tokens = np.frombuffer(b"".join(padded), np.uint8).reshape(-1, seqlen)
    labels = np.fromiter(rows.values(), np.int32, len(rows))
    return Task(
        Split(tokens[:num_training], labels[:num_training]),
        Split(tokens[num_training:], labels[num_training:]),
        10,
    )


def expression(source: random.Random, limit: int) -> list[int]:
    """Returns the tokens of a random expression, empty where it would pass the limit.

    An operand is an expression with probability 0.25, else a digit; an expression has
    2 to 10 operands and 10 levels at most, its digits counted as one.
    """
    tokens: list[int] = []

    def grow(depth: int) -> bool:
        tokens.append(_OPERATOR + source.randrange(len(OPERATORS)))
        for _ in range(source.randint(2, _MAX_ARGUMENTS)):
            if depth < _MAX_DEPTH - 1 and source.random() < _OPERATOR_SHARE:
                if not grow(depth + 1):
                    return False
            else:
                tokens.append(_DIGIT + source.randrange(10))
        tokens.append(CLOSE)
        return len(tokens) <= limit

    return tokens if grow(1) else []


def evaluate(tokens: Sequence[int]) -> int:
    """Returns the value of an expression: its operators' results, down to one digit."""
    stack: list[tuple[str, list[int]]] = []
    for token in tokens:
        if token == CLOSE:
            operator, operands = stack.pop()
            value = _apply(operator, operands)
        elif token >= _OPERATOR:
            stack.append((OPERATORS[token - _OPERATOR], []))
            continue
        else:
            value = token - _DIGIT
        if not stack:
            return value
        stack[-1][1].append(value)
    raise ValueError("the expression is not closed")


def _apply(operator: str, operands: Sequence[int]) -> int:
    if operator == "SM":
        return sum(operands) % 10
    if operator == "MED":
        return int(statistics.median(operands))
    return min(operands) if operator == "MIN" else max(operands)
