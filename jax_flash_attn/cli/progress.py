"""A progress bar where tqdm is installed, plain lines where it is not."""

import importlib
import importlib.util
from typing import Protocol


class Progress(Protocol):
    """What the commands need of a bar; tqdm's own bar has it."""

    def update(self) -> object:
        """Counts one step."""

    def set_postfix_str(self, s: str) -> None:
        """Names what the bar has come to."""

    def close(self) -> None:
        """Ends the bar."""


class Lines:
    """Prints a line for each step."""

    def __init__(self, total: int, label: str) -> None:
        self.total = total
        self.label = label
        self.done = 0
        self.text = ""

    def update(self) -> None:
        """Prints how far it is."""
        self.done += 1
        print(f"{self.label} {self.done}/{self.total} {self.text}".rstrip(), flush=True)

    def set_postfix_str(self, s: str) -> None:
        """Keeps the text for the next line."""
        self.text = s

    def close(self) -> None:
        """Does nothing: every line is complete."""


def start(total: int, label: str) -> Progress:
    """Returns a bar over `total` steps."""
    if importlib.util.find_spec("tqdm") is None:
        return Lines(total, label)
    bar: Progress = importlib.import_module("tqdm").tqdm(total=total, desc=label)
    return bar
