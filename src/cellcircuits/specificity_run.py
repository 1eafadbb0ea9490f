"""One run of specificity controls: features one after the other, cells and conditions inside, nothing lost."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cellcircuits import specificity_results
from cellcircuits.effects import Bench, CleanCell
from cellcircuits.errors import UserError
from cellcircuits.jsonio import discard, write_json
from cellcircuits.specificity import (
    CONTROLS,
    OTHER,
    ControlledFeature,
    Directions,
    Draws,
    covariance_directions,
    feature_directions,
)
from cellcircuits.specificity_stats import HowTested, Outcome, likeness, outcome_of, specific_edges
from cellcircuits.trace_run import SELF_CHECK_TIED_SHARE, SELF_CHECK_TIES, Progress, Tracer
from cellcircuits.tracing import BlockEffects, trace_and_save

log = logging.getLogger(__name__)


@dataclass
class SpecificityRun:
    """Measures features and their controls into one output folder that belongs to this run.

    `clean` are the clean runs of the cells, `draws` and `tests` say how controls are drawn and effects tested,
    `frequencies` {feature: share of positions} are those of the source layer, `traced` the edges of the trace,
    `described` {feature: what its record says beside numbers}, `fingerprint` that of the settings, `batch_size` runs
    per batch or None for what memory allows.
    """

    out_dir: Path
    bench: Bench
    clean: Sequence[CleanCell]
    draws: Draws
    tests: HowTested
    frequencies: Mapping[int, float]
    traced: pa.Table
    described: Mapping[int, Mapping[str, Any]]
    fingerprint: str
    batch_size: int | None = None

    @cached_property
    def decoder(self) -> NDArray[np.float64]:
        """Decoder directions of the source layer on the host, (n_features, d_model)."""
        directions = self.bench.saes[self.bench.source_layer].decoder_directions
        return directions.detach().cpu().numpy().astype(np.float64)

    def measure(self, features: Sequence[int]) -> None:
        """Measure every feature whose record is not in the folder yet.

        Raises:
            UserError: an effect is not what the trace says, or see `trace_block`.
        """
        held = specificity_results.read_records(self.out_dir, self.fingerprint)
        left = [feature for feature in features if feature not in held]
        log.info("%d features to measure, %d of them already done", len(features), len(features) - len(left))
        for feature in held:  # a run that was killed between writing a record and tidying
            discard(self.partial_path(feature))
        progress = Progress(self.out_dir / "progress.json", len(features), len(left), len(self.clean))
        with progress.bar:
            if left:
                self.check_engine(left)
                of_covariance = covariance_directions(self.draws, left, self.clean)
            for feature in left:
                self.measure_one(feature, of_covariance[feature], progress)
                progress.finished(1, here=True)

    def check_engine(self, features: Sequence[int]) -> None:
        """Compare the engine with a full hooked pass on one feature; see `Tracer.check_engine`."""
        Tracer(self.out_dir, self.bench, self.clean, {}, self.tests.rule, self.fingerprint).check_engine(features)

    def measure_one(self, feature: int, of_covariance: NDArray[np.float64], progress: Progress) -> None:
        """Measure one feature under all conditions and write its record."""
        directions = feature_directions(self.draws, feature, of_covariance, self.frequencies, self.decoder)
        controlled = ControlledFeature(self.bench, feature, self.draws, directions)
        block = BlockEffects.empty(range(len(controlled.conditions)), len(self.clean), self.bench.n_targets)
        partial_path = self.partial_path(feature)
        block.restore(partial_path, self.fingerprint)
        progress.bar.update(block.n_cells_done)
        save = partial(block.save, partial_path, self.fingerprint)
        trace_and_save(
            controlled, self.clean, block, save, batch_size=self.batch_size, on_cell=lambda _: progress.bar.update()
        )
        record = self.record(controlled, directions, block)
        write_json(specificity_results.record_path(self.out_dir, feature), record)
        discard(partial_path)

    def partial_path(self, feature: int) -> Path:
        """Where the effects of an unfinished feature lie."""
        return self.out_dir / "partial" / f"specificity_{feature:04d}.npz"

    def record(self, controlled: ControlledFeature, directions: Directions, block: BlockEffects) -> dict[str, Any]:
        """The JSON record of a feature that is measured in all cells.

        Raises:
            UserError: see `require_traced`.
        """
        feature = controlled.feature
        of_each = [
            outcome_of(effects[measured], feature, self.tests)
            for effects, measured in zip(block.effects, block.measured, strict=True)
        ]
        real, n = of_each[0], self.draws.n
        n_otherwise = self.require_traced(feature, real)
        by_control = {control: of_each[1 + i * n : 1 + (i + 1) * n] for i, control in enumerate(CONTROLS)}
        return {
            "source_layer": self.bench.source_layer,
            "feature_idx": feature,
            **self.described[feature],
            "n_cells_measured": len(self.clean),
            "n_cells_active": real.n_cells,
            "n_edges_not_as_traced": n_otherwise,
            "real": {**real.counts(), "tests": real.tests()},
            "controls": {
                control: [
                    {**self.direction_facts(feature, control, draw, directions), **x.counts(), **likeness(real, x)}
                    | {"tests": x.tests()}
                    for draw, x in enumerate(of_control)
                ]
                for control, of_control in by_control.items()
            },
            "specific": specific_edges(real, by_control),
            "elapsed_seconds": float(block.seconds.sum()),
            "fingerprint": self.fingerprint,
        }

    def direction_facts(self, feature: int, control: str, draw: int, directions: Directions) -> dict[str, Any]:
        """The cosine of a control's direction with the feature's own, and which feature it belongs to."""
        if control not in directions.unit:
            return {"direction_cosine": 1.0}
        own = self.decoder[feature]
        cosine = float(directions.unit[control][draw] @ own / np.linalg.norm(own))
        if control != OTHER:
            return {"direction_cosine": cosine}
        other = directions.others[draw]
        return {"feature_idx": other, "activation_freq": self.frequencies[other], "direction_cosine": cosine}

    def require_traced(self, feature: int, real: Outcome) -> int:
        """How many edges of the ablation are not those of the trace: none but what float32 rounding may move.

        Raises:
            UserError: they are others, so that the trace is of something else.
        """
        edges = self.traced.filter(pc.equal(self.traced["source"], feature))
        targets = zip(edges["target_layer"].to_pylist(), edges["target"].to_pylist(), strict=True)
        there = [self.bench.columns[layer].start + target for layer, target in targets]
        differing = np.setxor1d(np.array(there, dtype=np.int64), real.edges)
        if len(differing) > max(SELF_CHECK_TIES, SELF_CHECK_TIED_SHARE * len(there)):
            raise UserError(
                f"--trace-dir: feature {feature} has {len(there)} edges there and {len(real.edges)} here, "
                f"{len(differing)} of them others; the trace is of other inputs or by other software: trace again."
            )
        return len(differing)
