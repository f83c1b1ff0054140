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
