"""Simulations where the truth is known, by the functions that benchmarks/simulation.py prints as tables."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import t as student_t

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "simulation", raising=False)
    return import_module("simulation")


def families_of(simulation: ModuleType, n_families: int, *draw, n_flips: int = 4000, **settings) -> list:
    how = simulation.Draw(*draw, **settings)
    return [simulation.tested(how, (9, i), n_flips) for i in range(n_families)]


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("n_cells", [5, 8, 10, 20, 50])
def test_of_symmetric_noise_few_families_have_a_discovery(simulation: ModuleType, n_cells: int, dependent: bool):
    """Every discovery is false there; whether targets depend on each other must not matter."""
    n_families = 25
    families = families_of(simulation, n_families, n_cells, 0.0, dependent, n_features=2, n_targets=40)
    n_wrong = {name: sum(getattr(x, name).any() for x in families) for name in ("bh", "by", "calibrated")}
    assert n_wrong["bh"] <= 5 and n_wrong["by"] <= 1  # P(more) is 0.002 and 0.03 at the nominal rate at worst
    assert n_wrong["calibrated"] <= n_wrong["bh"]
    p = np.concatenate([of_one.p for of_one in families])
    if not dependent:
        assert np.mean(p < 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(p))
    if n_cells == 5:
        assert p.min() >= 1 / 16 and not sum(n_wrong.values())


@pytest.mark.parametrize("n_cells", [5, 8, 10, 20, 50])
def test_the_published_rule_s_rate_is_what_theory_says(simulation: ModuleType, n_cells: int):
    by_theory = simulation.rule_rate(n_cells, 60_000)
    alone = 2 * student_t.sf(0.5 * np.sqrt(n_cells), n_cells - 1)
    assert by_theory <= alone + 3 * np.sqrt(alone / 60_000)
    families = families_of(simulation, 10, n_cells, n_features=3, n_flips=300)
    called = np.concatenate([of_one.published for of_one in families])
    by_flips = sum(of_one.expected_null_edges for of_one in families) / len(called)
    error = np.sqrt(by_theory * (1 - by_theory) / len(called)) + np.sqrt(by_theory / 60_000)
    assert called.mean() == pytest.approx(by_theory, abs=4 * error)
    assert by_flips == pytest.approx(by_theory, abs=4 * error)


def test_what_is_planted_is_found_and_the_share_of_false_findings_kept(simulation: ModuleType):
    power = {}
    for n_cells, d in ((10, 2.0), (20, 0.8), (20, 1.2), (50, 0.8)):
        families = families_of(simulation, 4, n_cells, d, n_features=3, n_targets=150)
        planted, bh, kept = (np.concatenate([getattr(x, n) for x in families]) for n in ("planted", "bh", "calibrated"))
        power[n_cells, d] = bh[planted].mean()
        n_false, n_found = np.count_nonzero(~planted[bh]), np.count_nonzero(bh)
        assert n_false <= 0.05 * n_found + 3 * np.sqrt(0.05 * n_found) and (kept <= bh).all()
    assert power[20, 1.2] > 0.85 and power[50, 0.8] > 0.95 and power[10, 2.0] > 0.8
    assert power[20, 0.8] < power[20, 1.2]


def test_the_tables_are_printed_and_written(simulation: ModuleType, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(simulation, "N_CELLS", (5, 20))
    monkeypatch.setattr(simulation, "N_DEGREES", 1500)
    assert simulation.main(["--quick", "--only", "intervals,tails", "--json", str(tmp_path / "tables.json")]) == 0
    tables = json.loads((tmp_path / "tables.json").read_text())["tables"]
    assert all(row["coverage"] == pytest.approx(0.95, abs=0.02) for row in tables["intervals"])
    laws, lognormal = tables["tails"][:2], tables["tails"][2]
    assert [row["within 3 of them"] for row in laws] == ["2 of 2"] * 2
    assert laws[0]["best form of all degrees"] == "power_law 2"  # a steeper one is hard to tell from others
    assert lognormal["best form of all degrees"] == "lognormal 2" and lognormal["features in the tail"] < 0.3
    said = capsys.readouterr().out
    assert "Hedges' g and its interval" in said and "lognormal(5.6, 0.7)" in said
    with pytest.raises(SystemExit):
        simulation.main(["--only", "nothing"])
