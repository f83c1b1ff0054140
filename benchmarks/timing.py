"""The only timer: seconds per call of a JAX or a PyTorch callable.

JAX: one jitted `fori_loop` with a static trip count, so that host dispatch is outside
the figure. One element of every result goes back into the first argument, so that no
call can be hoisted or dropped. What that takes stays in: two kernels, 2 to 3 us of each
call on an H200. The same loop around nothing costs 10 to 18 us a trip, but of the host,
which is done with a trip before the GPU is where there is something to compute. What a
run of one empty trip takes, once for all trips of a sample, is subtracted.

JAX over a mesh: the same loop on every device, each of which feeds its own parts back.

PyTorch: the same number of calls captured as one CUDA graph and timed by CUDA events;
a plain loop where capture fails.

The last-level cache is not flushed between calls: a workload's operands are larger.
"""

import dataclasses
import functools
import importlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

Step = Callable[..., Any]
"""Takes the looped array and the fixed ones, returns arrays."""

DEFAULT_SAMPLE_SECONDS = 0.03
_MAX_TRIPS = 8192
_MIN_TRIPS = 2
_EMPTY_RUNS = 5
_CLOCK_SECONDS = 1e-7  # no sample is shorter than the clock can tell


class Sampler(Protocol):
    """Something that can be timed again and again."""

    trips: int

    def sample(self) -> float:
        """Returns the seconds per call of one sample."""
        ...


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the samples of one contender say."""

    seconds: float
    """The median."""
    spread: float
    """(90th percentile - 10th percentile) / median."""
    samples: int
    trips: int


def summarise(samples: Sequence[float], sampler: Sampler) -> Summary:
    """Returns the median and the spread of a sampler's samples."""
    low, median, high = np.percentile(samples, (10, 50, 90))
    return Summary(
        seconds=float(median),
        spread=float((high - low) / median),
        samples=len(samples),
        trips=sampler.trips,
    )


def loop(
    step: Step, trips: int, sharding: NamedSharding | None = None
) -> Callable[..., jax.Array]:
    """Returns a jitted function that runs a step `trips` times, chained.

    Args:
        step: called as step(first, *rest); returns a pytree of arrays.
        trips: the static trip count.
        sharding: how a mesh splits `first` and all results, if one does.

    Returns:
        A function of (first, *rest) that returns `first` with its first element
        overwritten, on a mesh that of each device's part.
    """
    feed = _feed
    if sharding is not None:
        # To feed one element of a whole array to all devices would communicate.
        specs = {"in_specs": (sharding.spec,) * 2, "out_specs": sharding.spec}
        feed = jax.shard_map(_feed, mesh=sharding.mesh, **specs)

    def run(first: jax.Array, *rest: Any) -> jax.Array:
        def body(_: Any, first: jax.Array) -> jax.Array:
            # Without the barrier XLA could compute the one element that is read.
            results = jax.lax.optimization_barrier(step(first, *rest))
            return feed(first, jax.tree.leaves(results))

        return jax.lax.fori_loop(0, trips, body, first)

    return jax.jit(run)


def _feed(first: jax.Array, results: Sequence[jax.Array]) -> jax.Array:
    element = sum(
        (r[(0,) * r.ndim].astype(jnp.float32) for r in results), jnp.float32(0)
    )
    # The clip keeps an element that is fed to itself for thousands of steps finite.
    bounded = jnp.clip(element, -1, 1).astype(first.dtype)
    update = bounded.reshape((1,) * first.ndim)
    return jax.lax.dynamic_update_slice(first, update, (0,) * first.ndim)


@functools.cache
def empty_run_seconds(shape: tuple[int, ...], dtype: jnp.dtype) -> float:
    """Returns what a run of the loop costs beside its trips: one of an empty trip.

    Args:
        shape: of the array that is looped over.
        dtype: of that array.
    """

    def nothing(first: jax.Array) -> list[jax.Array]:
        # One element: a whole array behind the loop's barrier may be copied.
        return [first[(0,) * first.ndim]]

    first = jnp.ones(shape, dtype)
    run = loop(nothing, 1)
    jax.block_until_ready(run(first))
    # What disturbs a run can only make it longer.
    return min(_seconds(run, first) for _ in range(_EMPTY_RUNS))


def _seconds(run: Callable[..., jax.Array], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start


def trips_for(seconds_per_call: float, sample_seconds: float) -> int:
    """Returns how many calls fill one sample."""
    wanted = round(sample_seconds / max(seconds_per_call, 1e-9))
    return min(max(wanted, _MIN_TRIPS), _MAX_TRIPS)


class JaxSampler:
    """Times a JAX step."""

    def __init__(
        self,
        step: Step,
        first: jax.Array,
        rest: Sequence[Any],
        *,
        guess: float,
        sample_seconds: float = DEFAULT_SAMPLE_SECONDS,
    ) -> None:
        """Compiles, warms up, and settles the trip count.

        Args:
            step: called as step(first, *rest).
            first: the array that an element of every result is written to.
            rest: the other arguments; any pytrees.
            guess: seconds per call, roughly; a bad one costs a second compilation.
            sample_seconds: how long one sample should take.
        """
        self._arguments = (first, *rest)
        self._empty = empty_run_seconds(first.shape, first.dtype)
        self.trips = trips_for(guess, sample_seconds)
        self._run = loop(step, self.trips)
        elapsed = self._warm_up()
        if not sample_seconds / 3 <= elapsed <= 3 * sample_seconds:
            per_call = max(elapsed - self._empty, elapsed / 10) / self.trips
            settled = trips_for(per_call, sample_seconds)
            if settled != self.trips:
                self.trips = settled
                self._run = loop(step, self.trips)
                self._warm_up()

    def _warm_up(self) -> float:
        jax.block_until_ready(self._run(*self._arguments))
        return _seconds(self._run, *self._arguments)

    def sample(self) -> float:
        """Returns the seconds per call of one sample."""
        elapsed = _seconds(self._run, *self._arguments)
        return max(elapsed - self._empty, _CLOCK_SECONDS) / self.trips


class MeshSampler:
    """Times a JAX step of arrays that a mesh splits, or that one device of it holds.

    What a run costs stays in: it costs as much on one device as on each of several.
    """

    def __init__(
        self,
        step: Step,
        arguments: Sequence[jax.Array],
        *,
        trips: int | None = None,
        sample_seconds: float = DEFAULT_SAMPLE_SECONDS,
    ) -> None:
        """Compiles, and settles the trip count.

        Args:
            step: called as step(*arguments); its results are split as its arguments.
            arguments: all split alike.
            trips: calls in a sample; default: as many as fill it, at the price of a
                second compilation.
            sample_seconds: how long one sample should take.
        """
        self._arguments = tuple(arguments)
        if trips is None:
            self._compile(step, _MIN_TRIPS)
            trips = trips_for(self.sample(), sample_seconds)
        self._compile(step, trips)

    def _compile(self, step: Step, trips: int) -> None:
        sharding: Any = self._arguments[0].sharding
        self.trips = trips
        self.program = loop(step, trips, sharding).lower(*self._arguments).compile()

    def sample(self) -> float:
        """Returns the seconds per call of one sample, taken right after a run like it.

        A GPU that has waited for its turn is cool and runs at a higher clock.
        """
        jax.block_until_ready(self.program(*self._arguments))
        return _seconds(self.program, *self._arguments) / self.trips


class StateSampler:
    """Times a step that carries its state on, such as a training step.

    Every sample starts from the same state and runs steps in one loop on the device;
    each needs the one before, so that none can be hoisted or dropped.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        state: Any,
        rest: Sequence[Any],
        *,
        sample_seconds: float = DEFAULT_SAMPLE_SECONDS,
    ) -> None:
        """Compiles, warms up, and settles the trip count.

        Args:
            step: called as step(state, *rest), returns the next state; any pytree with
                a `loss` that depends on everything else.
            state: the state that every sample starts from.
            rest: the other arguments; any pytrees.
            sample_seconds: how long one sample should take.
        """

        def run(trips: jax.Array, state: Any, *rest: Any) -> jax.Array:
            return jax.lax.fori_loop(
                0, trips, lambda _, state: step(state, *rest), state
            ).loss

        self._arguments = (state, *rest)
        first = jnp.int32(1)
        started = time.perf_counter()
        self._run = jax.jit(run).lower(first, *self._arguments).compile()
        self.compile_seconds = time.perf_counter() - started
        planned: Any = self._run.memory_analysis()
        self.planned_bytes = int(planned.temp_size_in_bytes)
        """Memory beside the state that the program starts from."""
        second = jnp.int32(2)
        self.loss = float(self._run(second, *self._arguments))
        """After two steps, so that the first one's gradients count."""
        self.trips = 1
        self.guess = self.sample()
        """Seconds per step, from one sample of one step."""
        self.trips = trips_for(self.guess, sample_seconds)

    def sample(self) -> float:
        """Returns the seconds per step of one sample."""
        trips = jnp.int32(self.trips)
        return _seconds(self._run, trips, *self._arguments) / self.trips


class TorchSampler:
    """Times a PyTorch callable of no arguments on the current CUDA device."""

    def __init__(
        self,
        call: Callable[[], Any],
        stream: Any,
        *,
        sample_seconds: float = DEFAULT_SAMPLE_SECONDS,
    ) -> None:
        """Warms up, settles the number of calls, and captures them.

        Args:
            call: what is timed.
            stream: the stream to capture on; a backward pass has to be captured on
                the stream its forward pass ran on.
            sample_seconds: how long one sample should take.
        """
        self._torch = importlib.import_module("torch")
        self._call, self._stream, self.trips = call, stream, 3
        self._run: Callable[[], Any] = self._plain
        self.sample()
        self.trips = trips_for(self.sample(), sample_seconds)
        self._run = self._captured() or self._plain
        self.sample()

    def _plain(self) -> None:
        for _ in range(self.trips):
            self._call()

    def _captured(self) -> Callable[[], Any] | None:
        graph = self._torch.cuda.CUDAGraph()
        try:
            # A capture of the global mode forbids unsafe CUDA calls to every thread,
            # and XLA watches its streams from a thread of its own.
            with self._torch.cuda.graph(
                graph, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._plain()
        except RuntimeError as error:
            warnings.warn(f"timed without a CUDA graph: {error}", stacklevel=2)
            self._torch.cuda.synchronize()
            return None
        return graph.replay

    def sample(self) -> float:
        """Returns the seconds per call of one sample."""
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self._torch.cuda.stream(self._stream):
            start.record()
            self._run()
            end.record()
        self._torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self.trips
