"""The GPT examples: a few steps of a tiny model, on one device and on several."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import byte_gpt
import jax
import jax.numpy as jnp
import loss_curves
import numpy as np
import pytest
import train_gpt
import train_sharded
from byte_gpt import Config
from jax.sharding import PartitionSpec as Spec

from tests.support import training

TINY = Config(1, 2, 8, 16, 4, 12, 1e-2, jnp.float32)
SPLIT = dataclasses.replace(TINY, batch=8, steps=4)


@pytest.fixture(autouse=True, scope="module")
def fast_compile():
    """These programs take longer to optimise than to run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def text():
    return training.TEXT


def test_loss_falls_and_the_model_writes(text):
    model, losses = train_gpt.train(TINY, text)
    assert losses[0] == pytest.approx(np.log(256), rel=0.2)
    assert losses[-1] < losses[0] - 0.5
    assert train_gpt.held_out_loss(model, TINY, text) < losses[0] - 0.5
    assert len(train_gpt.generate(model, text[: TINY.seqlen], 5, seed=0)) == 5


def test_flash_trains_as_jax_nn_does(text):
    short = dataclasses.replace(TINY, steps=4)
    _, flash = train_gpt.train(short, text)
    _, xla = train_gpt.train(dataclasses.replace(short, attention="xla"), text)
    np.testing.assert_allclose(flash, xla, rtol=1e-4)


def test_dropout_depends_on_its_key_alone():
    config = dataclasses.replace(TINY, dropout=0.5)
    attend = byte_gpt.attention_of(config)
    qkv = jax.random.normal(jax.random.key(0), (2, 16, 3, 2, 8))
    once, again, other = (attend(qkv, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)
    with pytest.raises(ValueError, match="no dropout"):
        byte_gpt.attention_of(dataclasses.replace(config, attention="xla"))


def test_batches_repeat_for_a_seed(text):
    first, again, other = (
        np.stack(list(itertools.islice(byte_gpt.batches(text, TINY, seed), 3)))
        for seed in (3, 3, 4)
    )
    assert first.shape == (3, TINY.batch, TINY.seqlen + 1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_held_out_text_is_apart_and_long_enough():
    training, held_out = byte_gpt.read_text()
    longest = max(preset.seqlen for preset in byte_gpt.PRESETS.values())
    assert longest < len(held_out) < len(training) / 5


def test_runs_are_written_and_compared(tmp_path):
    for name, losses in (("a", [2.0, 1.0]), ("b", [2.0, 1.25])):
        train_gpt.write_results(tmp_path / name, name, losses, b"x = ", b"1")
    difference = train_gpt.compare(tmp_path / "a", tmp_path / "b", tmp_path)
    assert difference == pytest.approx(0.2)
    assert (tmp_path / "compare.png").exists()
    assert (tmp_path / "a" / "sample.txt").read_text().startswith("x = ")


# Several devices


def make_mesh(count, model_parallel):
    return train_sharded.make_mesh(jax.devices("cpu"), count, model_parallel)


def test_many_devices_train_as_one_does(text):
    config = dataclasses.replace(SPLIT, dropout=0.5)
    one = train_sharded.train(config, make_mesh(1, 1), text, text)
    many = train_sharded.train(config, make_mesh(4, 2), text, text)
    np.testing.assert_allclose(many[0], one[0], rtol=1e-4)
    assert many[1] == pytest.approx(one[1], rel=1e-4)
    assert one[0][-1] < one[0][0]


@pytest.mark.parametrize("model_parallel", [1, 2])
def test_attention_of_a_step_communicates_nothing(model_parallel, monkeypatch):
    """A step sums over devices what it sums without attention; nothing is gathered."""
    mesh = make_mesh(4, model_parallel)
    training.check_attention_adds_no_communication(SPLIT, mesh, monkeypatch)


def test_heads_of_weights_and_moments_are_shared_out():
    state = train_sharded.build(SPLIT, make_mesh(4, 2)).state
    split = [
        leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "qkv" in jax.tree_util.keystr(path)
    ]
    # The weight of each layer and its two moments.
    assert split == [Spec(None, None, "model", None)] * (3 * SPLIT.layers)


def test_scaling_is_tabled_and_plotted(text, tmp_path, monkeypatch):
    """Tokens count, not steps: a batch grows with the devices that share it out."""
    monkeypatch.setattr(
        train_sharded, "steps_per_second", lambda config, mesh, text: 10 / mesh.size
    )
    meshes = [make_mesh(count, 2) for count in (1, 2, 4)]
    rates = train_sharded.measure_scaling(TINY, meshes, text, tmp_path)
    tokens = TINY.batch * TINY.seqlen
    assert [(rate.devices, rate.tokens_per_s, rate.ratio) for rate in rates] == [
        (1, 10 * tokens, 1.0),
        (2, 5 * tokens, 0.25),
        (4, 5 * tokens, 0.125),
    ]
    assert len(train_sharded.scaling_table(rates).splitlines()) == 5
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "scaling.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("count", "model_parallel", "message"),
    [
        (9, 1, "9 devices asked for, and there are 8"),
        (3, 2, "--model-parallel is 2"),
        (3, 3, "number of heads is 2"),
        (8, 1, "batch is 4"),
    ],
)
def test_sizes_that_devices_cannot_share_are_refused(count, model_parallel, message):
    with pytest.raises(ValueError, match=message):
        train_sharded.check(TINY, make_mesh(count, model_parallel))


@pytest.mark.long
def test_two_processes_train_as_one_does(tmp_path):
    script = Path(train_sharded.__file__)
    arguments = ["--preset", "cpu", "--steps", "3"]
    several = ["--distributed", "--coordinator", "localhost:12391"]
    commands = {
        "one": ["--devices", "8"],
        "first": [*several, "--num-processes", "2", "--process-id", "0"],
        "second": [*several, "--num-processes", "2", "--process-id", "1"],
    }
    children = [
        subprocess.Popen(
            [sys.executable, script, *arguments, *more, "--out", tmp_path / name],
            env={name: x for name, x in os.environ.items() if name != "XLA_FLAGS"},
        )
        for name, more in commands.items()
    ]
    assert [child.wait(timeout=300) for child in children] == [0, 0, 0]
    one, many = (
        loss_curves.read(tmp_path / name / "loss.csv") for name in ("one", "first")
    )
    np.testing.assert_allclose(many, one, rtol=1e-4)
    assert not (tmp_path / "second").exists()
