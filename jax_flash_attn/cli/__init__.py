"""The command line: `python -m jax_flash_attn doctor | compile | bench | tune`.

Each command is a module with `add_arguments(parser)` and `main(options)`, which returns
the exit status.
"""

import argparse
from collections.abc import Sequence
from types import ModuleType

from jax_flash_attn._version import __version__
from jax_flash_attn.cli import bench, compile, doctor, tune

_COMMANDS: dict[str, ModuleType] = {
    "doctor": doctor,
    "compile": compile,
    "bench": bench,
    "tune": tune,
}
_FROM_CHECKOUT = ("bench", "tune")
"""Commands whose arguments are parsed, and --help is printed, outside the package."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What follows the program's name; None takes the process's own.

    Returns:
        The exit status: 0 where all went well.

    Raises:
        SystemExit: the arguments are wrong, or ask for help.
    """
    options, rest = _parser().parse_known_args(arguments)
    if options.command in _FROM_CHECKOUT:
        options.arguments = rest
    elif rest:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    status: int = _COMMANDS[options.command].main(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_flash_attn", description="FlashAttention for JAX."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        description = str(module.__doc__)
        command = commands.add_parser(
            name,
            help=description.splitlines()[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=name not in _FROM_CHECKOUT,
        )
        module.add_arguments(command)
        command.set_defaults(parser=command)
    return parser
