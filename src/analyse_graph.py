"""Degrees of a traced graph: their distribution, what drives them, and whether hubs are annotated less.

    python src/analyse_graph.py --trace-dir results/layer5
    python src/analyse_graph.py --degrees degrees.json --frequency frequency.json --out-dir results/published

Reads features.parquet and edges.parquet of a trace, or bare tables `{"feature": value}`; writes
graph_statistics.json and graph_statistics.png.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cellcircuits import cli
from cellcircuits.cli_check import add_check_flag, parse
from cellcircuits.degree_table import CALIBRATED, RAW, DegreeTable, read_tables, read_trace
from cellcircuits.errors import UserError
from cellcircuits.graph_statistics import GraphSettings, graph_statistics, report_lines
from cellcircuits.jsonio import write_atomically, write_json

DEFAULTS = GraphSettings()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Describe the degrees of a traced graph, or of a published table of degrees.",
        epilog="examples:\n  python src/analyse_graph.py --trace-dir results/layer5\n"
        "  python src/analyse_graph.py --degrees degrees.json --annotated annotated.json --out-dir results/published",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_input_flags(parser)
    _add_statistics_flags(parser)
    add_check_flag(parser, "compute")
    return parser


def _add_input_flags(parser: argparse.ArgumentParser) -> None:
    of_trace = parser.add_argument_group("a traced folder").add_argument
    of_trace("--trace-dir", type=Path, default=None, metavar="FOLDER", help="folder of the trace of one layer")
    of_trace(
        "--degree",
        choices=(RAW, CALIBRATED),
        default=RAW,
        help="raw: edges by the published rule; calibrated: those that survive correction, where the folder has them "
        "(default: %(default)s)",
    )
    of_trace(
        "--min-active-cells",
        type=cli.natural,
        default=None,
        metavar="N",
        help="leave out features that fire in fewer cells (default: take all)",
    )
    bare = parser.add_argument_group('bare tables, JSON of the form {"feature index": value}').add_argument
    bare("--degrees", type=Path, default=None, metavar="FILE", help="edges of every feature")
    bare("--frequency", type=Path, default=None, metavar="FILE", help="share of positions at which it fires")
    bare("--annotated", type=Path, default=None, metavar="FILE", help="true or false")
    parser.add_argument(
        "--out-dir",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="where to write (default: --trace-dir; needed with --degrees)",
    )


def _add_statistics_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("statistics").add_argument
    add("--seed", type=int, default=DEFAULTS.seed, help="of every draw (default: %(default)s)")
    add(
        "--p-precision",
        type=cli.positive,
        default=DEFAULTS.p_precision,
        help="of the tail's p, at most 0.1; 0.01 takes minutes on thousands of features (default: %(default)s)",
    )
    add(
        "--n-bootstrap",
        type=cli.natural,
        default=DEFAULTS.n_bootstrap,
        help="resamples for the interval of the tail's alpha (default: %(default)s)",
    )
    add(
        "--caliper",
        type=cli.positive,
        default=DEFAULTS.caliper,
        metavar="LOG10",
        help="how far the log10 frequency of a match may lie (default: %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = parse(build_parser(), argv)
    return cli.run_script(lambda: analyse(args), "nothing was changed.")


def analyse(args: argparse.Namespace) -> int:
    """Compute the statistics of the tables that `args` names and write them."""
    from cellcircuits.graph_figures import graph_figure

    if not 0.001 <= args.p_precision <= 0.1:
        raise UserError("--p-precision must be from 0.001 to 0.1; with fewer draws no p could fall below 0.1.")
    if args.seed < 0:
        raise UserError("--seed must be an integer of at least 0.")
    table, out_dir = _table(args), args.out_dir or args.trace_dir
    if args.check:
        print(f"{len(table.degrees)} degrees to describe; results would go to {out_dir}.\nStart: {args.command}")
        return 0
    settings = GraphSettings(args.seed, args.p_precision, args.n_bootstrap, args.caliper)
    content = graph_statistics(table, settings)
    write_json(out_dir / "graph_statistics.json", content)
    figure = graph_figure(table, content)
    write_atomically(out_dir / "graph_statistics.png", lambda stream: figure.savefig(stream, dpi=130, format="png"))
    print("\n".join(report_lines(content)))
    print(f"Written: {out_dir / 'graph_statistics.json'} and graph_statistics.png")
    return 0


def _table(args: argparse.Namespace) -> DegreeTable:
    """What the flags name, after a check that they belong together."""
    if (args.trace_dir is None) == (args.degrees is None):
        raise UserError("name either a traced folder (--trace-dir) or a table of degrees (--degrees).")
    if args.trace_dir is not None:
        if args.frequency or args.annotated:
            raise UserError("--frequency and --annotated belong to --degrees; a traced folder holds its own.")
        return read_trace(args.trace_dir, args.degree, args.min_active_cells or 0)
    if args.out_dir is None:
        raise UserError("--out-dir is missing: name the folder to write graph_statistics.json into.")
    if args.degree != RAW or args.min_active_cells is not None:
        raise UserError("--degree and --min-active-cells belong to --trace-dir; a bare table holds what it holds.")
    return read_tables(args.degrees, args.frequency, args.annotated)


if __name__ == "__main__":
    cli.leave(main())
