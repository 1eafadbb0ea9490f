"""Show one traced feature: its label, how often it fires, its genes and its strongest edges.

    python src/look_up_feature.py 898 --out-dir results/layer5

Reads features.parquet and edges.parquet of a finished (or running) trace and prints; writes nothing.
"""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cellcircuits import cli, cli_check
from cellcircuits.catalog import display_name
from cellcircuits.errors import UserError
from cellcircuits.graph_store import read_edges, read_features
from cellcircuits.manifest import open_folder
from cellcircuits.results import quantity_note
from cellcircuits.trace_layers import holds_layers


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Show one feature of a trace: label, frequency, top genes and strongest edges.",
        epilog="example:\n  python src/look_up_feature.py 898 --out-dir results/layer5 --n-edges 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("feature", type=int, help="feature index")
    parser.add_argument("--layer", type=int, default=None, help="its layer (default: the traced source layer)")
    parser.add_argument(
        "--n-edges", type=cli.natural, default=10, help="edges to show per layer (default: %(default)s)"
    )
    cli.add_out_dir_flag(parser, "folder of the trace")
    cli_check.add_check_flag(parser, "show")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: look_up(args), "nothing was changed.")


def look_up(args: argparse.Namespace) -> int:
    """Print what the trace in `args.out_dir` says about one feature."""
    if holds_layers(args.out_dir):
        raise UserError(f"{args.out_dir}: holds a trace of several layers; name the folder of one of them (--out-dir).")
    features = read_features(args.out_dir)
    edges = read_edges(args.out_dir)
    layer = _source_layer(features) if args.layer is None else args.layer
    chosen = features.filter((pc.field("layer") == layer) & (pc.field("feature") == args.feature)).to_pylist()
    if not chosen:
        raise UserError(f"{args.out_dir / 'features.parquet'}: has no feature {args.feature} of layer {layer}.")
    names = {
        (row["layer"], row["feature"]): display_name(row["label"], row["top_genes"]) for row in features.to_pylist()
    }
    note = quantity_note(open_folder(args.out_dir)["settings"])
    lines = [*_facts(chosen[0], note), *_edge_lines(edges, names, (layer, args.feature), args.n_edges)]
    if args.check:
        what = f"{len(lines)} lines to show on {lines[0]}, from {len(edges)} edges in {args.out_dir}."
        lines = [what, f"Show: {args.command}"]
    print("\n".join(lines))
    return 0


def _source_layer(features: pa.Table) -> int:
    layers = features.filter(pc.field("is_traced"))["layer"].unique().to_pylist()
    if not layers:
        raise UserError("no feature is traced in this folder yet; run exhaustive_feature_tracing.py first.")
    return layers[0]


def _facts(row: dict[str, Any], note: str) -> Iterable[str]:
    yield f"L{row['layer']}/F{row['feature']}  {row['label']}{note}"
    if row["activation_freq"] is not None:
        yield f"  fires at {100 * row['activation_freq']:.2f}% of gene positions"
    if row["is_traced"]:
        yield f"  {row['n_edges']} edges, measured in {row['n_cells_active']} cells where it is active"
    else:
        yield "  not traced as a source in this folder"
    yield f"  top genes: {', '.join(row['top_genes']) or 'none'}"


def _edge_lines(
    edges: pa.Table, names: dict[tuple[int, int], str], feature: tuple[int, int], n_edges: int
) -> Iterable[str]:
    """Strongest edges out of and into `feature`, as (layer, index), grouped by the layer at the other end."""
    for heading, end, other in (("to", "source", "target"), ("from", "target", "source")):
        of_feature = edges.filter((pc.field(f"{end}_layer") == feature[0]) & (pc.field(end) == feature[1])).to_pylist()
        for layer in sorted({edge[f"{other}_layer"] for edge in of_feature}):
            of_layer = [edge for edge in of_feature if edge[f"{other}_layer"] == layer]
            of_layer.sort(key=lambda edge: (-abs(edge["cohens_d"]), edge[other]))
            yield f"  {heading} layer {layer}: {len(of_layer)} edges"
            for edge in of_layer[:n_edges]:
                yield (
                    f"    L{layer}/F{edge[other]:<6} d {edge['cohens_d']:+9.2f}  "
                    f"mean change {edge['mean_delta']:+.3g}  consistency {edge['consistency']:.2f}  "
                    f"n {edge['n_cells']}  {names.get((layer, edge[other]), '')}"
                )


if __name__ == "__main__":
    cli.leave(main())
