"""The sharded training step of the examples on several GPUs."""

import jax
import jax.numpy as jnp
import pytest
import train_sharded
from byte_gpt import Config

from tests.support import training

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

SMALL = Config(2, 4, 64, 128, 8, 4, 1e-2, jnp.bfloat16, attention="flash-cuda")


@pytest.mark.parametrize("model_parallel", [1, 2])
def test_attention_of_a_step_communicates_nothing(model_parallel, monkeypatch):
    devices = jax.devices("cuda")
    count = 4 if len(devices) >= 4 else 2
    mesh = train_sharded.make_mesh(devices, count, model_parallel)
    training.check_attention_adds_no_communication(SMALL, mesh, monkeypatch)
