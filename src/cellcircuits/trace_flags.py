"""Flags that the tracing scripts share, and the command that mends what they miss."""

import argparse
import shlex

from cellcircuits import cli
from cellcircuits.stats import EdgeRule

SHARED_WITH_PREPARATION = (
    "model model_subfolder model_revision dicts sae_run cells control_column control_values cell_line "
    "counts gene_column tokenization max_tokens min_mapped min_median_tokens downsample_to"
).split()


def add_sae_run_flag(parser: argparse._ActionsContainer) -> None:
    """Add `--sae-run`."""
    parser.add_argument(
        "--sae-run",
        default=None,
        metavar="NAME",
        help="which SAE of a layer to take when there are several, e.g. x4_k32",
    )


def add_edge_flags(group: argparse._ActionsContainer) -> None:
    """Add the two thresholds of an edge and `--batch-size`."""
    group.add_argument(
        "--min-abs-d",
        type=cli.non_negative,
        default=EdgeRule.min_abs_d,
        help="an edge needs a larger |d| (default: %(default)s)",
    )
    group.add_argument(
        "--min-consistency",
        type=cli.fraction,
        default=EdgeRule.min_consistency,
        help="and a larger sign consistency (default: %(default)s)",
    )
    group.add_argument(
        "--batch-size", type=cli.natural, default=None, help="ablations run at once (default: what memory allows)"
    )


def catalog_command(args: argparse.Namespace, defaults: argparse.Namespace, layer: int) -> str:
    """The command that makes a layer's catalog, with the flags of this run that it shares.

    Args:
        args: flags of the run.
        defaults: the same flags where none is given.
        layer: the layer.
    """
    changed = {name: getattr(args, name) for name in SHARED_WITH_PREPARATION}
    changed = {name: value for name, value in changed.items() if value != getattr(defaults, name)}
    words = ["python", "src/prepare_inputs.py", "--existing-saes", "--layers", str(layer)]
    for flag, value in {"data_root": args.data_root, "data_path": args.data_path, **changed}.items():
        words += [f"--{flag.replace('_', '-')}", str(value)]
    for column, value in args.obs_filter:
        words += ["--obs-filter", f"{column}={value}"]
    return shlex.join(words)
