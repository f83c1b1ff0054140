"""Trains a small GPT on the Python standard library's source text, byte by byte.

    python examples/train_gpt.py --preset cpu
    python examples/train_gpt.py --preset gpu --attention flash
    python examples/train_gpt.py --compare runs/flash runs/xla

The model and its text are in byte_gpt.py. A run writes loss.csv, loss.png and
sample.txt into its folder and prints the loss on files that it never saw. The same
seed gives the same batches, so that runs with different attention can be laid over
each other.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import loss_curves
import numpy as np
from byte_gpt import (
    FLASH,
    GPT,
    JAX_NN,
    PRESETS,
    Config,
    batches,
    held_out_batches,
    loss_of,
    make_optimizer,
    read_text,
)
from flax import nnx
from tqdm import tqdm


@functools.partial(nnx.jit, static_argnames="dropout")
def train_step(
    model: GPT,
    optimizer: nnx.Optimizer,
    batch: jax.Array,
    key: jax.Array,
    dropout: bool,
) -> jax.Array:
    """Updates the model in place and returns the loss before the update."""
    loss, grads = nnx.value_and_grad(loss_of)(model, batch, key if dropout else None)
    optimizer.update(model, grads)
    return loss


def train(config: Config, text: np.ndarray) -> tuple[GPT, list[float]]:
    """Returns the trained model and the loss of every step."""
    model = GPT(config)
    optimizer = make_optimizer(model, config)
    key = jax.random.key(config.seed)
    losses: list[jax.Array] = []
    stream = batches(text, config, config.seed)
    with tqdm(range(config.steps), desc=config.attention) as progress:
        for step, batch in zip(progress, stream, strict=False):
            step_key = jax.random.fold_in(key, step)
            losses.append(
                train_step(model, optimizer, batch, step_key, config.dropout > 0)
            )
            if step % 10 == 9:
                # Reading a loss waits for the device, so not at every step.
                progress.set_postfix(loss=f"{float(losses[-1]):.3f}")
    return model, [float(loss) for loss in losses]


def held_out_loss(model: GPT, config: Config, text: np.ndarray) -> float:
    """Returns the mean loss over a few fixed batches of the held-out text."""
    evaluate = nnx.jit(loss_of)
    losses = [evaluate(model, batch) for batch in held_out_batches(text, config)]
    return float(jnp.mean(jnp.stack(losses)))


def generate(model: GPT, prompt: np.ndarray, num_bytes: int, seed: int) -> bytes:
    """Returns bytes sampled one by one after a prompt that fills the context.

    The whole window is computed again for each byte: simple, with no cache.
    """

    @nnx.jit
    def sample(model: GPT, window: jax.Array) -> jax.Array:
        def step(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            byte = jax.random.categorical(key, model(window[None])[0, -1])
            byte = byte.astype(window.dtype)
            return jnp.append(window[1:], byte), byte

        keys = jax.random.split(jax.random.key(seed), num_bytes)
        return jax.lax.scan(step, window, keys)[1]

    return bytes(np.asarray(sample(model, prompt.astype(np.int32)), np.uint8))


def write_results(
    out: Path, name: str, losses: Sequence[float], prompt: bytes, sample: bytes
) -> None:
    """Writes loss.csv, loss.png and sample.txt."""
    out.mkdir(parents=True, exist_ok=True)
    loss_curves.write(losses, out / "loss.csv")
    loss_curves.plot({name: losses}, out / "loss.png")
    text = (prompt + b"\n--- sampled from here ---\n" + sample).decode(errors="replace")
    (out / "sample.txt").write_text(text)


def compare(first: Path, second: Path, out: Path) -> float:
    """Overlays two runs' losses in compare.png.

    Returns:
        The largest relative difference of the losses of one step.
    """
    curves = {
        folder.name: loss_curves.read(folder / "loss.csv") for folder in (first, second)
    }
    out.mkdir(parents=True, exist_ok=True)
    loss_curves.plot(curves, out / "compare.png")
    a, b = (np.asarray(losses) for losses in curves.values())
    return float(np.max(np.abs(a - b) / np.abs(b)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small GPT.")
    add = parser.add_argument
    add("--attention", choices=(*FLASH, *JAX_NN), default="flash")
    add("--preset", choices=PRESETS, default="cpu")
    add("--steps", type=int, help="default: the preset's")
    add("--seed", type=int, default=0)
    add("--dropout", type=float, default=0.0, help="of attention; flash only")
    add("--out", type=Path, help="folder to write to; default: runs/ATTENTION")
    add("--sample-bytes", type=int, default=400)
    add("--compare", type=Path, nargs=2, metavar="RUN", help="overlay two runs")
    options = parser.parse_args()
    if options.dropout and options.attention in JAX_NN:
        parser.error(f"--attention {options.attention} has no dropout")
    return options


def main() -> None:
    options = _parse()
    out = options.out or Path("runs", "" if options.compare else options.attention)
    if options.compare:
        difference = compare(*options.compare, out)
        print(f"largest relative difference of the losses: {difference:.2e}")
        return
    preset = PRESETS[options.preset]
    config = dataclasses.replace(
        preset,
        steps=options.steps or preset.steps,
        attention=options.attention,
        dropout=options.dropout,
        seed=options.seed,
    )
    start = time.monotonic()
    text, held_out = read_text()
    model, losses = train(config, text)
    final = held_out_loss(model, config, held_out)
    prompt = held_out[: config.seqlen]
    sample = generate(model, prompt, options.sample_bytes, config.seed)
    write_results(out, config.attention, losses, prompt.tobytes(), sample)
    seconds = time.monotonic() - start
    print(f"held-out loss {final:.3f} nats per byte after {config.steps} steps")
    print(f"{seconds:.0f} s; {out}/loss.csv, loss.png and sample.txt")


if __name__ == "__main__":
    main()
