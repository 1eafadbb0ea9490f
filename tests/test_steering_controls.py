"""Halves of cells, control features, doses, marker panels: seeded, matched, independent of order."""

import json
from pathlib import Path

import numpy as np
import pytest

from cellcircuits.cell_halves import drawn_cells, first_half
from cellcircuits.errors import UserError
from cellcircuits.steering_controls import (
    FREQUENCY_MATCHED,
    RANDOM_DIRECTION,
    RANDOM_FEATURE,
    Dose,
    LayerFacts,
    candidates,
    choose_controls,
    edits_of,
)
from cellcircuits.steering_readouts import MarkerPanel, MarkerTokens, marker_tokens, markers_in, read_markers

RNG = np.random.default_rng(0)
N_FEATURES = 60
FACTS = LayerFacts(
    3.0, RNG.uniform(0.001, 0.3, N_FEATURES), RNG.uniform(0.0, 1.0, N_FEATURES), RNG.uniform(0.1, 2.0, N_FEATURES)
)
DECODER = RNG.standard_normal((N_FEATURES, 8))
PANEL = [3, 10, 40]
NAMES = [f"cell{i}" for i in range(41)]
TYPES = ["a"] * 20 + ["b"] * 15 + ["c"] * 6


class TestHalves:
    def test_every_type_is_halved(self):
        first = first_half(NAMES, TYPES, None, 5)
        for kind in "abc":
            of_kind = np.array(TYPES) == kind
            assert abs(first[of_kind].sum() - of_kind.sum() / 2) <= 0.5

    def test_the_order_of_the_cells_does_not_matter(self):
        order = np.random.default_rng(1).permutation(len(NAMES))
        donors = [f"d{i % 7}" for i in range(len(NAMES))]
        for of in (None, donors):
            first = first_half(NAMES, TYPES, of, 5)
            again = first_half([NAMES[i] for i in order], [TYPES[i] for i in order], of and [of[i] for i in order], 5)
            assert np.array_equal(again, first[order])

    def test_a_type_of_its_own_does_not_change_the_others(self):
        first = first_half(NAMES, TYPES, None, 5)
        assert np.array_equal(first_half([*NAMES, "new"], [*TYPES, "z"], None, 5)[:-1], first)

    def test_seeds_differ(self):
        assert not np.array_equal(first_half(NAMES, TYPES, None, 5), first_half(NAMES, TYPES, None, 6))

    def test_donors_go_as_a_whole_and_balance(self):
        donors = ["big"] * 20 + ["small"] * 3 + ["middle"] * 10 + ["other"] * 8
        first = first_half(NAMES, TYPES, donors, 2)
        for donor in set(donors):
            assert len({side for side, of in zip(first, donors, strict=True) if of == donor}) == 1
        assert abs(first.sum() - 20.5) < 2
        with pytest.raises(ValueError, match="one donor"):
            first_half(NAMES, TYPES, ["one"] * len(NAMES), 2)

    def test_a_draw_is_of_the_cells_and_not_of_their_order(self):
        drawn = {NAMES[i] for i in drawn_cells(NAMES, 9, 3)}
        assert len(drawn) == 9
        assert {NAMES[::-1][i] for i in drawn_cells(NAMES[::-1], 9, 3)} == drawn
        assert np.array_equal(drawn_cells(NAMES, 100, 3), np.arange(41))


class TestControls:
    def test_candidates_are_active_enough_and_not_of_the_panel(self):
        usable = candidates(FACTS, PANEL, DECODER)
        assert not set(usable) & set(PANEL)
        assert set(usable) == {i for i in range(N_FEATURES) if FACTS.share_of_cells[i] >= 0.05} - set(PANEL)

    def test_matched_features_are_the_nearest_and_serve_once(self):
        usable = candidates(FACTS, PANEL, DECODER)
        found = choose_controls(5, PANEL, usable, FACTS, (4, 9)).matched
        every = [i for of in found.values() for i in of]
        assert len(every) == len(set(every)) == 12
        gap = np.abs(np.log(FACTS.frequency)[:, None] - np.log(FACTS.frequency))
        taken: set[int] = set()
        for draw in range(4):
            for feature in PANEL:
                free = [i for i in usable if i not in taken]
                assert gap[feature, found[feature][draw]] == min(gap[feature, i] for i in free)
                taken.add(found[feature][draw])

    def test_draws_depend_on_layer_feature_and_draw_alone(self):
        usable = candidates(FACTS, PANEL, DECODER)
        few, many = (choose_controls(5, PANEL, usable, FACTS, (n, 9)).random for n in (2, 4))
        assert all(many[feature][:2] == few[feature] for feature in PANEL)
        assert choose_controls(5, PANEL[::-1], usable, FACTS, (4, 9)).random == many
        alone = choose_controls(5, [10], usable, FACTS, (4, 9)).random
        assert alone[10] == many[10]
        assert choose_controls(6, PANEL, usable, FACTS, (4, 9)).random != many
        assert choose_controls(5, PANEL, usable, FACTS, (4, 8)).random != many
        assert all(len(set(of)) == 4 for of in many.values())

    def test_where_features_run_out_there_are_fewer_draws(self):
        usable = np.array([1, 2])
        found = choose_controls(5, PANEL, usable, FACTS, (4, 9))
        assert all(sorted(of) == [1, 2] for of in found.random.values())
        assert sorted(i for of in found.matched.values() for i in of) == [1, 2]

    def test_directions_are_fixed_unit_vectors(self):
        controls = choose_controls(5, PANEL, candidates(FACTS, PANEL, DECODER), FACTS, (3, 9))
        small, large = (edits_of(5, 10, controls, norm, (3, 9)) for norm in (0.1, 0.9))
        for kind in (RANDOM_FEATURE, FREQUENCY_MATCHED, RANDOM_DIRECTION):
            for a, b in zip(small[kind], large[kind], strict=True):
                assert np.array_equal(a.direction(DECODER), b.direction(DECODER))  # the dose changes the length alone
                assert np.linalg.norm(a.direction(DECODER)) == pytest.approx(1)
                assert (a.norm, b.norm) == (0.1, 0.9)
        at = [edit.at for edit in small[RANDOM_DIRECTION]]
        assert at == [10] * 3 and len({tuple(edit.direction(DECODER)) for edit in small[RANDOM_DIRECTION]}) == 3
        assert all(edit.at == edit.feature for edit in small[RANDOM_FEATURE])

    def test_an_alpha_is_the_mean_length_that_it_adds(self):
        length = float(np.linalg.norm(DECODER[10]))
        assert Dose(alpha=5.0).of_feature(FACTS, 10, length) == pytest.approx(4 * FACTS.mean_latent[10] * length / 3)
        assert Dose(alpha=0.0).of_feature(FACTS, 10, length) < 0
        assert Dose(norm=0.2).of_feature(FACTS, 10, length) == 0.2


class TestMarkers:
    def test_what_is_masked_in_a_cell(self):
        markers = MarkerTokens((5, 6), (8, 9), ())
        tokens = np.array([2, 8, 7, 5, 9, 3])
        rows, is_late = markers_in(tokens, np.arange(1, 5), markers)
        assert rows.tolist() == [0, 2, 3] and is_late.tolist() == [True, False, True]
        assert markers_in(np.array([2, 8, 7, 9, 3]), np.arange(1, 4), markers) is None

    def test_names_that_the_model_does_not_know_are_reported(self):
        known = {"A": 5, "B": 6, "C": 8}
        found = marker_tokens(MarkerPanel(("A", "B", "X"), ("C", "Y")), known.get, "--markers")
        assert found == MarkerTokens((5, 6), (8,), ("X", "Y"))
        with pytest.raises(UserError, match="none of the late markers"):
            marker_tokens(MarkerPanel(("A",), ("Y",)), known.get, "--markers")

    @pytest.mark.parametrize(
        "content", [[], {"early": ["A"]}, {"early": [], "late": ["B"]}, {"early": ["A"], "late": [3]}, {"early": "A"}]
    )
    def test_a_file_that_is_no_panel_is_refused(self, content, tmp_path: Path):
        (tmp_path / "markers.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="needs `early` and `late`"):
            read_markers(tmp_path / "markers.json")

    def test_a_gene_on_both_sides_is_refused(self, tmp_path: Path):
        (tmp_path / "markers.json").write_text('{"early": ["A", "B"], "late": ["B"]}')
        with pytest.raises(UserError, match="B is listed as early and as late"):
            read_markers(tmp_path / "markers.json")

    def test_the_study_s_panels(self):
        panel = MarkerPanel()
        assert len(panel.early) == len(panel.late) == 18 and not set(panel.early) & set(panel.late)
