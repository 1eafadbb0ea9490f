"""Which cells a trajectory runs over: the flags, and the rows of the file that they mean."""

import argparse
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellcircuits import cli
from cellcircuits.cells import CellSelection
from cellcircuits.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
ALL = "all"
ROOT_CELL_TYPE = "hematopoietic stem cell"
ROOT_TISSUE = "Bone_Marrow"
N_VALUES_SHOWN = 40
# The published choice: myeloid and lymphoid types of Tabula Sapiens, lower-cased.
CELL_TYPES = (
    "hematopoietic stem cell",
    "hematopoietic precursor cell",
    "common myeloid progenitor",
    "monocyte",
    "classical monocyte",
    "intermediate monocyte",
    "non-classical monocyte",
    "macrophage",
    "tissue-resident macrophage",
    "neutrophil",
    "granulocyte",
    "mast cell",
    "basophil",
    "thymocyte",
    "cd4-positive, alpha-beta thymocyte",
    "cd8-positive, alpha-beta thymocyte",
    "cd4-positive, alpha-beta t cell",
    "cd8-positive, alpha-beta t cell",
    "naive thymus-derived cd4-positive, alpha-beta t cell",
    "naive thymus-derived cd8-positive, alpha-beta t cell",
    "b cell",
    "plasma cell",
    "natural killer cell",
    "mature nk t cell",
)
TISSUES = ("Bone_Marrow", "Blood", "Spleen")


def name_list(text: str) -> tuple[str, ...] | None:
    """Parse names separated by `;`, or a file with one per line; `all` gives None.

    Cell type names contain commas, so a comma does not separate.

    Raises:
        argparse.ArgumentTypeError: no name, or a file that cannot be read.
    """
    if text.strip() == ALL:
        return None
    parts = text.split(";")
    if len(parts) == 1 and os.path.isfile(text):  # noqa: PTH113 (Path.is_file fails on a text too long for a name)
        try:
            parts = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"{text}: cannot be read as text ({error})") from None
    names = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; separate names by ';', or say {ALL}")
    return names


def gene_list(text: str) -> tuple[str, ...]:
    """Parse `S100A8,VCAN` into distinct gene names.

    Raises:
        argparse.ArgumentTypeError: no gene.
    """
    genes = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not genes:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of genes such as S100A8,VCAN")
    return genes


def add_trajectory_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose cells, order them by pseudotime and turn them into tokens."""
    defaults = CellSelection()
    _add_choice_flags(parser.add_argument_group("which cells").add_argument, defaults)
    _add_pseudotime_flags(parser.add_argument_group("pseudotime").add_argument)
    cli.add_token_flags(parser, defaults)


def _add_choice_flags(add: Callable[..., Any], defaults: CellSelection) -> None:
    add(
        "--data-path",
        type=Path,
        default=cli.from_environment("SAE_IMMUNE_H5AD"),
        metavar="H5AD",
        help="cells with raw counts (environment: SAE_IMMUNE_H5AD)",
    )
    add("--n-cells", type=cli.natural, default=500, help="cells to draw of those that match (default: %(default)s)")
    add(
        "--cell-types",
        type=name_list,
        default=CELL_TYPES,
        metavar="'A;B'",
        help="types to keep, whatever their case: names separated by ';', a file with one per line, or all "
        f"(default: the {len(CELL_TYPES)} immune types of the study)",
    )
    add("--cell-type-column", default="cell_type", metavar="COLUMN", help="obs column of types (default: %(default)s)")
    add(
        "--tissues",
        type=name_list,
        default=TISSUES,
        metavar="'A;B'",
        help=f"tissues to keep, spelled as in the file, given like --cell-types, or all (default: {';'.join(TISSUES)})",
    )
    add(
        "--tissue-column",
        default="tissue_in_publication",
        metavar="COLUMN",
        help="obs column of tissues (default: %(default)s)",
    )
    add(
        "--obs-filter",
        type=cli.column_filter,
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="keep only cells with this obs value; repeatable",
    )
    add("--seed", type=int, default=defaults.seed, help="seed of the draws (default: %(default)s)")


def _add_pseudotime_flags(add: Callable[..., Any]) -> None:
    add(
        "--traj-dir",
        type=Path,
        default=cli.from_environment("SAE_TRAJ_DIR"),
        metavar="FOLDER",
        help="folder with a cell_metadata.json to take the pseudotime from, where it is for the run's cells "
        "(environment: SAE_TRAJ_DIR); computed otherwise",
    )
    add(
        "--root-cell-type",
        default=ROOT_CELL_TYPE,
        metavar="NAME",
        help="type of the cell where pseudotime starts (default: %(default)s)",
    )
    add(
        "--root-tissue",
        default=ROOT_TISSUE,
        metavar="NAME",
        help="tissue to look for it first; anywhere if there is none in it (default: %(default)s)",
    )
    add(
        "--root-markers",
        type=gene_list,
        default=(),
        metavar="A,B",
        help="of the cells that may be the root, take the one with the highest mean log-normalized expression of these "
        "genes (symbols or Ensembl ids); default: the first in the file",
    )
    add(
        "--pseudotime-fallback",
        choices=("none", "umap"),
        default="none",
        help="umap: where no root is found or cells are disconnected, take the first UMAP axis, which has no "
        "direction of its own (default: none, an error)",
    )
    add(
        "--disconnected",
        choices=("refuse", "drop"),
        default="refuse",
        help="cells that the neighbour graph does not connect with the root: an error, or left out of the trajectory "
        "(default: %(default)s)",
    )


def root_flags_given(args: argparse.Namespace) -> list[str]:
    """The flags that choose the root and say something else than their defaults."""
    defaults = {"root_cell_type": ROOT_CELL_TYPE, "root_tissue": ROOT_TISSUE, "root_markers": ()}
    return [f"--{name.replace('_', '-')}" for name, default in defaults.items() if getattr(args, name) != default]


def trajectory_selection(args: argparse.Namespace) -> CellSelection:
    """The cell settings that the flags of `add_trajectory_flags` ask for; reads the file's obs.

    Raises:
        UserError: no file, no such column, no cell of the wanted types or tissues, or a filter that repeats a flag.
    """
    from cellcircuits.h5ad import H5adFile  # anndata takes long to import

    path = cli.require_path(args.data_path, "--data-path", "SAE_IMMUNE_H5AD", folder=False)
    _require_distinct_filters(args)
    with H5adFile(path) as file:
        obs = file.obs()
    filters = [*args.obs_filter]
    types = _values(obs, args.cell_type_column, path, "name the one with cell types (--cell-type-column)")
    if args.cell_types is not None:
        wanted = {name.lower() for name in args.cell_types}
        spellings = _present(types, wanted, str.lower, f"{path}: obs {args.cell_type_column!r} (--cell-types)")
        _warn_of_absent("--cell-types", args.cell_types, CELL_TYPES, {name.lower() for name in spellings}, str.lower)
        filters += [(args.cell_type_column, name) for name in spellings]
    if args.tissues is not None:
        mend = "name the one with tissues (--tissue-column), or take every tissue with --tissues all"
        tissues = _values(obs, args.tissue_column, path, mend)
        where = f"{path}: obs {args.tissue_column!r} (--tissues; all takes every one)"
        found = _present(tissues, set(args.tissues), str, where)
        _warn_of_absent("--tissues", args.tissues, TISSUES, set(found), str)
        filters += [(args.tissue_column, name) for name in found]
    return CellSelection(
        cells="all",
        obs_filters=tuple(filters),
        n_cells=args.n_cells,
        seed=args.seed,
        counts=args.counts,
        gene_column=args.gene_column,
        tokenization=args.tokenization,
        max_tokens=args.max_tokens,
        min_mapped=args.min_mapped,
        min_median_tokens=args.min_median_tokens,
        downsample_to=args.downsample_to,
    )


def _require_distinct_filters(args: argparse.Namespace) -> None:
    # values of one column mean any of them, so such a filter would widen the choice instead of narrowing it
    taken = {}
    if args.cell_types is not None:
        taken[args.cell_type_column] = "--cell-types"
    if args.tissues is not None:
        taken[args.tissue_column] = "--tissues"
    for column, value in args.obs_filter:
        if column in taken:
            raise UserError(f"--obs-filter {column}={value}: {taken[column]} chooses by that column; say it there.")


def _values(obs: "pd.DataFrame", column: str, path: Path, mend: str) -> Counter[str]:
    """How many cells have each value of a column, as text; missing ones left out."""
    if column not in obs.columns:
        there_are = ", ".join(map(str, obs.columns)) or "none"
        raise UserError(f"{path}: obs has no column {column!r}; there are: {there_are}; {mend}.")
    return Counter(map(str, obs[column].dropna()))


def _present(values: Counter[str], wanted: set[str], key: Callable[[str], str], where: str) -> list[str]:
    """The spellings of the file that are wanted, the wanted ones compared after `key`."""
    found = [name for name in sorted(values) if key(name) in wanted]
    if not found:
        raise UserError(f"{where}: no cell has a wanted value; values there: {counted(values)}.")
    return found


def _warn_of_absent(
    flag: str, asked: Sequence[str], default: Sequence[str], found: set[str], key: Callable[[str], str]
) -> None:
    absent = [name for name in asked if key(name) not in found]
    if absent and asked != default:  # no file has all of the default's
        log.warning("Note: %s: no cell is %s.", flag, ", ".join(repr(name) for name in absent))


def counted(values: Counter[str]) -> str:
    """Values with their numbers, most frequent first, for an error."""
    shown = ", ".join(f"{name or '(missing)'} ({n})" for name, n in values.most_common(N_VALUES_SHOWN))
    n_more = len(values) - N_VALUES_SHOWN
    return (f"{shown} and {n_more} more" if n_more > 0 else shown) or "none"
