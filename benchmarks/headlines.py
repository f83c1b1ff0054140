"""The results that FlashAttention is known for, rebuilt on one GPU.

    python -m benchmarks.headlines bert       training speed of BERT-large
    python -m benchmarks.headlines gpt2       of GPT-2 small and medium
    python -m benchmarks.headlines lra        long-range arena: speed, memory, accuracy
    python -m benchmarks.headlines memory     attention's memory by sequence length
    python -m benchmarks.headlines curves     loss curves against exact attention

Each writes JSON lines as it goes, prints a table and writes a plot beside them;
`benchmarks.headline_report` makes both again from the lines, also from those of a run
that ended early. `--tiny` runs the same on a CPU in seconds.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import (
    environment,
    headline_report,
    memory,
    plot,
    tasks,
    training,
)
from benchmarks.cells import Log
from benchmarks.contenders import contenders, on_gpu
from benchmarks.correctness import Verdict, failure
from benchmarks.results import EXACT, OURS
from benchmarks.transformer import Architecture
from benchmarks.workloads import Workload

_TIMED = "ours,jax-xla,jax-xla-dropout,jax-cudnn,dew-fa3"
"""Without jax-cudnn-dropout, at which XLA ends the process of a whole model."""
_TRAINED = "ours,jax-xla,jax-xla-float32,jax-cudnn,dew-fa3"
"""Of the loss curves: ours, exact attention, and controls that round otherwise."""

BERT_LARGE = Architecture(
    "bert_large",
    layers=24,
    width=1024,
    heads=16,
    seqlen=512,
    vocab=30522,
    objective="masked",
    mlp_width=4096,
    pre_norm=False,
    source="BERT-large, arXiv:1810.04805",
)
GPT2 = tuple(
    Architecture(
        name,
        layers,
        width,
        heads,
        seqlen=1024,
        vocab=50257,
        objective="next",
        mlp_width=4 * width,
        source="GPT-2, Radford et al. 2019",
    )
    for name, layers, width, heads in (
        ("gpt2_small", 12, 768, 12),
        ("gpt2_medium", 24, 1024, 16),
    )
)
_TEXT = Architecture(
    "text",
    layers=4,
    width=256,
    heads=4,
    seqlen=1024,
    vocab=tasks.NUM_BYTES,
    objective="class",
    mlp_width=1024,
    num_classes=8,
    source="byte-level text of the long-range arena, arXiv:2011.04006",
)
_LISTOPS = dataclasses.replace(
    _TEXT,
    name="listops",
    layers=6,
    width=512,
    heads=8,
    seqlen=2048,
    vocab=tasks.LISTOPS_VOCAB,
    mlp_width=2048,
    num_classes=10,
    source="ListOps of the long-range arena, arXiv:2011.04006",
)
_LRA = {"text": (_TEXT, tasks.text_task), "listops": (_LISTOPS, tasks.listops_task)}
_LRA_LENGTHS = (1024, 2048, 4096)
_LRA_TOKENS = 32768  # in a step of which the speed is measured
_ACCURACY_BATCH = 16
_BYTE_GPT = Architecture(
    "byte_gpt",
    layers=6,
    width=512,
    heads=4,
    seqlen=1024,
    vocab=tasks.NUM_BYTES,
    objective="next",
    mlp_width=2048,
    source="a decoder over the standard library's source",
)

_CURVE_BATCH = 32
# GPT-3's 6e-4 is for batches of half a million tokens. With 8 to 32 thousand it makes
# training unstable at its peak, where two runs part by the size of the instability.
_CURVE_RATE = 3e-4

_MEMORY_HEADS = 1  # two heads' scores of 64k tokens pass 80 GB
_MEMORY_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_LONG_LENGTHS = (262144, 1048576)
_TINY_LENGTHS = (64, 128)

_MEMORY_SHARE = "0.92"  # of the device: JAX's default of 0.75 leaves out what xla needs


def shrunk(architecture: Architecture) -> Architecture:
    """Returns the architecture at a size that a CPU trains in a moment."""
    return dataclasses.replace(
        architecture,
        layers=1,
        width=16,
        heads=2,
        seqlen=32,
        vocab=min(architecture.vocab, tasks.NUM_BYTES),
        mlp_width=32,
        activations="float32",
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One command: its options and where its lines go."""

    options: argparse.Namespace
    log: Log

    @property
    def names(self) -> list[str]:
        """The contenders that were asked for."""
        return self.options.contenders.split(",")

    def sized(self, architecture: Architecture) -> Architecture:
        """Returns the architecture, shrunk where the run is tiny."""
        return shrunk(architecture) if self.options.tiny else architecture

    def lengths(self, chosen: Sequence[int], tiny: Sequence[int]) -> Sequence[int]:
        """Returns the sequence lengths that were asked for, or the tiny ones."""
        asked = self.options.lengths
        if asked is None:
            return tiny if self.options.tiny else chosen
        return [int(n) for n in asked.split(",") if n]

    def or_tiny(self, value: int, tiny: int) -> int:
        """Returns a size, or the tiny one."""
        return tiny if self.options.tiny else value

    def speed(self) -> training.Speed:
        """Returns what times training steps."""
        return training.Speed(
            self.log,
            self.options.rounds,
            self.options.sample_ms / 1e3,
            self.options.quiet,
            checked=not self.options.unchecked,
        )

    def say(self, text: str) -> None:
        """Prints progress, unless the run is quiet."""
        if not self.options.quiet:
            print(text, flush=True)

    def plot_path(self) -> Path:
        """Returns where the plot goes."""
        return self.options.out.with_suffix(".png")


def _speed(run: Run, architectures: Sequence[Architecture], batch: int) -> None:
    speed, size = run.speed(), run.options.batch or run.or_tiny(batch, 2)
    dropout_ps = [float(p) for p in run.options.dropout.split(",")]
    lines = []
    for architecture in map(run.sized, architectures):
        lines += speed.measure(architecture, size, dropout_ps, run.names)
    _print_steps(run, lines)


def _print_steps(run: Run, lines: headline_report.Lines) -> None:
    print(f"\n{headline_report.steps_table(lines)}")
    print(f"\n{headline_report.factors(lines)}")
    _print_refusals(lines)
    headline_report.plot_steps(lines, run.plot_path())


def _print_refusals(lines: headline_report.Lines) -> None:
    left_out = headline_report.refusals(lines)
    if left_out:
        print(f"\nWithout a figure:\n\n{left_out}")


def bert(run: Run) -> None:
    """Training steps of BERT-large, with and without dropout."""
    _speed(run, (BERT_LARGE,), batch=32)


def gpt2(run: Run) -> None:
    """Training steps of GPT-2, with and without dropout."""
    chosen = [a for a in GPT2 if run.options.model in (None, a.name)]
    _speed(run, chosen, batch=8)


def lra(run: Run) -> None:
    """Speed and memory by length, and accuracy over seeds, of each task."""
    chosen = [run.options.task] if run.options.task else list(_LRA)
    lines: list[dict[str, Any]] = []
    speed = run.speed()
    for task in chosen:
        architecture, _ = _LRA[task]
        for seqlen in run.lengths(_LRA_LENGTHS, (32,)):
            sized = dataclasses.replace(run.sized(architecture), seqlen=seqlen)
            size = run.options.batch or run.or_tiny(_LRA_TOKENS // seqlen, 2)
            lines += speed.measure(sized, size, (0.0,), run.names)
    if lines:
        _print_steps(run, lines)
    if run.options.seeds:
        found = [line for task in chosen for line in _accuracy(run, *_LRA[task])]
        print(f"\n{headline_report.accuracy_table(found)}")


def _accuracy(
    run: Run, architecture: Architecture, make_task: Callable[..., tasks.Task]
) -> list[dict[str, Any]]:
    architecture = run.sized(architecture)
    size = run.options.batch or run.or_tiny(_ACCURACY_BATCH, 8)
    counts = run.or_tiny(4096, 64), run.or_tiny(1024, 32)
    task = make_task(architecture.seqlen, *counts)
    architecture = dataclasses.replace(architecture, num_classes=task.num_classes)
    steps = run.options.steps or run.or_tiny(400, 4)
    trainers = _trainers(
        (OURS, EXACT), architecture, task.training, size, steps, rate=5e-4
    )
    lines = []
    for seed in range(run.options.seeds):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            for trained, part in trainer.run(seed):
                state, losses = trained, part
            share = trainer.accuracy(state, task.held_out)
            seconds = time.perf_counter() - started
            fields = {"model": architecture.name, "contender": name, "seed": seed}
            fields |= {"steps": steps, "accuracy": share, "loss": losses[-1]}
            fields["guessing"] = task.held_out.commonest()
            run.log.write("accuracy", **fields, seconds=seconds)
            lines.append({"kind": "accuracy", **fields})
            run.say(
                f"{architecture.name}, {name}, seed {seed}: accuracy {share:.3f}, "
                f"loss {losses[-1]:.4f}, {seconds:.1f} s"
            )
    return lines


def _trainers(
    names: Sequence[str],
    architecture: Architecture,
    source: tasks.Split | np.ndarray,
    size: int,
    steps: int,
    rate: float,
) -> dict[str, training.Trainer]:
    """What trains with each attention, on the same examples."""
    if isinstance(source, tasks.Split):
        tokens, labels = jnp.asarray(source.tokens), jnp.asarray(source.labels)
    else:
        tokens, labels = jnp.asarray(source), None
    examples = training.Examples(tokens, labels, architecture.seqlen)
    workload = architecture.attention(size, dropout_p=0.0)
    return {
        name: training.Trainer(
            architecture,
            contenders()[name].build(workload),
            examples,
            batch_size=size,
            steps=steps,
            learning_rate=rate,
        )
        for name in names
    }


def memory_by_length(run: Run) -> None:
    """Memory of one forward and one backward pass of attention."""
    lengths = run.lengths(_MEMORY_LENGTHS, _TINY_LENGTHS)
    longer = () if run.options.tiny or run.options.lengths else _LONG_LENGTHS
    lines = []
    for name, chosen in ((OURS, (*lengths, *longer)), (EXACT, lengths)):
        for line in memory.measure_elsewhere(name, chosen, "both", _MEMORY_HEADS):
            run.log.write("memory", **line)
            run.say(json.dumps(line))
            lines.append(line)
    print(f"\n{headline_report.memory_table(lines)}")
    plot.save_memory(lines, run.plot_path())


def curves(run: Run) -> None:
    """Loss curves of ours and of exact attention from one seed, no dropout.

    And of controls: attentions that round as well as ours, but otherwise, show what
    rounding alone does to a curve. All train in turns, so that a run that ends early
    has as much of each.
    """
    architecture = run.sized(_BYTE_GPT)
    size = run.options.batch or run.or_tiny(_CURVE_BATCH, 2)
    steps = run.options.steps or run.or_tiny(1000, 6)
    settings = {"batch": size, "steps": steps, "learning_rate": _CURVE_RATE}
    run.log.write("training", **settings, model=dataclasses.asdict(architecture))
    names, refused = _trainable(run, architecture.attention(size, dropout_p=0.0))
    trainers = _trainers(
        names, architecture, tasks.source_text(), size, steps, _CURVE_RATE
    )
    found: dict[str, list[float]] = {name: [] for name in names}
    running = {name: trainer.run(seed=0) for name, trainer in trainers.items()}
    seconds = dict.fromkeys(names, 0.0)
    while len(found[EXACT]) < steps:
        for name in list(running):
            started = time.perf_counter()
            try:
                _, losses = next(running[name])
            except Exception as error:
                if name in (OURS, EXACT):
                    raise
                refused.append(_leave_out(run, name, failure(error)))
                del running[name], found[name]
                continue
            seconds[name] += time.perf_counter() - started
            run.log.write("curve", contender=name, losses=losses)
            found[name] += losses
        spent = ", ".join(f"{name} {seconds[name]:.1f} s" for name in running)
        run.say(f"step {len(found[EXACT])}: {spent}")
    for name in found.keys() - {EXACT}:
        difference = headline_report.largest_difference(found[name], found[EXACT])
        run.log.write("difference", contender=name, largest_relative=difference)
    print(f"\n{headline_report.curves_table(found)}")
    _print_refusals(refused)
    headline_report.plot_curves(found, run.plot_path())


def _trainable(run: Run, workload: Workload) -> tuple[list[str], list[dict[str, Any]]]:
    """Ours, exact attention and what else was asked for and can train; the refusals."""
    every = contenders()
    names, refused = [OURS, EXACT], []
    for name in run.names:
        if name in names:
            continue
        missing = every[name].available() or every[name].supports(workload, "both")
        if missing:
            refused.append(_leave_out(run, name, Verdict("unsupported", missing)))
        else:
            names.append(name)
    return names, refused


def _leave_out(run: Run, name: str, verdict: Verdict) -> dict[str, Any]:
    fields = {"contender": name, "status": verdict.status, "reason": verdict.reason}
    run.log.write("left_out", **fields)
    run.say(f"{name} is left out: {verdict.reason}")
    return {"kind": "left_out", **fields}


COMMANDS: dict[str, Callable[[Run], None]] = {
    "bert": bert,
    "gpt2": gpt2,
    "lra": lra,
    "memory": memory_by_length,
    "curves": curves,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="FlashAttention's headline results.")
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--tiny", action="store_true", help="sizes for a CPU, to see that it runs")
    add("--contenders", help=f"default: {_TIMED}; of curves: {_TRAINED}")
    add("--batch", type=int, help="sequences in a step; default: the command's")
    add("--dropout", default="0,0.1", help="of bert and gpt2; default: %(default)s")
    add("--rounds", type=int, default=5, help="samples each; default: %(default)s")
    add("--sample-ms", type=float, default=400.0, help="default: %(default)s")
    add("--steps", type=int, help="of training; default: the command's")
    add("--seeds", type=int, default=3, help="of lra's accuracy; default: %(default)s")
    add("--lengths", help="of lra's speed ('' for none) and of memory, with commas")
    add("--task", choices=_LRA, help="of lra; default: both")
    add("--model", choices=[a.name for a in GPT2], help="of gpt2; default: both")
    add("--out", type=Path, help="default: headlines_COMMAND.jsonl")
    add("--unchecked", action="store_true", help="time without comparing results")
    add("--quiet", action="store_true", help="no progress")
    return parser


@contextlib.contextmanager
def _compiling(quickly: bool) -> Iterator[None]:
    """Tiny programs take longer to optimise than to run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quickly or before)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the headline benchmarks' command line.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Returns:
        The exit status: 0, or 2 for wrong arguments.
    """
    options = _parser().parse_args(argv)
    every = {n: c for n, c in contenders().items() if c.framework == "jax"}
    if options.contenders is None:
        options.contenders = _TRAINED if options.command == "curves" else _TIMED
    names = options.contenders.split(",")
    unknown = set(names) - set(every)
    if unknown:
        wrong = f"--contenders takes {','.join(every)}, got {sorted(unknown)}"
        print(wrong, file=sys.stderr)
        return 2
    if options.command == "memory":
        # It measures in processes of their own, which need room on the device.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY_SHARE)
    if not (options.tiny or on_gpu()):
        print("without a GPU only --tiny ends in reasonable time", file=sys.stderr)
        return 2
    options.out = options.out or Path(f"headlines_{options.command}.jsonl")
    started = time.monotonic()
    named = [every[name] for name in names]
    with options.out.open("a") as file, _compiling(options.tiny):
        log = Log(file)
        command = ["python", "-m", "benchmarks.headlines", *(argv or sys.argv[1:])]
        log.write("run", **{**environment.describe(named), "command": command})
        COMMANDS[options.command](Run(options, log))
    elapsed = time.monotonic() - started
    print(f"\n{options.out}: {elapsed:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
