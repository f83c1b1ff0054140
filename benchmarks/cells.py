"""Measures the cells of one workload and writes them down as JSON lines."""

import dataclasses
import json
import uuid
from collections.abc import Sequence
from typing import Any, TextIO

import jax
from tqdm import tqdm

from benchmarks import arrays, modes, timing, workloads
from benchmarks.contenders import Contender
from benchmarks.correctness import Checker, Verdict, failure
from benchmarks.roof import Roof
from benchmarks.workloads import Mode, Workload

_GUESSED_ROOF_FRACTION = 0.6


class Log:
    """Appends JSON lines to a file, each as it comes."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._run = uuid.uuid4().hex[:8]

    def write(self, kind: str, **fields: Any) -> None:
        """Writes one line; a reader may follow along."""
        line = {"kind": kind, "run": self._run, **fields}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


@dataclasses.dataclass
class Bench:
    """What all cells of one process share."""

    log: Log
    roof: Roof
    contenders: Sequence[Contender]
    rounds: int
    sample_seconds: float
    quiet: bool
    checked: bool = True

    def measure(self, workload: Workload, chosen: Sequence[Mode]) -> None:
        """Checks, if asked to, and times every contender on one workload."""
        operands = arrays.make(workload)
        checker = Checker(workload, operands if self.checked else None)
        for mode in chosen:
            self._mode(workload, mode, operands, checker)
        jax.clear_caches()

    def _mode(
        self,
        workload: Workload,
        mode: Mode,
        operands: arrays.Operands,
        checker: Checker,
    ) -> None:
        samplers: dict[str, timing.Sampler] = {}
        for contender in self.contenders:
            with contender.running():
                verdict = checker.verdict(contender, mode)
                if verdict.status == "ok":
                    try:
                        samplers[contender.name] = self._sampler(
                            contender, workload, mode, operands
                        )
                        continue
                    except Exception as error:
                        verdict = failure(error)
            self._write(workload, mode, contender, verdict)
        summaries = self._timed(f"{workload.name} {mode}", samplers)
        for contender in self.contenders:
            if contender.name in summaries:
                verdict = checker.verdict(contender, mode)
                figures = self._figures(workload, mode, summaries[contender.name])
                self._write(workload, mode, contender, verdict, **figures)

    def _sampler(
        self,
        contender: Contender,
        workload: Workload,
        mode: Mode,
        operands: arrays.Operands,
    ) -> timing.Sampler:
        guess = self.roof.seconds(workload, mode) / _GUESSED_ROOF_FRACTION
        return modes.sampler(
            contender,
            workload,
            mode,
            operands,
            guess=guess,
            sample_seconds=self.sample_seconds,
        )

    def _timed(
        self, label: str, samplers: dict[str, timing.Sampler]
    ) -> dict[str, timing.Summary]:
        names = list(samplers)
        running = {c.name: c.running for c in self.contenders}
        samples: dict[str, list[float]] = {name: [] for name in names}
        rounds = range(self.rounds if names else 0)
        for index in tqdm(rounds, desc=label, leave=False, disable=self.quiet):
            # A rotating start, so that nobody always follows the same neighbour.
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                with running[name]():
                    samples[name].append(samplers[name].sample())
        return {n: timing.summarise(s, samplers[n]) for n, s in samples.items()}

    def _figures(
        self, workload: Workload, mode: Mode, summary: timing.Summary
    ) -> dict[str, Any]:
        floor = self.roof.seconds(workload, mode)
        teraflops = workloads.flops(workload, mode) / 1e12
        return {
            **dataclasses.asdict(summary),
            "tflops": teraflops / summary.seconds,
            "roof_tflops": teraflops / floor,
            "roof_fraction": floor / summary.seconds,
        }

    def _write(
        self,
        workload: Workload,
        mode: Mode,
        contender: Contender,
        verdict: Verdict,
        **figures: float,
    ) -> None:
        self.log.write(
            "cell",
            workload=dataclasses.asdict(workload),
            mode=mode,
            contender=contender.name,
            **dataclasses.asdict(verdict),
            **figures,
        )
