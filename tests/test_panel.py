"""Panels of features to steer: what is read, what is refused."""

import json
from pathlib import Path

import pytest

from cellcircuits.errors import UserError
from cellcircuits.panel import PUBLISHED_PANEL, PanelFeature, check_indices, check_layers, read_panel


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "panel.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_default_panel_is_the_published_one():
    assert len(PUBLISHED_PANEL) == len({feature.name for feature in PUBLISHED_PANEL}) == 14
    assert [sum(f.layer == layer for f in PUBLISHED_PANEL) for layer in (0, 5, 11, 17)] == [5, 2, 4, 3]
    assert PUBLISHED_PANEL[1] == PanelFeature(0, 25, 1.13, "Mitotic Spindle Microtubule Attachment")
    assert sum(feature.label == "unannotated" for feature in PUBLISHED_PANEL) == 7
    assert all(feature.index < 4608 for feature in PUBLISHED_PANEL)


def test_a_panel_file_keeps_its_order_and_ignores_other_keys(tmp_path: Path):
    content = [{"layer": 5, "idx": 7, "d": -1, "label": "A b", "kind": "OFF", "q": 0.1}, {"layer": 0, "idx": 2}]
    assert read_panel(written(tmp_path, content)) == (PanelFeature(5, 7, -1.0, "A b"), PanelFeature(0, 2, None, None))


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", ["not valid JSON"]),
        ({}, ["list"]),
        ([], ["at least one"]),
        ([3], ["entry 1"]),
        ([{"layer": 0, "idx": 1}, {"layer": 0}], ["entry 2", "`idx`"]),
        ([{"layer": -1, "idx": 1}], ["`layer`", "-1"]),
        ([{"layer": True, "idx": 1}], ["`layer`"]),
        ([{"layer": 0, "idx": 1.0}], ["`idx`", "1.0"]),
        ([{"layer": 0, "idx": 1, "d": "big"}], ["`d`", "big"]),
        ('[{"layer": 0, "idx": 1, "d": NaN}]', ["`d`", "finite"]),
        ('[{"layer": 0, "idx": 1, "d": -Infinity}]', ["`d`", "finite"]),
        (f'[{{"layer": 0, "idx": 1, "d": 1{"0" * 400}}}]', ["`d`", "finite"]),
        ([{"layer": 0, "idx": 1, "label": 3}], ["`label`"]),
        ([{"layer": 0, "idx": 1}, {"layer": 0, "idx": 1, "d": 2}], ["layer 0, idx 1", "twice"]),
    ],
)
def test_a_malformed_panel_is_one_sentence(tmp_path: Path, content: object, words: list[str]):
    with pytest.raises(UserError) as refused:
        read_panel(written(tmp_path, content))
    assert all(word in str(refused.value) for word in ["panel.json", *words]), refused.value


def test_a_missing_panel_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        read_panel(tmp_path / "panel.json")


def test_features_must_be_of_the_model_and_its_saes():
    listed, file = [PanelFeature(3, 40)], Path("mine.json")
    check_layers(listed, 4, file)
    check_indices(listed, {3: 41}, file)
    with pytest.raises(UserError, match=r"mine\.json.*F40_L3.*3 blocks, 0 to 2"):
        check_layers(listed, 3, file)
    with pytest.raises(UserError, match=r"mine\.json.*F40_L3.*0 to 39"):
        check_indices(listed, {3: 40}, file)
    with pytest.raises(UserError, match=r"default panel.*V2-316M.*switch_features\.json"):
        check_layers(PUBLISHED_PANEL, 12, None)
    check_indices(PUBLISHED_PANEL, dict.fromkeys((0, 5, 11, 17), 4608), None)
    # a larger SAE has all the indices, but they are other features
    with pytest.raises(UserError, match=r"V2-316M.*4,608.*switch_features\.json"):
        check_indices(PUBLISHED_PANEL, dict.fromkeys((0, 5, 11, 17), 9216), None)
