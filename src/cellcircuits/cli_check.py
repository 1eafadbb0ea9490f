"""The flag `--check`: validate the inputs, say what would run and how long it would take, run nothing."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cellcircuits.errors import UserError

FLAG = "--check"


def add_check_flag(parser: argparse._ActionsContainer, what: str) -> None:
    """Add `--check`.

    Args:
        parser: the parser or a group of it.
        what: what the script does otherwise, as a verb: "trace", "draw".
    """
    parser.add_argument(
        FLAG,
        action="store_true",
        help=f"validate all inputs, print what would run, and {what} nothing: no file is written, no folder made",
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, and as `command` the command line without `--check`.

    Args:
        parser: the script's.
        argv: arguments given to `main`; None means those of the process.
    """
    args = parser.parse_args(argv)
    args.command = start_command(argv)
    return args


def wants_report(args: argparse.Namespace) -> bool:
    """Whether nothing but a summary of what the folder holds is asked for (`--analysis-only`).

    Raises:
        UserError: and `--check` too.
    """
    if args.check and args.analysis_only:
        raise UserError(
            "--check says what a run would do and --analysis-only summarises what the folder holds; leave one out."
        )
    return args.analysis_only


def start_command(argv: Sequence[str] | None) -> str:
    """What to type to run what was checked."""
    words = sys.argv[1:] if argv is None else argv
    # argparse takes unique beginnings of a flag too
    kept = [word for word in words if not (len(word) > len("--c") and FLAG.startswith(word))]
    return shlex.join([_interpreter(), sys.argv[0], *kept])


def _interpreter() -> str:
    """What to type for this Python: `python` where that is it, else its path, from here if it lies below."""
    here = shutil.which("python")
    if here and Path(here).parent == Path(sys.executable).parent:
        return "python"
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
