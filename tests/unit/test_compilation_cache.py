"""JAX's persistent compilation cache: what a second process finds there."""

import pytest

from tests.support import jax_child, programs

pytestmark = pytest.mark.core

PROGRAM = """
import jax
from tests.support import programs

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
for way in {ways!r}:
    program, operands, context = programs.build(way)
    with context:
        lowered = program.lower(*operands)
        events.clear()
        lowered.compile()
    answer[way] = [name.rpartition("/")[2] for name in events]
"""

KEY_FLAG = "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY"


def compile_in_child(folder, ways, **environment):
    """Returns the ways whose program a process finds in the cache."""
    found = jax_child.run(
        PROGRAM.format(ways=ways),
        JAX_COMPILATION_CACHE_DIR=folder,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0,
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=0,
        PYTHONHASHSEED=0,  # JAX 0.8 orders the mesh axes of shard_map by their hashes
        **environment,
    )
    assert all("compile_requests_use_cache" in found[way] for way in ways)
    return {way for way in ways if "cache_hits" in found[way]}


@pytest.fixture(scope="module")
def hits(tmp_path_factory):
    """What a second process finds, without the flag and with it."""
    folder = tmp_path_factory.mktemp("cache")
    assert compile_in_child(folder, programs.WAYS) == set()
    plain = compile_in_child(folder, programs.WAYS)
    assert compile_in_child(folder, ("auto",), **{KEY_FLAG: 1}) == set()
    return {0: plain, 1: compile_in_child(folder, ("auto",), **{KEY_FLAG: 1})}


@pytest.mark.parametrize("way", ["one_device", "shard_map", "explicit"])
def test_found(way, hits):
    assert way in hits[0]


def test_automatic_sharding_is_found_with_the_flag_alone(hits):
    """The day JAX needs none, the flag leaves `doctor` and the documents."""
    assert "auto" not in hits[0]
    assert "auto" in hits[1]
