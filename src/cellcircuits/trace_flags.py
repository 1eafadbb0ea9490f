"""Flags that the tracing scripts share, and the command that mends what they miss."""

import argparse
import shlex
from pathlib import Path

from cellcircuits import cli
from cellcircuits.edge_fdr import CalibrationSettings
from cellcircuits.errors import UserError
from cellcircuits.files import read_bounded
from cellcircuits.precision import FP32, PRECISIONS
from cellcircuits.stats import EdgeRule

SAME_POSITION_CHECKED = 16
MAX_LIST_BYTES = 1 << 24
MAX_DIGITS = 9
MOST_SIGN_FLIPS = 1_000_000  # of 50 cells they take 0.3 GB
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


def source_layers(text: str) -> tuple[int, ...] | None:
    """Parse `5`, `0,5,11` or `all` into ascending distinct block indices, or None for all.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    return None if text.strip() == "all" else cli.layer_list(text)


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


def add_precision_flag(group: argparse._ActionsContainer) -> None:
    """Add `--precision`."""
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="how the blocks after the source layer are computed: fp32 is the reference; the others are faster on GPUs "
        "with tensor cores and cost edges, see README (default: %(default)s)",
    )


def add_calibration_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that say how edges are tested."""
    defaults = CalibrationSettings()
    add_sign_flip_flags(group, defaults.n_draws, "edges of a feature")
    group.add_argument(
        "--min-active-cells",
        type=cli.natural,
        default=defaults.min_cells,
        metavar="N",
        help="cells in which a feature must be active for its calibrated degree to count (default: %(default)s)",
    )


def add_sign_flip_flags(group: argparse._ActionsContainer, n_draws: int, what: str) -> None:
    """Add `--sign-flips`, of this many sign vectors that test `what`, and `--calibration-seed`."""
    group.add_argument(
        "--sign-flips",
        type=_n_sign_flips,
        default=n_draws,
        metavar="N",
        help=f"random sign vectors that test the {what}; with up to 12 active cells all vectors are taken "
        "(default: %(default)s)",
    )
    group.add_argument("--calibration-seed", type=sample_size, default=0, help="seed of these (default: %(default)s)")


def _n_sign_flips(text: str) -> int:
    """Parse an integer from 1 to 1,000,000.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    number = cli.natural(text)
    if number > MOST_SIGN_FLIPS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MOST_SIGN_FLIPS:,}, the most there may be")
    return number


def calibration_settings(args: argparse.Namespace) -> CalibrationSettings:
    """How to test edges, from the flags of `add_calibration_flags`."""
    return CalibrationSettings(seed=args.calibration_seed, n_draws=args.sign_flips, min_cells=args.min_active_cells)


def add_save_effects_flag(group: argparse._ActionsContainer) -> None:
    """Add `--save-effects`."""
    group.add_argument(
        "--save-effects",
        action="store_true",
        help="keep every effect of every feature in every cell too, in effects/ (sparse, float32; --check says how "
        "much that takes). A feature that was traced without is not finished then and is traced again, with the same "
        "numbers",
    )


def add_same_position_flags(group: argparse._ActionsContainer) -> None:
    """Add `--same-position` and `--same-position-check`."""
    group.add_argument(
        "--same-position",
        action="store_true",
        help="measure same-position effects: only the positions where a feature is active keep running after the edit "
        "and see each other's changed keys and values, every other position stays clean. It is another quantity than "
        "the total effect that the study published, and costs about a hundredth of it; a sample of features is "
        "measured both ways at the end. The folder of one is never used for the other",
    )
    group.add_argument(
        "--same-position-check",
        type=sample_size,
        default=None,
        metavar="N",
        help="with --same-position: how many features to measure both ways; 0 for none "
        f"(default: {SAME_POSITION_CHECKED})",
    )


def sample_size(text: str) -> int:
    """Parse a non-negative integer.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a non-negative integer")
    return int(text)


def n_checked(args: argparse.Namespace) -> int:
    """How many features to measure both ways; 0 for a run that measures total effects.

    Raises:
        UserError: the flags do not go together.
    """
    if not args.same_position:
        if args.same_position_check is not None:
            raise UserError("--same-position-check: means nothing without --same-position; add that, or leave it out.")
        return 0
    if args.precision != FP32:
        raise UserError(
            f"--precision {args.precision}: same-position effects are computed in {FP32} only; leave it out, or leave "
            "out --same-position."
        )
    return SAME_POSITION_CHECKED if args.same_position_check is None else args.same_position_check


def listed_features(text: str) -> list[int]:
    """Feature indices, ascending and distinct, from `898,1762` or from a file with such a list.

    Raises:
        UserError: it is neither.
    """

    def indices(words: list[str]) -> list[int]:
        sound = all(word.isdecimal() and len(word) <= MAX_DIGITS for word in words)
        return sorted({int(word) for word in words}) if sound else []

    listed = indices(text.replace(",", " ").split())
    if not listed:
        try:
            listed = indices(read_bounded(Path(text), MAX_LIST_BYTES, "a list").decode().replace(",", " ").split())
        except (OSError, UserError, UnicodeDecodeError):
            listed = []
    if not listed:
        raise UserError(f"--features {text}: neither a list such as 898,1762 nor a file with feature indices.")
    return listed


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
