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

FLAGS = {"on": None, "off": "--xla_gpu_enable_command_buffer="}


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
    ("one_device", (1, 1)), ("pmap", (2, 1)), ("shard_map", (1, 2)), ("auto", (2, 1)),
    ("explicit", (1, 2)),
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

WAYS = ("one_device", "pmap", "shard_map", "auto", "explicit")


@pytest.mark.multi_gpu
def test_split_programs_give_what_one_device_gives():
    """In both modes, in every run."""
    found = [jax_child.run(SPLIT_PROGRAM, XLA_FLAGS=FLAGS[mode]) for mode in FLAGS]
    digests = {digest for answer in found for way in WAYS for digest in answer[way]}
    assert len(digests) == 1
