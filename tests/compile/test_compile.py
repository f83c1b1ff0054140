"""Every kernel compiles for every architecture, with no spill, stack or warning."""

import dataclasses
import itertools

import pytest

from jax_flash_attn import _ffi, _spec
from tests.support import ahead, tile_table

SHORT = _ffi.native.seqlen_limits[0]
LONG = _ffi.native.seqlen_limits[-1] + 1
"""Fewer queries than these may have kernels of their own."""

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

EVERYTHING = {
    "window_left": 100,
    "window_right": 0,
    "softcap": 20.0,
    "alibi": True,
    "dropout_p": 0.1,
    "deterministic": True,
}

FEATURES = {
    "plain": {},
    "causal": {"window_right": 0},
    "everything": EVERYTHING,
    "everything_unordered": {**EVERYTHING, "deterministic": False},
    "window": {"window_left": 100, "window_right": 50},
    "softcap": {"softcap": 20.0},
    "alibi": {"alibi": True},
    "dropout": {"dropout_p": 0.1},
    "deterministic": {"deterministic": True},
    "causal_dropout": {"window_right": 0, "dropout_p": 0.1},
    "causal_alibi": {"window_right": 0, "alibi": True},
    "causal_dropout_alibi": {"window_right": 0, "dropout_p": 0.1, "alibi": True},
    "causal_deterministic": {"window_right": 0, "deterministic": True},
    "negative_scale": {"softmax_scale": -0.1},
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One compilation: an operation for one architecture, head dim and feature set."""

    operation: str
    architecture: str
    head_dim: int
    features: str
    dtype: str
    tiles: str = ""
    """As `testing.override_tiles` takes them; empty for the tables' choice."""
    seqlen_q: int = LONG

    def __str__(self) -> str:
        parts = (*dataclasses.astuple(self)[:-1], "short" * (self.seqlen_q < LONG))
        return "-".join(filter(None, map(str, parts)))

    @property
    def spec(self) -> dict:
        options = {"softmax_scale": self.head_dim**-0.5, **FEATURES[self.features]}
        return _ffi.attributes(_spec.AttentionSpec(**options))


OPERATIONS = ("forward", "backward")

ROWS = tile_table.rows()

# The last head dim that a row serves is the one that needs the most registers.
EDGES = tuple(sorted({row.max_head_dim for row in ROWS}))


def cells(architectures, head_dims, features, dtypes=("bfloat16",)):
    product = itertools.product(OPERATIONS, architectures, head_dims, features, dtypes)
    return [Cell(*values) for values in product]


def short(head_dims, features):
    """Forwards of short sequences on sm_90."""
    product = itertools.product(["forward"], ["sm_90"], head_dims, features)
    return [Cell(*values, "bfloat16", seqlen_q=SHORT) for values in product]


def asked_for(operation, family, head_dims, features):
    """A family on sm_90, be it the tables' choice there or not."""
    product = itertools.product([operation], ["sm_90"], head_dims, features)
    return [Cell(*values, "bfloat16", family) for values in product]


def whole_heads(head_dims, features):
    """Whole heads by every row of their table, which has none for long sequences."""
    rows = [row for row in ROWS if row.family == "sm90head"]
    assert len(rows) == 2
    return [
        cell
        for row in rows
        for cell in asked_for("backward", row.text, head_dims, features)
    ]


_DEMANDING = ["softcap", "causal_dropout_alibi", "everything_unordered"]
"""Features that need the most registers, each in its own way."""


# Shared memory decides between rows; sm_90, sm_80 and sm_86 have each of its sizes.
COVERING = list(
    dict.fromkeys(
        [
            *cells(["sm_90"], EDGES, ["plain", "causal", "everything"]),
            *asked_for("forward", "sm80", EDGES, ["plain", "everything"]),
            *asked_for("backward", "sm80", [64, 128], ["plain", "causal_dropout"]),
            *asked_for("backward", "sm90", [96, 128], _DEMANDING[:2]),
            *asked_for("backward", "sm90", [8, 40, 64, 96], _DEMANDING[-1:]),
            *asked_for("backward", "sm90split", [64, 96, 128], _DEMANDING),
            *asked_for(
                "backward", "sm90split", [64, 96, 128], ["plain", "causal_alibi"]
            ),
            *asked_for("backward", "sm90split", [192, 256], _DEMANDING[:2]),
            *whole_heads([8, 40, 64], ["plain", _DEMANDING[1]]),
            *whole_heads([64], ["causal", "alibi", "dropout"]),
            *asked_for("backward", "sm90cluster", [136, 192, 256], _DEMANDING[:2]),
            *asked_for("backward", "sm90cluster", [192, 256], ["plain", "causal"]),
            *cells(["sm_80", "sm_86"], EDGES, ["plain", "everything"], ["float16"]),
            *cells(["sm_90"], [8, 40, 96, 160, 224], ["everything"], ["float16"]),
            *short([8, 48, 64, 200, 256], ["causal", *_DEMANDING]),
            *cells(["sm_89", "sm_100", "sm_120"], [64, 256], ["everything"]),
            *cells(["sm_89", "sm_100", "sm_120"], [128], ["plain"], ["float16"]),
        ]
    )
)

ALL = [
    *cells(ARCHITECTURES, range(8, 257, 8), FEATURES),
    *cells(ARCHITECTURES, range(8, 257, 8), ["everything"], ["float16"]),
    *asked_for("forward", "sm80", range(8, 257, 8), FEATURES),
    *asked_for("backward", "sm80", range(8, 257, 8), FEATURES),
    *short(range(8, 257, 8), FEATURES),
]

PARAMETERS = [
    *(pytest.param(cell, id=str(cell)) for cell in COVERING),
    *(
        pytest.param(cell, id=str(cell), marks=pytest.mark.long)
        for cell in ALL
        if cell not in set(COVERING)
    ),
]


def compile_cell(cell):
    try:
        return _ffi.native.compile(
            cell.operation,
            cell.spec,
            cell.dtype,
            cell.head_dim,
            cell.architecture,
            fresh=True,
            tiles=cell.tiles,
            seqlen_q=cell.seqlen_q,
        )
    except RuntimeError as error:
        return error


@pytest.fixture(scope="session")
def compiled(request):
    """The compiler's report of each cell, made on every core."""
    reports = ahead.Ahead(compile_cell, ahead.parameters(request.session, "cell"))
    yield reports
    reports.close()


@pytest.mark.parametrize("cell", PARAMETERS)
def test_no_spill_stack_or_warning(cell, compiled):
    report = compiled[cell]
    if isinstance(report, Exception):
        raise report
    names = [kernel["entry"] for kernel in report]
    tiles = report[0]["tiles"]
    kernels = 2 if "split" in tiles else 1 if "head" in tiles else 3
    assert len(names) == (1 if cell.operation == "forward" else kernels)
    for kernel in report:
        assert kernel["cubin"].startswith(b"\x7fELF")
        found = {name: kernel[name] for name in ("spill_bytes", "stack_bytes")}
        where = f"{kernel['entry']}, {kernel['tiles']}, {kernel['registers']} registers"
        assert found == {"spill_bytes": 0, "stack_bytes": 0}, where
        assert kernel["warnings"] == [], where


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_row_of_the_table_is_compiled(row, compiled):
    chosen = [
        compiled[cell]
        for cell in COVERING
        if cell.operation == row.operation and cell.head_dim <= row.max_head_dim
    ]
    tiles = {kernel["tiles"] for report in chosen for kernel in report}
    assert any(all(part in text for part in row.described) for text in tiles)
