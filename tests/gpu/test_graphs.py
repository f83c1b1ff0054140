"""Under CUDA graphs, which XLA calls command buffers, and without: equal results."""

import pytest

from tests.support import ahead, jax_child

pytestmark = pytest.mark.gpu

PROGRAM = """
import hashlib
import jax
import numpy as np
import jax_flash_attn
from tests.support import cases, inputs

arrays = inputs.make(cases.BY_NAME["ragged_tail"])
rng = jax.random.key(1)

def loss(q, k, v, rng):
    x = q
    for layer in range(3):
        x = jax_flash_attn.flash_attn_func(
            x, k, v, 0.1 * layer, dropout_rng=rng, softcap=5.0 * layer,
            deterministic=True, implementation="cuda",
        )
    return x.astype("float32").sum()

step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
digests = []
for _ in range(5):
    results = jax.tree.leaves(step(arrays["q"], arrays["k"], arrays["v"], rng))
    text = b"".join(np.asarray(x).tobytes() for x in results)
    digests.append(hashlib.sha256(text).hexdigest())
answer["digests"] = digests
"""

PROFILED = """
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
        for _ in range(3):
            jax.block_until_ready(step(arrays["q"], arrays["k"], arrays["v"], rng))
    (path,) = Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
    answer["kernels"] = [
        (event.name, sorted(str(name) for name, value in event.stats if value))
        for plane in profile.planes if "GPU" in plane.name
        for line in plane.lines
        for event in line.events
        if event.name.startswith("flash_")
    ]
"""

# Left to itself, XLA uses no graph while it is profiled.
FLAGS = {
    "on": "--xla_enable_command_buffers_during_profiling=true",
    "off": "--xla_gpu_enable_command_buffer=",
}


@pytest.fixture(scope="module")
def answers():
    results = ahead.Ahead(
        lambda mode: jax_child.run(PROGRAM, XLA_FLAGS=FLAGS[mode])["digests"], FLAGS
    )
    yield results
    results.close()


@pytest.mark.parametrize("mode", FLAGS)
def test_every_run_gives_the_same(mode, answers):
    digests = answers[mode]
    assert len(digests) == 5
    assert len(set(digests)) == 1


def test_both_modes_give_the_same(answers):
    assert answers["on"] == answers["off"]


@pytest.mark.parametrize("mode", FLAGS)
def test_profile_shows_kernels_inside_the_graph(mode):
    """The profiler gives a kernel of a graph the graph's id."""
    kernels = jax_child.run(PROGRAM + PROFILED, XLA_FLAGS=FLAGS[mode])["kernels"]
    # Runs, layers; a forward kernel, and two or more for the backward.
    assert len(kernels) >= 3 * 3 * (1 + 2)
    inside = {name for name, stats in kernels if any("graph" in x for x in stats)}
    assert inside == ({name for name, _ in kernels} if mode == "on" else set()), kernels


# Several devices

SPLIT_PROGRAM = """
import dataclasses
import hashlib
import jax
from tests.support import programs

case = dataclasses.replace(
    programs.CASE, batch=4, seqlen_q=150, seqlen_k=150, head_dim=64, dtype="bfloat16"
)
for way, grid in (
    ("auto", (2, 1)), ("explicit", (1, 2)), ("shard_map", (1, 2)), ("pmap", (2, 1)),
    ("one_device", (1, 1)),
):
    program, operands, context = programs.build(
        way, case, jax.devices("cuda"), grid, layers=3, implementation="cuda",
        deterministic=True,
    )
    answer[way] = []
    with context:
        for _ in range(4):
            text = b"".join(jax.device_get(x).tobytes() for x in program(*operands))
            answer[way].append(hashlib.sha256(text).hexdigest())
"""

WAYS = ("auto", "explicit", "shard_map", "pmap", "one_device")


@pytest.mark.multi_gpu
def test_split_programs_give_what_one_device_gives(tmp_path):
    """In both modes, in every run; the first finds no compiled kernel."""
    found = [
        jax_child.run(
            SPLIT_PROGRAM,
            XLA_FLAGS=FLAGS[mode],
            JAX_FLASH_ATTN_CACHE_DIR=tmp_path / mode,
        )
        for mode in FLAGS
    ]
    digests = {digest for answer in found for way in WAYS for digest in answer[way]}
    assert len(digests) == 1
