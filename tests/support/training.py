"""The sharded training step of the examples: what its attention communicates."""

import byte_gpt
import jax
import numpy as np
import train_sharded

from tests.support import partitioning

TEXT = np.frombuffer(b"for byte in text: print(byte)\n" * 40, np.uint8)


def compile_step(config, mesh):
    """Returns the compiled training step of a model on a mesh."""
    program = train_sharded.build(config, mesh)
    batch = next(byte_gpt.batches(TEXT, config, config.seed))
    placed = train_sharded.place(batch, mesh)
    return program.step.lower(program.state, placed, jax.random.key(0)).compile()


def compile_step_without_attention(config, mesh, monkeypatch):
    """The same with products of queries and keys, element by element, in its place."""

    def products(qkv, dropout_rng):
        return qkv[:, :, 0] * qkv[:, :, 1] + qkv[:, :, 2]

    with monkeypatch.context() as patch:
        patch.setattr(byte_gpt, "attention_of", lambda config: products)
        return compile_step(config, mesh)


def check_attention_adds_no_communication(config, mesh, monkeypatch):
    """Checks that a step reduces what it reduces without attention, and no more."""
    found = partitioning.communicated(compile_step(config, mesh))
    without = compile_step_without_attention(config, mesh, monkeypatch)
    assert found == partitioning.communicated(without)
    assert set(found) == {"all-reduce"}
