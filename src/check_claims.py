"""Hold each claim of the study against what the results say.

    python src/check_claims.py --results results

Writes claims.json and claims.md into the folder of results, and ends with six lines that say what follows. With
--readme the table goes between the marks of that file as well.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cellcircuits import cli, cli_check
from cellcircuits.collected import text_file
from cellcircuits.errors import UserError
from cellcircuits.files import read_bounded
from cellcircuits.jsonio import write_json
from cellcircuits.kept_results import Results, add_results_flags
from cellcircuits.results import exclusive
from cellcircuits.study_claims import END, START, judge, markdown, table

MAX_README_BYTES = 1 << 22


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Hold each claim of the study against what the results say.")
    add_results_flags(parser)
    parser.add_argument("--readme", type=Path, default=None, metavar="FILE", help="also put the table into this file")
    cli_check.add_check_flag(parser, "write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: run(args), "run the same command again.")


def run(args: argparse.Namespace) -> int:
    """Judge, write and print; returns the exit status."""
    content = judge(Results(args.results, args.published))
    rendered = None if args.readme is None else with_table(args.readme, table(content))
    lines = "\n".join(content["lines"])
    if args.check:
        print(f"{lines}\n{content['n_claims']} claims to write into {args.results}.\nStart: {args.command}")
        return 0
    with exclusive(args.results, "--results"):
        write_json(args.results / "claims.json", content)
        text_file(args.results / "claims.md", markdown(content))
    if rendered is not None:
        text_file(args.readme, rendered)
    print(f"Written: {args.results / 'claims.json'} and claims.md\n{lines}")
    return 0


def with_table(path: Path, claims: str) -> str:
    """The text of a file with the table between its marks.

    Raises:
        UserError: it cannot be read or has no marks.
    """
    text = read_bounded(path, MAX_README_BYTES, "a text").decode("utf-8", errors="strict")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"{path}: has no lines {START} and {END} for the table to go between; add them.")
    return f"{before}{start}\n{claims}\n{end}{after}"


if __name__ == "__main__":
    cli.leave(main())
