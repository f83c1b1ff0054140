"""Programs split over two GPUs: the kernels run on parts of the operands."""

import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from tests.support import partitioning, programs
from tests.support.cases import Case
from tests.support.partitioning import Split

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

CASE = Case(
    "partitioned",
    "a batch and heads for two devices",
    batch=4,
    seqlen_q=150,
    seqlen_k=170,
    heads=4,
    heads_k=2,
    causal=True,
    alibi="bh",
    dropout_p=0.2,
)
PAIR = (("axis", 2),)


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
@pytest.mark.parametrize(
    ("heads_k", "split", "gradients"),
    [
        pytest.param(2, Split(PAIR, batch="axis"), set(), id="batch"),
        pytest.param(2, Split(PAIR, heads="axis", heads_k="axis"), set(), id="heads"),
        pytest.param(1, Split(PAIR, heads="axis"), {"all-reduce"}, id="mqa"),
    ],
)
def test_mesh(heads_k, split, gradients, axis_type):
    case = dataclasses.replace(CASE, heads_k=heads_k)
    mesh = split.make_mesh(axis_type, jax.devices("cuda"))
    partitioning.check(case, split, mesh, gradients=gradients, implementation="cuda")


# The tail of the last tile, groups of query heads, and several tiles.
LONG = dataclasses.replace(
    programs.CASE, batch=4, seqlen_q=300, seqlen_k=300, head_dim=64, dtype="bfloat16"
)


@pytest.fixture(scope="module")
def one_device():
    return run("one_device")


def run(way, grid=(1, 1)):
    return programs.bits(
        way,
        case=LONG,
        devices=jax.devices("cuda"),
        grid=grid,
        implementation="cuda",
        deterministic=True,
    )


@pytest.mark.parametrize(
    ("way", "grid"),
    [
        pytest.param(way, grid, id=f"{way}-{split}")
        for way in ("auto", "explicit", "shard_map", "pmap")
        for split, grid in (("batch", (2, 1)), ("heads", (1, 2)))
        if (way, split) != ("pmap", "heads")
    ],
)
def test_same_bits_as_on_one_device(way, grid, one_device):
    assert run(way, grid) == one_device


@pytest.mark.parametrize("grid", [(2, 1), (1, 2)], ids=["batch", "heads"])
def test_same_forward_without_the_deterministic_mode(grid):
    options = {"case": LONG, "devices": jax.devices("cuda"), "implementation": "cuda"}
    one, two = (
        programs.bits(way, grid=grid, **options)["out"]
        for way in ("one_device", "auto")
    )
    assert one == two
