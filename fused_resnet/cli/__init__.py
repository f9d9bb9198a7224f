"""The command line: ``fused-resnet COMMAND`` and ``python -m fused_resnet COMMAND``. One file a command.

Each command module has ``HELP`` (one line), ``add_arguments(parser)`` and ``run(arguments) -> exit status``.
Exit status: 0, 1 when a check failed, 2 for wrong usage, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from .._version import __version__
from . import bench, check, demo, env, study, train
from .arguments import Usage

COMMANDS: dict[str, ModuleType] = {"demo": demo, "env": env, "check": check, "bench": bench, "study": study, "train": train}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage text that would hide it."""
        raise Usage(f"{message} (see `{self.prog} --help`)")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="fused-resnet", description="Residual blocks as fused kernels for PyTorch.")
    top.add_argument("--version", action="version", version=f"fused-resnet {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, module in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(one)
        one.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parser().parse_args(argv)
        status: int = arguments.run(arguments)
        return status
    except Usage as error:
        print(f"fused-resnet: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # argparse, after --help or --version
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        print("fused-resnet: interrupted", file=sys.stderr)
        return 130
