"""Check that claims, figures and the paper's numbers are those of the result files; nothing is written.

    python src/check_paper.py --results results --paper paper

Exit status 1 where something differs, with a line for each file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cellcircuits import cli, cli_check
from cellcircuits.kept_results import Results, add_results_flags
from cellcircuits.paper_check import differences


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check that figures, numbers and claims are those of the results.")
    add_results_flags(parser)
    parser.add_argument("--paper", type=Path, default=Path("paper"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=None, metavar="FILE", help="also its table of claims")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: run(args), "nothing was changed.")


def run(args: argparse.Namespace) -> int:
    """Compare; returns the exit status."""
    found = list(differences(Results(args.results, args.published), args.paper, args.readme))
    for line in found:
        print(line)
    print("Make them again: make claims paper" if found else "Claims, figures and numbers are those of the results.")
    return 1 if found else 0


if __name__ == "__main__":
    cli.leave(main())
