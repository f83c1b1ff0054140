"""Trains the GPT of train_gpt.py on many devices, split over batch and heads.

    python examples/train_sharded.py --preset cpu
    python examples/train_sharded.py --preset gpu --model-parallel 2
    python examples/train_sharded.py --preset cpu --scaling 1,2,4

The batch is split over the mesh axis "data". Heads of attention and hidden features
of the perceptrons are split over the axis "model". Nothing else is said: `jax.jit` gets
the shardings of weights and batch, and XLA splits the step. Attention needs no
communication. On a machine without GPUs the CPU serves as several devices.

On several hosts start the same command on each with `--distributed`, and where the
cluster doesn't tell JAX who is who, `--coordinator`, `--num-processes`, `--process-id`.

A run writes loss.csv and loss.png, `--scaling` writes scaling.csv and scaling.png.
"""

import argparse
import csv
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import byte_gpt
import jax
import jax.numpy as jnp
import loss_curves
import numpy as np
from byte_gpt import GPT, Config
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from tqdm import tqdm

PRESETS = {
    "cpu": dataclasses.replace(byte_gpt.PRESETS["cpu"], steps=250),
    "gpu": byte_gpt.PRESETS["gpu"],
}
CPU_DEVICES = 4
"""How many devices the CPU serves as, unless asked for another number."""

WEIGHT_SPECS = {
    ("qkv", "kernel"): Spec(None, None, "model", None),
    ("out", "kernel"): Spec("model", None, None),
    ("up", "kernel"): Spec(None, "model"),
    ("up", "bias"): Spec("model"),
    ("down", "kernel"): Spec("model", None),
}
"""How weights are split, by the end of their path; every other one is whole."""

BATCH_SPEC = Spec("data")

_WARM_UP_STEPS = 5
_TIMED_STEPS = 10
_TIMED_ROUNDS = 5


class Program(NamedTuple):
    """A compiled training step with its state, and a function of the loss alone."""

    state: Any
    step: Any
    """From (state, batch, key) to (state, loss)."""
    evaluate: Any
    """From (state, batch) to the loss."""
    mesh: Mesh


def make_mesh(devices: Sequence[jax.Device], count: int, model_parallel: int) -> Mesh:
    """Returns a mesh over the first devices.

    Args:
        devices: those there are.
        count: how many to use.
        model_parallel: how many share heads, at most all. They are neighbours, so
            "model" is the inner axis.

    Raises:
        ValueError: there are fewer devices, or the number that share heads divides
            not those that are used.
    """
    if not 1 <= count <= len(devices):
        raise ValueError(f"{count} devices asked for, and there are {len(devices)}")
    model_parallel = min(model_parallel, count)
    if model_parallel < 1 or count % model_parallel:
        raise ValueError(
            f"--model-parallel is {model_parallel}, and takes a divisor of the number "
            f"of devices, {count}"
        )
    grid = np.array(devices[:count]).reshape(-1, model_parallel)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def check(config: Config, mesh: Mesh) -> None:
    """Refuses sizes that the mesh does not divide.

    Raises:
        ValueError: names the size, the mesh axis and what divides.
    """
    for what, size, axis in (
        ("the batch", config.batch, "data"),
        ("the number of heads", config.heads, "model"),
    ):
        if size % mesh.shape[axis]:
            raise ValueError(
                f"{what} is {size}, and takes a multiple of the {mesh.shape[axis]} "
                f"devices of mesh axis {axis!r}"
            )


def shardings_of(state: Any, mesh: Mesh) -> Any:
    """Returns a sharding for each leaf; moments of AdamW are split as their weights."""

    def sharding(path: Any, _: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        names = [name for name in names if name not in ("", "value")]
        return NamedSharding(mesh, WEIGHT_SPECS.get(tuple(names[-2:]), Spec()))

    return jax.tree_util.tree_map_with_path(sharding, state)


def build(config: Config, mesh: Mesh) -> Program:
    """Returns the training program of a model whose weights are made where they go."""
    check(config, mesh)

    def make() -> tuple[Any, Any]:
        model = GPT(config)
        return nnx.split((model, byte_gpt.make_optimizer(model, config)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: nnx.merge(*make())))
    shapes = jax.eval_shape(lambda: make()[1])
    state_sharding = shardings_of(shapes, mesh)
    batch_sharding, whole = NamedSharding(mesh, BATCH_SPEC), NamedSharding(mesh, Spec())

    @functools.partial(
        jax.jit,
        in_shardings=(state_sharding, batch_sharding, whole),
        out_shardings=(state_sharding, whole),
        donate_argnums=0,
    )
    def step(state: Any, batch: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graph, state)
        dropout_rng = key if config.dropout else None
        loss, grads = nnx.value_and_grad(byte_gpt.loss_of)(model, batch, dropout_rng)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    @functools.partial(jax.jit, in_shardings=(state_sharding, batch_sharding))
    def evaluate(state: Any, batch: jax.Array) -> jax.Array:
        model, _ = nnx.merge(graph, state)
        return byte_gpt.loss_of(model, batch)

    state = jax.jit(lambda: make()[1], out_shardings=state_sharding)()
    return Program(state, step, evaluate, mesh)


def place(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns a batch that every host has, each device with its part of it."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.make_array_from_callback(batch.shape, sharding, lambda part: batch[part])


def train(
    config: Config, mesh: Mesh, text: np.ndarray, held_out: np.ndarray
) -> tuple[list[float], float]:
    """Returns the loss of every step, and that on held-out text at the end."""
    state, step, evaluate, _ = build(config, mesh)
    key = jax.random.key(config.seed)
    losses: list[jax.Array] = []
    stream = byte_gpt.batches(text, config, config.seed)
    start = time.monotonic()
    with tqdm(range(config.steps), disable=jax.process_index() > 0) as progress:
        for index, batch in zip(progress, stream, strict=False):
            step_key = jax.random.fold_in(key, index)
            state, loss = step(state, place(batch, mesh), step_key)
            losses.append(loss)
            if index == 0:
                loss.block_until_ready()
                start = time.monotonic()  # compiling is behind us
            elif index % 10 == 9:
                # Reading a loss waits for the devices, so not at every step.
                shown = f"{float(loss):.3f}"
                tokens = index * config.batch * config.seqlen
                rate = tokens / (time.monotonic() - start)
                progress.set_postfix(loss=shown, tokens_per_s=f"{rate:,.0f}")
    batches = byte_gpt.held_out_batches(held_out, config)
    final = [evaluate(state, place(batch, mesh)) for batch in batches]
    return [float(loss) for loss in losses], float(jnp.mean(jnp.stack(final)))


def steps_per_second(config: Config, mesh: Mesh, text: np.ndarray) -> float:
    """Returns the rate of training steps, compiling left out: the median of a few."""
    state, step, _, _ = build(config, mesh)
    batch = place(next(byte_gpt.batches(text, config, config.seed)), mesh)
    key = jax.random.key(config.seed)

    def seconds(steps: int) -> float:
        nonlocal state
        start = time.monotonic()
        for _ in range(steps):
            state, loss = step(state, batch, key)
        loss.block_until_ready()
        return time.monotonic() - start

    seconds(_WARM_UP_STEPS)
    rounds = [seconds(_TIMED_STEPS) for _ in range(_TIMED_ROUNDS)]
    return _TIMED_STEPS / float(np.median(rounds))


class Rate(NamedTuple):
    """The speed on a number of devices."""

    devices: int
    steps_per_s: float
    tokens_per_s: float
    ratio: float
    """Tokens per second over those of the first row, per device of each."""


def measure_scaling(
    config: Config, meshes: Sequence[Mesh], text: np.ndarray, out: Path
) -> list[Rate]:
    """Returns the speed on each mesh; the batch grows with its mesh axis "data".

    What is known is written after each mesh, so that a run which is ended keeps it.
    """
    rates: list[Rate] = []
    for mesh in tqdm(meshes, desc="scaling"):
        grown = dataclasses.replace(config, batch=config.batch * mesh.shape["data"])
        steps = steps_per_second(grown, mesh, text)
        tokens = steps * grown.batch * grown.seqlen
        first = rates[0] if rates else Rate(mesh.size, steps, tokens, 1.0)
        ratio = tokens / first.tokens_per_s * first.devices / mesh.size
        rates.append(Rate(mesh.size, steps, tokens, ratio))
        write_scaling(rates, out)
    return rates


def scaling_table(rates: Sequence[Rate]) -> str:
    """Returns the rates as a Markdown table."""
    lines = [
        "| devices | steps/s | tokens/s | of linear |",
        "| ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.devices} | {r.steps_per_s:.2f} | {r.tokens_per_s:,.0f} | {r.ratio:.0%} |"
        for r in rates
    ]
    return "\n".join(lines)


def plot_scaling(rates: Sequence[Rate], path: Path) -> None:
    """Writes tokens per second by devices as a PNG, linear scaling beside them."""
    figure, axis = loss_curves.plt.subplots(figsize=(5, 4), layout="constrained")
    counts = [r.devices for r in rates]
    per_device = rates[0].tokens_per_s / rates[0].devices
    axis.plot(counts, [r.tokens_per_s for r in rates], marker="o", label="measured")
    axis.plot(counts, [n * per_device for n in counts], ls=":", label="linear")
    axis.set_xlabel("devices")
    axis.set_ylabel("tokens per second")
    axis.set_xticks(counts)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    loss_curves.plt.close(figure)


def write_scaling(rates: Sequence[Rate], out: Path) -> None:
    """Writes scaling.csv and scaling.png."""
    with (out / "scaling.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Rate._fields)
        writer.writerows(rates)
    plot_scaling(rates, out / "scaling.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Trains a small GPT on many devices.")
    add = parser.add_argument
    choices = (*byte_gpt.FLASH, *byte_gpt.JAX_NN)
    add("--attention", choices=choices, default="flash")
    add("--preset", choices=PRESETS, default="cpu")
    add("--devices", type=int, help=f"default: all; {CPU_DEVICES} on a CPU")
    add("--model-parallel", type=int, default=2, help="devices that share heads")
    add("--steps", type=int, help="default: the preset's")
    add("--batch", type=int, help="default: the preset's")
    add("--seed", type=int, default=0)
    add("--dropout", type=float, default=0.0, help="of attention; flash only")
    add(
        "--scaling",
        type=lambda text: [int(count) for count in text.split(",")],
        metavar="1,2,4",
        help="measure the speed on these numbers of devices",
    )
    add("--out", type=Path, default=Path("runs", "sharded"))
    add("--distributed", action="store_true", help="this is one of several hosts")
    add("--coordinator", metavar="HOST:PORT")
    add("--num-processes", type=int)
    add("--process-id", type=int)
    return parser


def find_devices(options: argparse.Namespace) -> Sequence[jax.Device]:
    """Returns the devices to use, those of all hosts.

    Raises:
        ValueError: there are fewer than `--devices` asks for, or another number of
            devices than all of several hosts is asked for.
    """
    if options.distributed and (options.devices or options.scaling):
        raise ValueError(
            "--distributed takes all devices: leave out --devices and --scaling"
        )
    if options.preset == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices or CPU_DEVICES)
    if options.distributed:
        jax.distributed.initialize(
            options.coordinator, options.num_processes, options.process_id
        )
    devices = jax.devices()
    wanted = options.devices or len(devices)
    if wanted > len(devices):
        raise ValueError(f"--devices is {wanted}, and there are {len(devices)}")
    return devices[:wanted]


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    config = dataclasses.replace(
        preset,
        steps=options.steps or preset.steps,
        batch=options.batch or preset.batch,
        attention=options.attention,
        dropout=options.dropout,
        seed=options.seed,
    )
    try:
        devices = find_devices(options)
        counts = options.scaling or [len(devices)]
        meshes = [make_mesh(devices, n, options.model_parallel) for n in counts]
        for mesh in meshes:
            check(config, mesh)
    except ValueError as error:
        parser.error(str(error))
    text, held_out = byte_gpt.read_text()
    if jax.process_index() == 0:
        options.out.mkdir(parents=True, exist_ok=True)
    if options.scaling:
        rates = measure_scaling(config, meshes, text, options.out)
        print(scaling_table(rates))
        print(f"{options.out}/scaling.csv and scaling.png")
        return
    (mesh,) = meshes
    losses, final = train(config, mesh, text, held_out)
    if jax.process_index() > 0:
        return
    loss_curves.write(losses, options.out / "loss.csv")
    name = f"{mesh.shape['data']} x {mesh.shape['model']} devices"
    loss_curves.plot({name: losses}, options.out / "loss.png")
    print(f"held-out loss {final:.3f} nats per byte after {config.steps} steps, {name}")
    print(f"{options.out}/loss.csv and loss.png")


if __name__ == "__main__":
    main()
