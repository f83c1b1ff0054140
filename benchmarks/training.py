"""Times training steps with several attentions in turns, and trains with one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import arrays, timing, transformer
from benchmarks.cells import Log
from benchmarks.contenders import contenders
from benchmarks.correctness import Checker, Verdict, failure
from benchmarks.tasks import Task
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

    def measure(
        self,
        architecture: Architecture,
        batch_size: int,
        dropout_ps: Sequence[float],
        names: Sequence[str],
    ) -> list[dict[str, Any]]:
        """Returns one line for each dropout and attention, and writes them down.

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
            workload = architecture.attention(batch_size, dropout_p)
            checker = Checker(workload, arrays.make(workload))
            samplers, verdicts = {}, {}
            for name in (*names, WITHOUT):
                verdicts[name], attend = _attention(name, workload, checker)
                if attend is None:
                    continue
                step = transformer.training_step(
                    architecture, attend, optimizer, dropout_p
                )
                try:
                    samplers[name] = timing.StateSampler(
                        step, state, (batch,), sample_seconds=self.sample_seconds
                    )
                except Exception as error:
                    verdicts[name] = failure(error)
            figures = self._timed(f"{architecture.name} {dropout_p:g}", samplers)
            for name, verdict in verdicts.items():
                line = {
                    "model": architecture.name,
                    "seqlen": architecture.seqlen,
                    "batch": batch_size,
                    "dropout_p": dropout_p,
                    "contender": name,
                    "status": verdict.status,
                    "reason": verdict.reason,
                    **figures.get(name, {}),
                }
                self.log.write("step", **line)
                lines.append({"kind": "step", **line})
            jax.clear_caches()
        return lines

    def _timed(
        self, label: str, samplers: dict[str, timing.StateSampler]
    ) -> dict[str, dict[str, Any]]:
        names = list(samplers)
        samples: dict[str, list[float]] = {name: [] for name in names}
        rounds = range(self.rounds)
        for index in tqdm(rounds, desc=label, leave=False, disable=self.quiet):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(samplers[name].sample())
        figures = {}
        for name, sampler in samplers.items():
            summary = timing.summarise(samples[name], sampler)
            figures[name] = {
                **dataclasses.asdict(summary),
                "steps_per_second": 1 / summary.seconds,
                "planned_bytes": sampler.planned_bytes,
            }
        return figures


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


def train(
    architecture: Architecture,
    attend: Attend,
    tokens: np.ndarray,
    labels: np.ndarray | None,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    learning_rate: float,
) -> tuple[State, list[float]]:
    """Returns the state after training and the loss of every step.

    The seed alone fixes parameters and batches: no dropout.

    Args:
        architecture: the model.
        attend: its attention.
        tokens: (N, S) for classification, or one long text for next-token prediction.
        labels: (N,) classes, or None for next-token prediction.
        batch_size: sequences in a step.
        steps: how many.
        seed: of parameters and of batches.
        learning_rate: the peak, after a warm-up of a tenth of the steps.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(steps // 10, 1), max(steps, 2)
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    state = transformer.start(architecture, optimizer, seed)
    step = transformer.training_step(architecture, attend, optimizer, 0.0)
    generator = np.random.default_rng(seed)
    seqlen = architecture.seqlen
    last = len(tokens) if labels is not None else len(tokens) - seqlen
    chosen = generator.integers(last, size=(steps, batch_size))
    device_tokens = jnp.asarray(tokens)
    device_labels = None if labels is None else jnp.asarray(labels)

    def batch_of(index: jax.Array) -> Batch:
        if device_labels is not None:
            picked = device_tokens[index].astype(jnp.int32)
            return {"tokens": picked, "labels": device_labels[index]}
        window = device_tokens[index[:, None] + jnp.arange(seqlen + 1)]
        window = window.astype(jnp.int32)
        return {"tokens": window[:, :-1], "labels": window[:, 1:]}

    @jax.jit
    def advance(state: State, indices: jax.Array) -> tuple[State, jax.Array]:
        def one(state: State, index: jax.Array) -> tuple[State, jax.Array]:
            state = step(state, batch_of(index))
            return state, state.loss

        return jax.lax.scan(one, state, indices)

    losses: list[float] = []
    for first in range(0, steps, _CHUNK):
        state, part = advance(state, jnp.asarray(chosen[first : first + _CHUNK]))
        losses += np.asarray(part).tolist()
    return state, losses


def accuracy(
    architecture: Architecture,
    attend: Attend,
    params: Any,
    task: Task,
    batch_size: int,
) -> float:
    """Returns the share of held-out sequences that are classified right."""

    @jax.jit
    def right(tokens: jax.Array, labels: jax.Array) -> jax.Array:
        batch = {"tokens": tokens.astype(jnp.int32), "labels": labels}
        key = jax.random.key(0)
        logits = transformer.logits_of(architecture, params, batch, attend, 0.0, key)
        return (logits.argmax(-1) == labels).sum()

    split, count = task.held_out, 0
    whole = len(split.labels) // batch_size * batch_size
    for first in range(0, whole, batch_size):
        part = slice(first, first + batch_size)
        count += int(right(split.tokens[part], split.labels[part]))
    return count / whole
