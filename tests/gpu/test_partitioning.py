"""Programs split over several GPUs: the kernels run on parts of the operands."""

import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from tests.support import devices, jax_child, partitioning, programs
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


@pytest.mark.parametrize("way", ["auto", "explicit", "shard_map"])
def test_same_bits_split_over_batch_and_heads_of_all_devices(way, one_device):
    """Of two, both share heads."""
    assert run(way, (devices.num_split_gpus() // 2, 2)) == one_device


def test_same_bits_of_a_pmap_over_all_devices(one_device):
    assert run("pmap", (devices.num_split_gpus(), 1)) == one_device


CACHE_PROGRAM = """
import dataclasses
import jax
from tests.support import programs

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
for way in programs.WAYS:
    program, operands, context = programs.build(
        way, devices=jax.devices("cuda"), grid=(2, 1), implementation="cuda",
        case=dataclasses.replace(programs.CASE, dtype="bfloat16"),
    )
    with context:
        lowered = program.lower(*operands)
        events.clear()
        lowered.compile()(*operands)
    answer[way] = any(name.endswith("/cache_hits") for name in events)
"""


def test_compilation_cache_hits_in_a_second_process(tmp_path):
    """For automatic sharding that takes a flag, which tests/unit covers."""
    first, second = (
        jax_child.run(
            CACHE_PROGRAM,
            JAX_COMPILATION_CACHE_DIR=tmp_path,
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0,
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=0,
        )
        for _ in range(2)
    )
    assert not any(first[way] for way in programs.WAYS)
    assert all(second[way] for way in programs.WAYS if way != "auto")
