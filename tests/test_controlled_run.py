"""Controlled steering against full hooked passes; its controls, its resume, its records."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import reference_controlled
from cellcircuits import controlled_run
from cellcircuits.controlled_run import COLUMN
from cellcircuits.displacements import Displacement, DisplacementBench, displaced_final
from cellcircuits.steering_controls import CONTROLS
from cellcircuits.steering_readouts import VALUES
from controlled_fixtures import Setup, bytes_in, records_in
from steering_fixtures import SHAPES

COUNTS = ("n_positions", "n_positions_masked")


def step_of(setup: Setup, layer: int, edit, direction) -> np.ndarray:
    return edit.norm * setup.facts[layer].mean_norm * direction


@pytest.mark.parametrize(("shape", "seed"), [(shape, seed) for seed, shape in enumerate(SHAPES)], ids=str)
def test_every_value_is_that_of_full_hooked_passes(shape, seed: int, tmp_path: Path):
    setup = Setup(shape, seed)
    steerer, asked = setup.steerer(tmp_path), setup.asked()
    n_measured = dict.fromkeys(VALUES, 0)
    for layer in setup.design.layers:
        edits = steerer.layer_edits(layer)
        for number in range(2):
            values = steerer.cell_values(number, layer, edits)
            for i in range(0, len(edits.edits), 4):
                edit = edits.edits[i]
                step = step_of(setup, layer, edit, edits.directions[i])
                slow = reference_controlled.readouts(
                    setup.model, setup.saes[layer], setup.cells[number], layer, (edit.at, step), asked
                )
                for name in VALUES:
                    found = values[i, COLUMN[name]]
                    if slow[name] is None:
                        assert np.isnan(found), (layer, edit, name)
                        continue
                    n_measured[name] += 1
                    scale = max(abs(slow[name]), abs(slow.get(f"{name}_linear") or 0.0))
                    assert found == pytest.approx(slow[name], rel=1e-9, abs=1e-10 * (1 + scale)), (layer, edit, name)
    assert all(n_measured[name] for name in VALUES)


def test_in_float32_the_values_agree_too(tmp_path: Path):
    exact, rounded = (Setup(SHAPES[0], 3, dtype) for dtype in (torch.float64, torch.float32))
    values = []
    for setup in (exact, rounded):
        steerer = setup.steerer(tmp_path)
        values.append(steerer.cell_values(1, 1, steerer.layer_edits(1)))
    assert np.array_equal(np.isnan(values[0]), np.isnan(values[1]))
    known = ~np.isnan(values[0])
    assert values[1][known] == pytest.approx(values[0][known], abs=2e-5)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_at_the_last_layer_the_probe_is_the_closed_form_exactly(shape, tmp_path: Path):
    setup = Setup(shape)
    last = shape[0] - 1
    assert last in setup.saes
    steerer = setup.steerer(tmp_path)
    steerer.steer()
    probe = setup.design.readouts.probe
    for name, record in records_in(tmp_path).items():
        assert record["analytic"] == (record["layer"] == last), name
        if not record["analytic"]:
            continue
        decoder = setup.saes[last].decoder_directions[record["feature_idx"]].numpy()
        unit = decoder / np.linalg.norm(decoder)
        for dose in record["doses"]:
            own, length = dose["feature"], dose["dose"]["length"]
            for cell, value, linear, n in zip(
                setup.cells, own["probe"], own["probe_linear"], own["n_positions"], strict=True
            ):
                if n is None:
                    assert value is None
                    continue
                expected = n / len(cell.gene_positions) * length * float(unit @ probe.direction)
                assert value == linear == pytest.approx(expected, rel=1e-12)
            assert own["signature"] == own["signature_linear"] and own["markers"] == own["markers_linear"]


def test_the_definition_is_a_full_hooked_pass():
    setup = Setup()
    bench, cell = DisplacementBench(setup.model, setup.saes), setup.cells[2]
    move = Displacement(np.array([0, 3]), np.linspace(-1, 1, 24))
    slow = reference_controlled.run(setup.model, cell.tokens, cell.gene_positions, 1, move.rows, move.step)[0]
    assert np.allclose(displaced_final(bench, cell, 1, move).numpy(), slow, atol=1e-12)
    changes = bench.displaced(bench.clean(cell), 1, [Displacement(np.zeros(0, dtype=np.int64), move.step)])
    assert not changes.transformed.any() and not changes.stream.any()


def test_every_edit_has_exactly_the_stated_length(tmp_path: Path):
    setup = Setup()
    steerer = setup.steerer(tmp_path)
    for layer in setup.design.layers:
        edits = steerer.layer_edits(layer)
        moves = steerer.moves(steerer.bench.clean(setup.cells[0]), layer, edits)
        unit = setup.facts[layer].mean_norm
        for edit, move in zip(edits.edits, moves, strict=True):
            assert np.linalg.norm(move.step) == pytest.approx(edit.norm * unit, rel=1e-12)
        for feature, doses in edits.of_feature.items():
            length = float(np.linalg.norm(steerer.decoder(layer)[feature]))
            expected = 2 * setup.facts[layer].mean_latent[feature] * length / unit  # alpha 3
            norms = [[edits.edits[i].norm for kind in of.values() for i in kind] for of in doses]
            for found, norm in zip(norms, (0.1, 0.7, expected), strict=True):
                assert found == pytest.approx([norm] * 7, rel=1e-12)  # its own and two of each kind


def test_an_edit_of_no_length_is_not_measured(tmp_path: Path):
    """An alpha of a feature that the first half has nowhere, or of a feature that writes nothing."""
    setup = Setup()
    setup.facts[1].mean_latent[5] = 0.0
    with torch.no_grad():
        setup.saes[4].decoder_directions[5] = 0.0
    assert not setup.saes[4].decoder_directions[5].any()
    setup.steerer(tmp_path).steer()
    records = records_in(tmp_path)
    silent, writes_nothing = records["controlled_F5_L1.json"], records["controlled_F5_L4.json"]
    by_norm, by_alpha = silent["doses"][1], silent["doses"][2]
    assert by_alpha["dose"]["norm"] == by_alpha["dose"]["length"] == 0.0
    assert any(x is not None for x in by_norm["feature"]["probe"])
    edits = [by_alpha["feature"], *by_alpha["controls"]["random_direction"], writes_nothing["doses"][0]["feature"]]
    assert all(value is None for edit in edits for name in VALUES for value in edit[name])


def test_records_hold_feature_and_controls_cell_by_cell(tmp_path: Path):
    setup = Setup()
    setup.steerer(tmp_path).steer()
    records = records_in(tmp_path)
    assert set(records) == {f"controlled_F{i}_L{layer}.json" for layer in (1, 4) for i in (0, 5)}
    for record in records.values():
        assert record["steered_cells"] == [cell.name for cell in setup.cells]
        assert [dose["dose"]["norm"] for dose in record["doses"]][:2] == [0.1, 0.7]
        for dose in record["doses"]:
            assert set(dose["controls"]) == set(CONTROLS)
            for kind, draws in dose["controls"].items():
                assert [draw["draw"] for draw in draws] == [0, 1]
                assert all((draw["feature_idx"] is None) == (kind == "random_direction") for draw in draws)
                assert all(draw["feature_idx"] not in (0, 1, 5) for draw in draws)  # 1 is active in no cell
                for draw in draws:
                    assert all(len(draw[name]) == len(setup.cells) for name in VALUES)
            own = dose["feature"]
            assert all((a is None) == (b is None) for a, b in zip(own["probe"], own["n_positions"], strict=True))
    assert not (tmp_path / "partial").exists()
    assert json.loads((tmp_path / "progress.json").read_text())["n_features_done"] == 4


def test_numbers_do_not_depend_on_the_batch(tmp_path: Path):
    setup = Setup()
    for size in (1, 7):
        setup.steerer(tmp_path / str(size), batch_size=size).steer()
    one, many = (records_in(tmp_path / str(size)) for size in (1, 7))
    for name, record in one.items():
        for a, b in zip(record["doses"], many[name]["doses"], strict=True):
            for value in VALUES:
                x, y = (np.array(dose["feature"][value], dtype=float) for dose in (a, b))
                assert np.allclose(x, y, atol=1e-12, equal_nan=True)


class TestResume:
    def test_a_stopped_run_ends_the_same_byte_for_byte(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        setup = Setup()
        setup.steerer(tmp_path / "whole").steer()
        for stop in range(1, 2 * len(setup.cells), 3):
            out_dir = tmp_path / f"stopped{stop}"
            steerer, calls = setup.steerer(out_dir), 0
            real = controlled_run.ControlledSteerer.cell_values

            def cell_values(self, *args, stop=stop, real=real):
                nonlocal calls
                calls += 1
                if calls > stop:
                    raise KeyboardInterrupt
                return real(self, *args)

            monkeypatch.setattr(controlled_run.ControlledSteerer, "cell_values", cell_values)
            with pytest.raises(KeyboardInterrupt):
                steerer.steer()
            monkeypatch.undo()
            again = setup.steerer(out_dir)
            counted = []
            monkeypatch.setattr(
                controlled_run.ControlledSteerer,
                "cell_values",
                lambda self, *args, real=real, counted=counted: counted.append(args) or real(self, *args),
            )
            again.steer()
            monkeypatch.undo()
            assert len(counted) == 2 * len(setup.cells) - stop
            assert bytes_in(out_dir) == bytes_in(tmp_path / "whole")

    def test_a_lost_or_damaged_record_is_made_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        setup = Setup()
        setup.steerer(tmp_path).steer()
        before = bytes_in(tmp_path)
        (tmp_path / "controlled_F0_L4.json").unlink()
        (tmp_path / "controlled_F5_L1.json").write_text("{")
        with caplog.at_level(logging.WARNING):
            setup.steerer(tmp_path).steer()
        assert "controlled_F5_L1.json is damaged" in caplog.text
        assert bytes_in(tmp_path) == before

    def test_a_finished_run_runs_nothing(self, tmp_path: Path):
        setup = Setup()
        setup.steerer(tmp_path).steer()
        (tmp_path / "partial").mkdir()
        (tmp_path / "partial" / "rows_0000000.npz").write_bytes(b"of a run killed after its last record")
        again = setup.steerer(tmp_path)
        again.steer()
        assert again.n_passes == 0 and not (tmp_path / "partial").exists()


def test_an_engine_that_disagrees_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from cellcircuits.errors import UserError

    monkeypatch.setattr(controlled_run, "displaced_final", lambda bench, cell, layer, move: torch.ones(1, 24))
    with pytest.raises(UserError, match="not built as a Geneformer"):
        Setup().steerer(tmp_path).steer()
