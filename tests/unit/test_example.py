"""The GPT example: a few steps of a tiny model."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_gpt.py"


@pytest.fixture(scope="module")
def train_gpt():
    spec = importlib.util.spec_from_file_location("train_gpt", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text():
    return np.frombuffer(b"for byte in text: print(byte)\n" * 40, np.uint8)


@pytest.fixture(scope="module")
def tiny(train_gpt):
    return train_gpt.Config(1, 2, 8, 16, 4, 12, 1e-2, jnp.float32)


def test_loss_falls_and_the_model_writes(train_gpt, tiny, text):
    model, losses = train_gpt.train(tiny, text)
    assert losses[0] == pytest.approx(np.log(256), rel=0.2)
    assert losses[-1] < losses[0] - 0.5
    assert train_gpt.held_out_loss(model, tiny, text) < losses[0] - 0.5
    assert len(train_gpt.generate(model, text[: tiny.seqlen], 5, seed=0)) == 5


def test_flash_trains_as_jax_nn_does(train_gpt, tiny, text):
    short = dataclasses.replace(tiny, steps=4)
    _, flash = train_gpt.train(short, text)
    _, xla = train_gpt.train(dataclasses.replace(short, attention="xla"), text)
    np.testing.assert_allclose(flash, xla, rtol=1e-4)


def test_dropout_depends_on_its_key_alone(train_gpt, tiny):
    config = dataclasses.replace(tiny, dropout=0.5)
    attend = train_gpt.attention_of(config)
    qkv = jax.random.normal(jax.random.key(0), (2, 16, 3, 2, 8))
    once, again, other = (attend(qkv, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)
    with pytest.raises(ValueError, match="no dropout"):
        train_gpt.attention_of(dataclasses.replace(config, attention="xla"))


def test_batches_repeat_for_a_seed(train_gpt, tiny, text):
    first, again, other = (
        np.stack(list(itertools.islice(train_gpt.batches(text, tiny, seed), 3)))
        for seed in (3, 3, 4)
    )
    assert first.shape == (3, tiny.batch, tiny.seqlen + 1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_held_out_text_is_apart_and_long_enough(train_gpt):
    training, held_out = train_gpt.read_text()
    longest = max(preset.seqlen for preset in train_gpt.PRESETS.values())
    assert longest < len(held_out) < len(training) / 5


def test_runs_are_written_and_compared(train_gpt, tmp_path):
    for name, losses in (("a", [2.0, 1.0]), ("b", [2.0, 1.25])):
        train_gpt.write_results(tmp_path / name, name, losses, b"x = ", b"1")
    difference = train_gpt.compare(tmp_path / "a", tmp_path / "b", tmp_path)
    assert difference == pytest.approx(0.2)
    assert (tmp_path / "compare.png").exists()
    assert (tmp_path / "a" / "sample.txt").read_text().startswith("x = ")
