"""Clean runs of the cells: made when first asked for, carried on to later source layers, kept in bounded memory.

A cell needs one clean pass however many source layers are traced: the run at the next source layer is that of the
earlier one, advanced. Only one source stream per cell is kept at any time.
"""

from collections.abc import Sequence

import torch

from cellcircuits.cells import Cell
from cellcircuits.device import host_memory, is_out_of_memory, kept_on_host
from cellcircuits.effects import Bench, CleanCell, TopKLatents
from cellcircuits.errors import UserError
from cellcircuits.finite import require_finite_stream

SHARE_OF_MEMORY = 0.25


class CleanRuns(Sequence[CleanCell]):
    """The clean run of every cell at the source layer of a bench.

    A run is kept while the share of host memory that runs may take lasts; one beyond that is made again whenever it is
    asked for. Cells are visited in the same order for every block of features, so the first ones stay.
    """

    def __init__(
        self, bench: Bench, cells: Sequence[Cell], before: "CleanRuns | None" = None, max_bytes: float | None = None
    ) -> None:
        """Bind the cells; nothing is run yet.

        Args:
            bench: model and SAEs.
            cells: the cells, in order.
            before: those of an earlier source layer, whose bench shares this one's tail; what they keep moves here.
            max_bytes: host memory for what is kept; None takes `SHARE_OF_MEMORY` of the machine's.
        """
        self._bench, self._cells = bench, cells
        # Every run starts at the first source layer, also where none is kept: so it is the same after a restart.
        self._first: Bench = before._first if before else bench
        self._kept: dict[int, tuple[Bench, CleanCell]] = {}
        if before:
            self._kept, before._kept = before._kept, {}
        self._max_bytes = SHARE_OF_MEMORY * host_memory() if max_bytes is None else max_bytes

    def __len__(self) -> int:
        """Number of cells."""
        return len(self._cells)

    def __getitem__(self, i: int) -> CleanCell:
        """The clean run of cell `i`.

        Raises:
            UserError: the model gives NaN or infinite values, or the run does not fit in the device's memory.
        """
        if i in self._kept and self._kept[i][0] is self._bench:
            return self._kept[i][1]
        try:
            clean = self._made(i)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"cell {self._cells[i].name}: its clean run does not fit in the device's memory; free some of it, "
                "lower --max-tokens or take --device cpu."
            ) from None
        if sum(n_bytes(kept) for _, kept in self._kept.values()) + n_bytes(clean) <= self._max_bytes:
            self._kept[i] = self._bench, clean
        return clean

    def _made(self, i: int) -> CleanCell:
        """The run of cell `i`, from that of the earlier source layer where it is kept, which is then dropped."""
        bench, clean = self._kept.pop(i, None) or (self._first, self._first.clean(self._cells[i]))
        return clean if bench is self._bench else continued(self._bench, bench, clean)


@torch.inference_mode()
def continued(bench: Bench, earlier: Bench, clean: CleanCell) -> CleanCell:
    """The clean run of a cell at a later source layer, from its run at an earlier one.

    Only the blocks between the two layers run: what the tail read at the targets is what it would read again.

    Args:
        bench: of the later source layer; it has the tail of `earlier` and none but its targets.
        earlier: of the earlier source layer.
        clean: the cell's run at the earlier layer.

    Raises:
        UserError: the model gives NaN or infinite values.
    """
    stream = clean.residual.to(bench.device)[None]  # (1, n_pos, d_model)
    residual = bench.tail.advance(stream, earlier.source_layer, bench.source_layer)[0]  # (n_pos, d_model)
    require_finite_stream(residual, clean.cell, bench.source_layer)
    source = clean.targets.get(bench.source_layer)
    if source is None:
        positions = torch.from_numpy(clean.cell.gene_positions).to(bench.device)
        sae = bench.saes[bench.source_layer]
        source = TopKLatents.of_cell(sae, residual[positions], clean.cell, bench.source_layer).kept()
    targets = {layer: clean.targets[layer] for layer in bench.targets}
    return CleanCell(clean.cell, kept_on_host(residual), source, targets)


def n_bytes(clean: CleanCell) -> int:
    """Host memory that a clean run takes, in bytes."""
    latents = (clean.source, *clean.targets.values())
    return clean.residual.nbytes + sum(of_layer.values.nbytes + of_layer.features.nbytes for of_layer in latents)
