"""The sharded training step of the examples on several GPUs."""

import jax
import jax.numpy as jnp
import pytest
import train_sharded
from byte_gpt import Config

from tests.support import devices, training

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

SMALL = Config(2, 4, 64, 128, 8, 4, 1e-2, jnp.bfloat16, attention="flash-cuda")


@pytest.mark.parametrize("model_parallel", [1, 2])
def test_attention_of_a_step_communicates_nothing(model_parallel, monkeypatch):
    count = devices.num_split_gpus()
    mesh = train_sharded.make_mesh(jax.devices("cuda"), count, model_parallel)
    training.check_attention_adds_no_communication(SMALL, mesh, monkeypatch)
