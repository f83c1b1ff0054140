"""The fine-tuning examples: a few steps from a checkpoint of the framework's own."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def quick_compilation():
    """These programs take longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["linen", "nnx", "haiku"])
def test_loss_falls(name):
    losses = load(f"finetune_{name}").finetune(steps=8)
    assert losses[0] == pytest.approx(np.log(256), rel=0.25)
    assert losses[-1] < losses[0] - 0.5


def assert_logits_agree(ours, theirs, tokens):
    """Six digits of float32 logits through two blocks."""
    flash, plain = jax.jit(ours)(tokens), jax.jit(theirs)(tokens)
    np.testing.assert_allclose(flash, plain, rtol=1e-4, atol=1e-5)


def test_linen_checkpoint_means_the_same_on_flash_attention():
    example = load("finetune_linen")
    variables, tokens = example.checkpoint(), example.read_batch(2)[:, :-1]
    mask = nn.make_causal_mask(tokens)
    flash = example.GPT(example.attention_fn(causal=True))
    plain = example.GPT(nn.dot_product_attention)
    assert_logits_agree(
        lambda x: flash.apply(variables, x),
        lambda x: plain.apply(variables, x, mask),
        tokens,
    )


def test_nnx_checkpoint_means_the_same_on_flash_attention():
    example = load("finetune_nnx")
    checkpoint, tokens = example.checkpoint(), example.read_batch(2)[:, :-1]

    def causal(*arrays, is_causal, **options):
        return nnx.dot_product_attention(*arrays, is_causal=True, **options)

    models = []
    for attention in (example.attention_fn(causal=True), causal):
        models.append(example.GPT(attention))
        nnx.update(models[-1], checkpoint)
    assert_logits_agree(*models, tokens)


def test_haiku_checkpoint_means_the_same_on_flash_attention():
    example = load("finetune_haiku")
    params, tokens = example.checkpoint(), example.read_batch(2)[:, :-1]

    def flash(x):
        layer = example._attention(example.MultiHeadAttention, causal=True)
        return layer(x, x, x)

    assert_logits_agree(
        lambda x: example.make_model(flash).apply(params, None, x),
        lambda x: example.make_model(example.own).apply(params, None, x),
        tokens,
    )
