"""Keep of the experiments' folders what figures, claims and the paper are made from.

    python src/collect_results.py --runs results/demo --name "demo model" --out-dir results

Writes the layout of the study's release below --out-dir, every file with the name of the inputs in it, and a README.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cellcircuits import cli, cli_check
from cellcircuits.collected import collect, planned, readme, size_note, text_file
from cellcircuits.errors import UserError
from cellcircuits.kept_results import PUBLISHED


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Keep of the experiments' folders what results are made from.")
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="holds the experiments' folders")
    parser.add_argument("--name", required=True, help='what the inputs are called, in every file: "demo model"')
    cli.add_out_dir_flag(parser, "where results go", Path("results"))
    cli_check.add_check_flag(parser, "copy")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: run(args), "run the same command again.")


def run(args: argparse.Namespace) -> int:
    """Copy, and say what was copied; returns the exit status."""
    if not args.name.strip():
        raise UserError("--name is empty: say what the inputs are called (NAME in settings.mk).")
    if args.check:
        print(f"{len(planned(args.runs, args.out_dir))} files to copy into {args.out_dir}.\nStart: {args.command}")
        return 0
    names = collect(args.runs, args.out_dir, args.name.strip())
    text_file(args.out_dir / "README.md", readme(args.name.strip(), names))
    text_file(args.out_dir / PUBLISHED.name, PUBLISHED.read_text(encoding="utf-8"))
    print(f"Kept: {args.out_dir} ({size_note(args.out_dir, names)})")
    return 0


if __name__ == "__main__":
    cli.leave(main())
