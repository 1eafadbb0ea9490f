"""Make cells.npz: the tokens of real cells that the benchmarks run on, so that they need no package but PyTorch's.

    python benchmarks/make_cells.py --dicts FOLDER    # the folder that holds Geneformer V2's gene dictionaries

The cells are those of demo/cells.h5ad, which demo/build_demo.py makes from the public package celltypist 1.7.1.
Writes `paper` (20, 2048), cells that fill the model's input at V2's vocabulary, and `demo` (20, 320), the cells of the
demo's map at the demo's vocabulary, both int32. Running it again gives the same tokens.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from cellcircuits.cells import Cell, CellSelection, load_cells  # noqa: E402
from cellcircuits.errors import UserError  # noqa: E402
from cellcircuits.jsonio import write_atomically  # noqa: E402
from cellcircuits.vocabulary import load_vocabulary  # noqa: E402

N_CELLS = 20
V2_VOCABULARY, V2_POSITIONS = 20_275, 4096
DEMO_VOCABULARY, DEMO_POSITIONS = 7264, 320
N_IN_FILE = 559


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dicts", type=Path, required=True, help="folder of token_dictionary_gc104M.pkl and its like")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "cells.npz", help="(default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Tokenize the cells at both vocabularies and write the arrays."""
    args = build_parser().parse_args(argv)
    try:
        arrays = {"paper": paper_tokens(args.dicts), "demo": demo_tokens()}
        write_atomically(args.out, lambda stream: np.savez_compressed(stream, **arrays))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.out}: " + ", ".join(f"{name} {tokens.shape}" for name, tokens in arrays.items()))
    return 0


def paper_tokens(dictionaries: Path) -> np.ndarray:
    """Tokens of cells with 2,046 expressed genes or more, evenly spread over the file, (n_cells, n_pos) int32.

    Raises:
        UserError: the dictionaries are not there, or too few cells are that long.
    """
    vocabulary = load_vocabulary([dictionaries], V2_VOCABULARY)
    selection = CellSelection(cells="all", n_cells=N_IN_FILE)
    cells = load_cells(ROOT / "demo" / "cells.h5ad", vocabulary, selection, V2_POSITIONS).cells
    full = [cell for cell in cells if len(cell.tokens) == selection.max_tokens]
    if len(full) < N_CELLS:
        raise UserError(f"only {len(full)} cells fill {selection.max_tokens} tokens; {N_CELLS} are needed.")
    return stacked([full[i] for i in np.linspace(0, len(full) - 1, N_CELLS).round().astype(int)])


def demo_tokens() -> np.ndarray:
    """Tokens of the cells that `make demo` traces, (n_cells, n_pos) int32.

    Raises:
        UserError: the demo's files are not there.
    """
    vocabulary = load_vocabulary([ROOT / "demo" / "model"], DEMO_VOCABULARY)
    selection = CellSelection(cells="all", obs_filters=(("split", "held_out"),), n_cells=N_CELLS)
    return stacked(load_cells(ROOT / "demo" / "cells.h5ad", vocabulary, selection, DEMO_POSITIONS).cells)


def stacked(cells: list[Cell]) -> np.ndarray:
    """The tokens of cells of one length as one array.

    Raises:
        UserError: their lengths differ.
    """
    lengths = {len(cell.tokens) for cell in cells}
    if len(lengths) > 1:
        raise UserError(f"the cells have {min(lengths)} to {max(lengths)} tokens, but must all be of one length.")
    return np.stack([cell.tokens for cell in cells]).astype(np.int32)


if __name__ == "__main__":
    sys.exit(main())
