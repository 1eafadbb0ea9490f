"""Command-line parts that the scripts share: flags, their environment variables, errors, logging."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from cellcircuits.cells import CellSelection
from cellcircuits.errors import FULL_OR_READ_ONLY, UserError, cannot_write
from cellcircuits.stopping import stop_signals
from cellcircuits.streams import Log, OneLine, give_up
from cellcircuits.tokenizer import TOKENIZATIONS

DEFAULT_MODEL = "ctheodoris/Geneformer"
DEFAULT_SUBFOLDER = "Geneformer-V2-316M"
DEFAULT_OUT_DIR = Path("results/runs/exhaustive_tracing")
EXIT_USER_ERROR = 2
EXIT_SIGNAL = 128


def layer_list(text: str) -> tuple[int, ...]:
    """Parse `6,11,17` into ascending distinct block indices.

    Raises:
        argparse.ArgumentTypeError: something else than non-negative integers.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 6,11,17")
    return tuple(sorted({int(part) for part in parts}))


def natural(text: str) -> int:
    """Parse an integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def fraction(text: str) -> float:
    """Parse a number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    return _number(text, lambda value: 0.0 <= value <= 1.0, "a number from 0 to 1")


def non_negative(text: str) -> float:
    """Parse a finite number of at least 0.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    return _number(text, lambda value: 0.0 <= value < float("inf"), "a number of at least 0")


def positive(text: str) -> float:
    """Parse a finite number above 0.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    return _number(text, lambda value: 0.0 < value < float("inf"), "a number above 0")


def _number(text: str, admits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not admits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def column_filter(text: str) -> tuple[str, str]:
    """Parse `COLUMN=VALUE`.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    column, equals, value = text.partition("=")
    if not equals or not column:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form COLUMN=VALUE")
    return column, value


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, its companions, `--dicts`, `--data-root` and `--device`."""
    group = parser.add_argument_group("model and SAEs")
    group.add_argument(
        "--model",
        default=None,
        metavar="NAME_OR_FOLDER",
        help=f"Geneformer: a hub name or a folder with config.json (default: {DEFAULT_MODEL}, "
        f"subfolder {DEFAULT_SUBFOLDER})",
    )
    group.add_argument("--model-subfolder", default=None, help="folder of the model inside --model")
    group.add_argument("--model-revision", default=None, help="hub revision (branch, tag or commit); recorded")
    group.add_argument(
        "--dicts",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="Geneformer's gene dictionaries (token_dictionary*.pkl and its two partners); default: "
        "with the model, or geneformer/ of the hub repository",
    )
    group.add_argument(
        "--data-root",
        type=Path,
        default=from_environment("SAE_DATA_ROOT"),
        metavar="FOLDER",
        help="folder that holds sae_models/ (environment: SAE_DATA_ROOT)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cuda", "mps", "cpu"),
        default="auto",
        help="where to compute; auto takes cuda, then mps, then cpu (default: auto)",
    )


def add_cell_flags(parser: argparse.ArgumentParser, defaults: CellSelection) -> None:
    """Add `--data-path` and the flags that choose and tokenize cells."""
    _add_choice_flags(parser.add_argument_group("which cells").add_argument, defaults)
    add_token_flags(parser, defaults)


def _add_choice_flags(add: Callable[..., Any], defaults: CellSelection) -> None:
    add(
        "--data-path",
        type=Path,
        default=from_environment("SAE_DATA_PATH"),
        metavar="H5AD",
        help="cells with raw counts (environment: SAE_DATA_PATH)",
    )
    add("--n-cells", type=natural, default=defaults.n_cells, help="cells to use (default: %(default)s)")
    add(
        "--cells",
        choices=("controls", "all"),
        default=defaults.cells,
        help="controls: rows whose control column says so (of more than 2,000, the first --n-cells of 2,000 drawn, as "
        "in the study); all: any row, drawn over the whole file (default: %(default)s)",
    )
    add(
        "--control-column",
        default=defaults.control_column,
        metavar="COLUMN",
        help="obs column that names the perturbed gene (default: %(default)s)",
    )
    add(
        "--control-values",
        default=",".join(defaults.control_values),
        metavar="A,B",
        help="values of it that mean control (default: %(default)s)",
    )
    add(
        "--obs-filter",
        type=column_filter,
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="keep only cells with this obs value; repeatable",
    )
    add(
        "--cell-line",
        default=None,
        metavar="NAME",
        help="short for --obs-filter cell_line=NAME; the Replogle file mixes four lines, the published run "
        "did not filter",
    )
    add("--seed", type=int, default=defaults.seed, help="seed of the draw of cells (default: %(default)s)")


def add_token_flags(parser: argparse.ArgumentParser, defaults: CellSelection) -> None:
    """Add the flags that turn counts into tokens."""
    add = parser.add_argument_group("from counts to tokens").add_argument
    add(
        "--counts",
        default=defaults.counts,
        metavar="{auto,X,raw,layer:NAME}",
        help="matrix with raw counts; auto finds the integer one (default: %(default)s)",
    )
    add(
        "--gene-column",
        default=defaults.gene_column,
        metavar="{auto,index,COLUMN}",
        help="var column with Ensembl ids or symbols; auto takes the one that maps most counts (default: %(default)s)",
    )
    add(
        "--tokenization",
        choices=TOKENIZATIONS,
        default=defaults.tokenization,
        help="published: log1p before the gene medians, as the study did; geneformer: without, as the model was "
        "trained (default: %(default)s)",
    )
    add(
        "--max-tokens",
        type=natural,
        default=defaults.max_tokens,
        help="tokens per cell, special ones included, never over the model's positions (default: %(default)s)",
    )
    add(
        "--min-mapped",
        type=fraction,
        default=defaults.min_mapped,
        metavar="SHARE",
        help="refuse the file when a smaller share of its counts maps to genes (default: %(default)s)",
    )
    add(
        "--min-median-tokens",
        type=natural,
        default=defaults.min_median_tokens,
        metavar="N",
        help="refuse the file when the median cell has fewer gene tokens (default: %(default)s)",
    )
    add(
        "--downsample-to",
        type=natural,
        default=defaults.downsample_to,
        metavar="N",
        help="draw N of each cell's counts, without replacement, so that all have the same depth; cells with fewer are "
        "dropped (default: take all counts)",
    )


def add_out_dir_flag(parser: argparse._ActionsContainer, what: str, default: Path = DEFAULT_OUT_DIR) -> None:
    """Add `--out-dir`."""
    parser.add_argument(
        "--out-dir",
        type=Path,
        default=from_environment("SAE_OUT_DIR") or default,
        metavar="FOLDER",
        help=f"{what} (environment: SAE_OUT_DIR; default: %(default)s)",
    )


def add_mix_versions_flag(parser: argparse._ActionsContainer) -> None:
    """Add `--mix-versions`."""
    parser.add_argument(
        "--mix-versions",
        action="store_true",
        help="go on in a folder that another version of this code or of its libraries has worked in; both are "
        "recorded, and the numbers may differ in more than rounding",
    )


def selection_from(args: argparse.Namespace) -> CellSelection:
    """The cell settings that the flags of `add_cell_flags` ask for."""
    filters = [*args.obs_filter, *([("cell_line", args.cell_line)] if args.cell_line else [])]
    return CellSelection(
        cells=args.cells,
        control_column=args.control_column,
        control_values=tuple(value.strip() for value in args.control_values.split(",")),
        obs_filters=tuple(filters),
        n_cells=args.n_cells,
        pool=max(CellSelection.pool, args.n_cells),
        seed=args.seed,
        counts=args.counts,
        gene_column=args.gene_column,
        tokenization=args.tokenization,
        max_tokens=args.max_tokens,
        min_mapped=args.min_mapped,
        min_median_tokens=args.min_median_tokens,
        downsample_to=args.downsample_to,
    )


def model_source(args: argparse.Namespace) -> tuple[str, str | None]:
    """Model and subfolder to load: the default subfolder goes with the default model only."""
    if args.model is None:
        return DEFAULT_MODEL, args.model_subfolder or DEFAULT_SUBFOLDER
    return args.model, args.model_subfolder


def require_path(path: Path | None, flag: str, variable: str, *, folder: bool) -> Path:
    """Return `path` if it was given and exists.

    Raises:
        UserError: it was not given, or nothing of that kind is there.
    """
    kind = "folder" if folder else "file"
    if path is None:
        raise UserError(f"{flag} is missing: name the {kind} with {flag} or in the environment variable {variable}.")
    if not (path.is_dir() if folder else path.is_file()):
        raise UserError(f"{flag} {path}: no such {kind}.")
    return path


def run_script(main: Callable[[], int], go_on: str) -> int:
    """Run a script's body and say in one sentence what ended it.

    A user's mistake and a disk that is full give status 2, Ctrl-C 130, SIGTERM 143, SIGHUP 129.

    Args:
        main: does the work and returns the exit status.
        go_on: what to tell someone who stopped it.
    """
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if isinstance(stream, TextIOWrapper):  # a name that the terminal cannot show must not end a run
            stream.reconfigure(errors="replace")
    with redirect_stderr(cast(TextIO, Log(sys.stderr))):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(OneLine())
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        for chatty in ("httpx", "torch", "fontTools"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        try:
            return _status(main, go_on)
        finally:
            for stream in streams:
                give_up(stream)


def leave(status: int) -> NoReturn:
    """End the process with a status; at once where a signal ended the run.

    What Python does at its end, such as clearing torch out of memory, takes seconds on a busy machine.
    """
    if status > EXIT_SIGNAL:
        for stream in (sys.stdout, sys.stderr):
            give_up(stream)
        os._exit(status)
    sys.exit(status)


def _status(main: Callable[[], int], go_on: str) -> int:
    with stop_signals() as received:
        try:
            status = main()
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
            return 0
        except KeyboardInterrupt as stop:
            number = getattr(stop, "number", signal.SIGINT)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL_OR_READ_ONLY:
                where = Path(error.filename or "standard output")
                print(f"error: {cannot_write(where, error)}", file=sys.stderr)
                return EXIT_USER_ERROR
            if received.number is None:
                raise
            number = received.number  # a library made an error of its own of it, such as one of import
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    print(f"\ninterrupted{by}: {go_on}", file=sys.stderr)
    return EXIT_SIGNAL + number


def from_environment(variable: str) -> Path | None:
    """The path that an environment variable names, None where it is unset or empty."""
    value = os.environ.get(variable)
    return Path(value) if value else None
