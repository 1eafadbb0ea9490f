r"""Write the numbers of the paper as TeX macros, and its table of claims.

    python src/make_paper_numbers.py --results results --out-dir paper

Writes macros.tex (\newcommand lines) and claims_table.tex (rows).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cellcircuits import cli, cli_check
from cellcircuits.collected import text_file
from cellcircuits.kept_results import Results, add_results_flags
from cellcircuits.paper_numbers import paper_files
from cellcircuits.results import exclusive


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the numbers of the paper as TeX macros.")
    add_results_flags(parser)
    cli.add_out_dir_flag(parser, "where the paper lies", Path("paper"))
    cli_check.add_check_flag(parser, "write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: run(args), "run the same command again.")


def run(args: argparse.Namespace) -> int:
    """Write the files; returns the exit status."""
    files = paper_files(Results(args.results, args.published))
    if args.check:
        print(f"{', '.join(files)} to write into {args.out_dir}.\nStart: {args.command}")
        return 0
    with exclusive(args.out_dir):
        for name, text in files.items():
            text_file(args.out_dir / name, text)
            print(f"Written: {args.out_dir / name}")
    return 0


if __name__ == "__main__":
    cli.leave(main())
