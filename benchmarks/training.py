"""Times training steps with several attentions in turns, and trains with one."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import arrays, timing, transformer
from benchmarks.cells import Log
from benchmarks.contenders import contenders
from benchmarks.correctness import Checker, Verdict, failure
from benchmarks.tasks import Split
from benchmarks.transformer import Architecture, Attend, Batch, State
from benchmarks.workloads import Workload

WITHOUT = "no attention"
"""The name of the step whose attention is replaced by q + k + v.

All else of the step stays, so that the difference to it is what attention costs.
"""

_CHUNK = 25  # training steps in one call


def _sum(q: Any, k: Any, v: Any, dropout_rng: Any = None) -> Any:
    return q + k + v


@dataclasses.dataclass
class Speed:
    """Training speed of one architecture with several attentions."""

    log: Log
    rounds: int
    sample_seconds: float
    quiet: bool
    checked: bool = True
    """Whether attention is compared with the reference before a step is timed."""

    def measure(
        self,
        architecture: Architecture,
        batch_size: int,
        dropout_ps: Sequence[float],
        names: Sequence[str],
    ) -> list[dict[str, Any]]:
        """Returns one line for each dropout and attention, and writes them down.

        A contender is written down when it is compiled (`contender`), with every
        sample (`sample`), and when all are timed (`step`): what ends early keeps
        what it has.

        Args:
            architecture: the model.
            batch_size: sequences in a step.
            dropout_ps: of attention and of everything else, one after another.
            names: contenders' names.
        """
        optimizer = optax.adamw(transformer.LEARNING_RATE)
        state = transformer.start(architecture, optimizer, seed=0)
        batch = transformer.random_batch(architecture, batch_size)
        lines = []
        for dropout_p in dropout_ps:
            cell = _Cell(self, architecture, batch_size, dropout_p)
            for name in (*names, WITHOUT):
                cell.prepare(name, optimizer, state, batch)
            lines += cell.timed()
            jax.clear_caches()
        return lines


class _Cell:
    """One model, batch and dropout: its contenders, compiled and then timed."""

    def __init__(
        self, speed: Speed, architecture: Architecture, size: int, dropout_p: float
    ) -> None:
        self._speed, self._architecture = speed, architecture
        self._workload = architecture.attention(size, dropout_p)
        self._fields = {
            "model": architecture.name,
            "seqlen": architecture.seqlen,
            "batch": size,
            "dropout_p": dropout_p,
        }
        operands = arrays.make(self._workload) if speed.checked else None
        self._checker = Checker(self._workload, operands)
        self._verdicts: dict[str, Verdict] = {}
        self._samplers: dict[str, timing.StateSampler] = {}

    def _write(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._speed.log.write(kind, **self._fields, **fields)
        return {"kind": kind, **self._fields, **fields}

    def prepare(
        self,
        name: str,
        optimizer: optax.GradientTransformation,
        state: State,
        batch: Batch,
    ) -> None:
        """Compiles the step with one attention, or finds out why it cannot run."""
        verdict, attend = _attention(name, self._workload, self._checker)
        figures: dict[str, Any] = {}
        if attend is not None:
            step = transformer.training_step(
                self._architecture, attend, optimizer, self._workload.dropout_p
            )
            try:
                sampler = timing.StateSampler(
                    step, state, (batch,), sample_seconds=self._speed.sample_seconds
                )
            except Exception as error:
                verdict = failure(error)
            else:
                self._samplers[name] = sampler
                figures = _compiled(sampler) | {"seconds": sampler.guess}
        self._verdicts[name] = verdict
        outcome = {"status": verdict.status, "reason": verdict.reason}
        line = self._write("contender", contender=name, **outcome, **figures)
        if not self._speed.quiet:
            print(_progress(line), flush=True)

    def timed(self) -> list[dict[str, Any]]:
        """Samples every contender in turns; returns the lines."""
        names = list(self._samplers)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for index in range(self._speed.rounds if names else 0):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                seconds = self._samplers[name].sample()
                samples[name].append(seconds)
                self._write("sample", contender=name, seconds=seconds)
        lines = []
        for name, verdict in self._verdicts.items():
            figures = {}
            if samples.get(name):
                sampler = self._samplers[name]
                summary = timing.summarise(samples[name], sampler)
                figures = dataclasses.asdict(summary) | _compiled(sampler)
                figures["steps_per_second"] = 1 / summary.seconds
            outcome = {"status": verdict.status, "reason": verdict.reason}
            lines.append(self._write("step", contender=name, **outcome, **figures))
        return lines


def _compiled(sampler: timing.StateSampler) -> dict[str, float]:
    return {
        "compile_seconds": sampler.compile_seconds,
        "planned_bytes": sampler.planned_bytes,
        "loss": sampler.loss,
    }


def _progress(line: dict[str, Any]) -> str:
    cell = f"{line['model']} S={line['seqlen']} B={line['batch']}"
    label = f"{cell} dropout {line['dropout_p']:g}, {line['contender']}:"
    if line["status"] != "ok":
        return f"{label} {line['status']}: {line['reason']}"
    return (
        f"{label} compiled in {line['compile_seconds']:.1f} s, "
        f"{line['planned_bytes'] / 2**30:.1f} GiB, {line['seconds'] * 1e3:.1f} ms, "
        f"loss {line['loss']:.4f}"
    )


def _attention(
    name: str, workload: Workload, checker: Checker
) -> tuple[Verdict, Attend | None]:
    """A contender's attention once it has passed its check, or why it has not."""
    if name == WITHOUT:
        return Verdict("ok"), _sum
    contender = contenders()[name]
    missing = contender.available()
    if missing:
        return Verdict("unsupported", missing), None
    verdict = checker.verdict(contender, "both")
    if verdict.status != "ok":
        return verdict, None
    return verdict, contender.build(workload)


@dataclasses.dataclass(frozen=True)
class Examples:
    """What is trained on, on the device: text, or sequences and their classes."""

    tokens: jax.Array
    """(N, S), or one long text for next-token prediction."""
    labels: jax.Array | None
    """(N,), or None for next-token prediction."""
    seqlen: int

    def order(self, seed: int, steps: int, batch_size: int) -> np.ndarray:
        """Returns the examples of every step, (steps, batch_size)."""
        last = len(self.tokens) - (self.seqlen if self.labels is None else 0)
        return np.random.default_rng(seed).integers(last, size=(steps, batch_size))

    def batch(self, index: jax.Array) -> Batch:
        """Returns the examples that start, or stand, at the given places."""
        if self.labels is not None:
            picked = self.tokens[index].astype(jnp.int32)
            return {"tokens": picked, "labels": self.labels[index]}
        window = self.tokens[index[:, None] + jnp.arange(self.seqlen + 1)]
        window = window.astype(jnp.int32)
        return {"tokens": window[:, :-1], "labels": window[:, 1:]}


class Trainer:
    """Trains one architecture with one attention, from any seed, compiled once.

    The seed alone fixes parameters and batches: no dropout.
    """

    def __init__(
        self,
        architecture: Architecture,
        attend: Attend,
        examples: Examples,
        *,
        batch_size: int,
        steps: int,
        learning_rate: float,
    ) -> None:
        """Settles everything but the seed.

        Args:
            architecture: the model.
            attend: its attention.
            examples: what it is trained on.
            batch_size: sequences in a step.
            steps: how many.
            learning_rate: the peak, after a warm-up of a tenth of the steps.
        """
        rate = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, max(steps // 10, 1), max(steps, 2)
        )
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
        step = transformer.training_step(architecture, attend, optimizer, 0.0)
        self._start = transformer.starting(architecture, optimizer)
        self._examples, self._steps, self._batch_size = examples, steps, batch_size

        @functools.partial(jax.jit, donate_argnums=0)
        def advance(
            state: State, tokens: jax.Array, labels: jax.Array | None, order: jax.Array
        ) -> tuple[State, jax.Array]:
            held = dataclasses.replace(examples, tokens=tokens, labels=labels)

            def one(state: State, index: jax.Array) -> tuple[State, jax.Array]:
                state = step(state, held.batch(index))
                return state, state.loss

            return jax.lax.scan(one, state, order)

        @jax.jit
        def right(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
            batch = {"tokens": tokens.astype(jnp.int32), "labels": labels}
            key = jax.random.key(0)
            logits = transformer.logits_of(
                architecture, params, batch, attend, 0.0, key
            )
            return (logits.argmax(-1) == labels).sum()

        self._advance, self._right = advance, right

    def run(self, seed: int) -> Iterator[tuple[State, list[float]]]:
        """Trains; yields the state and the losses of some steps at a time.

        The state is valid until the next one is asked for.
        """
        examples = self._examples
        state = self._start(seed)
        order = examples.order(seed, self._steps, self._batch_size)
        for first in range(0, self._steps, _CHUNK):
            part = jnp.asarray(order[first : first + _CHUNK])
            state, losses = self._advance(state, examples.tokens, examples.labels, part)
            yield state, np.asarray(losses).tolist()

    def accuracy(self, state: State, split: Split) -> float:
        """Returns the share of sequences that are classified right."""
        size = self._batch_size
        whole = len(split.labels) // size * size
        parts = (slice(first, first + size) for first in range(0, whole, size))
        counts = [
            self._right(state.params, split.tokens[part], split.labels[part])
            for part in parts
        ]
        return int(sum(counts)) / whole
