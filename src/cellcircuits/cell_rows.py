"""Which rows of a cell file to take: filters, controls, and the published draw."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellcircuits.errors import UserError

if TYPE_CHECKING:
    from cellcircuits.cells import CellSelection

CELL_LINE = "cell_line"
N_VALUES_SHOWN = 10


def select_rows(obs: pd.DataFrame, selection: "CellSelection", where: str) -> np.ndarray:
    """Rows that pass the filters and, unless all cells are wanted, are controls.

    Args:
        obs: the table of cells.
        selection: the settings; values are compared as text, a missing value is the empty text.
        where: the file, for errors.

    Returns:
        (n_matched,) int64, ascending.

    Raises:
        UserError: no such column, or no row left.
    """
    keep = np.ones(len(obs), dtype=bool)
    values_of: dict[str, list[str]] = {}
    for column, value in selection.obs_filters:
        values_of.setdefault(column, []).append(value)
    for column, values in values_of.items():
        texts = column_texts(obs, column, where, "filter on one of these (--obs-filter COLUMN=VALUE)")
        passed = keep & np.isin(texts, values)
        if not passed.any():
            among = "" if keep.all() else " among those that pass the other filters"
            raise UserError(
                f"{where}: no cell has obs {column!r} = {' or '.join(values)}{among}; "
                f"values there: {_most_frequent(texts[keep])}."
            )
        keep = passed
    if selection.cells == "controls":
        keep = _controls(obs, keep, selection, where)
    if not keep.any():
        raise UserError(f"{where}: holds no cell.")
    return np.flatnonzero(keep)


def draw_rows(rows: np.ndarray, pool: int, n_cells: int, seed: int) -> np.ndarray:
    """Draw `pool` of the rows if there are more, sort them, take the first `n_cells`.

    Args:
        rows: (n_matched,) ascending.
        pool: rows to draw without replacement.
        n_cells: rows to take of those.
        seed: seed of the draw.

    Returns:
        (n_selected,) ascending; fewer than `n_cells` where there are fewer.
    """
    if len(rows) > pool:
        # The published draw: this legacy generator gives the rows of np.random.seed + np.random.choice.
        rows = np.sort(np.random.RandomState(seed).choice(rows, pool, replace=False))
    return rows[:n_cells]


def mixture_notes(obs: pd.DataFrame, matched: np.ndarray, selection: "CellSelection") -> list[str]:
    """Say so when the controls mix cell lines and nobody asked for one.

    Args:
        obs: the table of cells.
        matched: (n_matched,) rows that are controls.
        selection: the settings.
    """
    filtered = any(column == CELL_LINE for column, _ in selection.obs_filters)
    if selection.cells != "controls" or filtered or CELL_LINE not in obs.columns:
        return []
    lines = _as_texts(obs[CELL_LINE])[matched]
    if len(set(lines)) < 2:
        return []
    return [
        f"The {len(matched)} control cells mix {len(set(lines))} cell lines: {_most_frequent(lines)}; "
        f"no filter on {CELL_LINE} was set."
    ]


def _controls(obs: pd.DataFrame, keep: np.ndarray, selection: "CellSelection", where: str) -> np.ndarray:
    column, values = selection.control_column, selection.control_values
    mend = "name the one with the CRISPRi target (--control-column), or take every cell with --cells all"
    texts = column_texts(obs, column, where, mend)
    controls = keep & np.isin(texts, values)
    if not controls.any():
        among = "" if keep.all() else " among the cells that pass the filters"
        raise UserError(
            f"{where}: no control cell, because obs {column!r} is never {' or '.join(values)}{among}; most "
            f"frequent there: {_most_frequent(texts[keep])}. Name other values (--control-values), or take "
            "every cell with --cells all."
        )
    return controls


def column_texts(obs: pd.DataFrame, column: str, where: str, mend: str) -> np.ndarray:
    """A column of the table of cells as text, (n_rows,); missing values become ''.

    Args:
        obs: the table.
        column: its column.
        where: the file, for errors.
        mend: what to do where there is no such column.

    Raises:
        UserError: there is none.
    """
    if column not in obs.columns:
        there_are = ", ".join(map(str, obs.columns)) or "none"
        raise UserError(f"{where}: obs has no column {column!r}; there are: {there_are}; {mend}.")
    return _as_texts(obs[column])


def _as_texts(values: pd.Series) -> np.ndarray:
    """Values as text, (n_rows,); missing ones become ''."""
    codes, uniques = pd.factorize(values)
    return np.array([*map(str, uniques), ""], dtype=object)[codes]  # code -1, missing, takes the last


def _most_frequent(texts: np.ndarray) -> str:
    counted = pd.Series(texts, dtype=object).value_counts()
    shown = ", ".join(
        f"{value or '(missing)'} ({n}, {n / len(texts):.1%})" for value, n in counted.head(N_VALUES_SHOWN).items()
    )
    n_more = len(counted) - N_VALUES_SHOWN
    return f"{shown} and {n_more} more" if n_more > 0 else shown
