"""The study's claims: planted answers get their verdict, absent analyses none, damaged files a named error."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import check_claims
from cellcircuits.claim import FAILS, HOLDS, OPEN, against, proportion_interval, resampled
from cellcircuits.errors import UserError
from cellcircuits.kept_results import Document, Results
from cellcircuits.study_claims import CLAIMS, END, START, judge
from results_fixtures import NAME, change, write_results

GRAPH, CALIBRATION, BY_LAYER = (
    f"exhaustive_tracing/{name}.json" for name in ("graph_statistics", "calibration", "edges_by_layer")
)
SPECIFICITY, STEERING_TESTS = "specificity/specificity.json", "controlled_steering/steering_tests.json"


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return write_results(tmp_path / "results")


def verdicts(results: Results) -> dict[str, str]:
    return {row["name"]: row["verdict"] for row in judge(results)["claims"]}


class TestVerdicts:
    def test_planted_truths_hold(self, results: Results):
        found = verdicts(results)
        assert found.pop("Coverage") == FAILS  # the chosen ones have more edges than the rest
        assert found.pop("LastLayer") == OPEN  # all features one way, but no block lies between
        assert set(found.values()) == {HOLDS}, found

    @pytest.mark.parametrize(
        "name, changes, verdict",
        [
            ("Dense", [(CALIBRATION, "published_rule", {"fdr": 0.3, "fdr_low": 0.2, "fdr_high": 0.4})], FAILS),
            ("Dense", [(CALIBRATION, "published_rule", {"fdr": None})], OPEN),
            ("Attenuation", [(BY_LAYER, "sources", 0, "last_over_first_high", 1.1)], OPEN),
            ("Attenuation", [(BY_LAYER, "sources", 0, "last_over_first_high", 1.1),
                             (BY_LAYER, "sources", 0, "last_over_first_low", 0.95)], FAILS),
            ("Tail", [(GRAPH, "tail", "result", "power_law", "p", 0.01)], FAILS),
            ("Tail", [(GRAPH, "tail", "result", "alternatives", 0, "favoured", None)], OPEN),
            ("Tail", [(GRAPH, "tail", {"result": None, "reason": "few"})], OPEN),
            ("Biology", [(GRAPH, "drivers", "result", "rank_correlations",
                          "activation_freq", "spearman", {"rho": 0.8, "interval": [0.7, 0.9]})], FAILS),
            ("Annotation", [(GRAPH, "annotation", "result", "top", "top_20", "result",
                             "matched", "p", 0.5)], OPEN),
            ("Specific", [(SPECIFICITY, "controls", "other_feature", "edge_ratio_low", 0.9)], OPEN),
            ("Specific", [(SPECIFICITY, "controls", "other_feature", "edge_ratio_low", 0.9),
                          (SPECIFICITY, "controls", "other_feature", "edge_ratio_high", 1.2)], FAILS),
            ("Synergy", [("pairwise_ablation/additivity.json", "family", "n_synergy", 400)], FAILS),
            ("Synergy", [("pairwise_ablation/additivity.json", "family", "n_synergy", 40)], OPEN),
            ("LastLayer", [("trajectory_steering/summary.json", "features", 8, "alpha_results", "5.0",
                            "frac_positive_shift", 0.0)], FAILS),
            ("Direction", [(STEERING_TESTS, "primary", "p", 0.2)], OPEN),
            ("Direction", [(STEERING_TESTS, "primary", {"estimate": None, "reason": "few"})], OPEN),
        ],
    )  # fmt: skip
    def test_other_numbers_give_other_verdicts(self, results: Results, name: str, changes: list, verdict: str):
        for file, *keys, value in changes:
            change(results.folder, file, *keys, to=value)
        row = next(row for row in judge(results)["claims"] if row["name"] == name)
        assert row["verdict"] == verdict
        assert verdict != OPEN or row["reason"]

    def test_additive_effects_are_not_redundant(self, results: Results):
        for folder in ("pairwise_ablation", "higher_order_ablation"):
            file = f"{folder}/additivity.json"
            for i in range(len(json.loads((results.folder / file).read_text())["combinations"])):
                change(results.folder, file, "combinations", i, "redundancy_index", to=0.001 * (-1) ** i)
                if folder.startswith("higher"):
                    for pair in ("AB", "AC", "BC"):
                        change(results.folder, file, "combinations", i, "conditions", pair, "redundancy_index", to=0.0)
        found = verdicts(results)
        assert {found[name] for name in ("Pairs", "Triplets", "Pathways")} == {FAILS}

    @pytest.mark.parametrize(
        "file, names",
        [
            ("specificity/specificity.json", {"Specific"}),
            ("pairwise_ablation/additivity.json", {"Pairs", "Pathways"}),
            ("higher_order_ablation/additivity.json", {"Triplets"}),
            (STEERING_TESTS, {"Direction"}),
        ],
    )
    def test_an_analysis_that_was_not_run_says_so(self, results: Results, file: str, names: set[str]):
        (results.folder / file).unlink()
        rows = {row["name"]: row for row in judge(results)["claims"]}
        for name in names:
            assert rows[name]["verdict"] == OPEN and rows[name]["ours"] == "not measured"
            assert Path(file).name in rows[name]["reason"]

    @pytest.mark.parametrize(
        "file, keys",
        [
            ("exhaustive_tracing/exhaustive_summary.json", ("total_edges",)),
            (CALIBRATION, ("published_rule",)),
            ("pairwise_ablation/additivity.json", ("family", "n_tests")),
            ("trajectory_steering/summary.json", ("features", 0, "alpha_results", "5.0", "n_cells_steered")),
        ],
    )
    def test_a_damaged_file_is_named_with_its_field(self, results: Results, file: str, keys: tuple):
        change(results.folder, file, *keys, to="many")
        with pytest.raises(UserError, match=rf"{Path(file).name}.*{keys[-1]}"):
            judge(results)

    def test_a_missing_file_is_named(self, results: Results):
        (results.folder / CALIBRATION).unlink()
        with pytest.raises(UserError, match=r"calibration\.json: no such file"):
            judge(results)


class TestStatistics:
    def test_wilson_interval_is_its_closed_form(self):
        n_of, n, z = 7, 9, 1.959963984540054
        centre = (n_of + z * z / 2) / (n + z * z)
        half = z / (n + z * z) * math.sqrt(n_of * (n - n_of) / n + z * z / 4)
        assert proportion_interval(n_of, n) == pytest.approx((centre - half, centre + half))

    def test_resampling_covers_the_mean(self):
        rng = np.random.default_rng(0)
        covered = 0
        for _ in range(60):
            mean, low, high = resampled([rng.normal(2, 1, 40)], lambda samples: samples[0].mean(axis=-1))
            covered += low <= 2 <= high
            assert low <= mean <= high
        assert covered >= 50  # 95% of 60 is 57

    def test_resampling_agrees_with_scipy(self):
        from scipy.stats import bootstrap

        sample = np.random.default_rng(1).gamma(2, 1, 50)
        _, low, high = resampled([sample], lambda samples: np.median(samples[0], axis=-1))
        slow = bootstrap((sample,), np.median, n_resamples=4000, method="percentile", random_state=2)
        assert (low, high) == pytest.approx(slow.confidence_interval, abs=0.15)

    @pytest.mark.parametrize(
        "low, high, verdict", [(1, 2, HOLDS), (-2, -1, FAILS), (-1, 1, OPEN), (0, 1, OPEN), (None, 1, OPEN)]
    )
    def test_verdict_against_a_threshold(self, low, high, verdict):
        assert against(low, high, 0) == verdict


class TestDocument:
    def test_fields_are_named_from_the_outermost(self):
        document = Document(Path("f.json"), {"a": [{"b": "x"}], "n": 1})
        inner = document.parts("a")[0]
        with pytest.raises(UserError, match=r"f\.json: a\[0\]\.c is missing"):
            inner.get("c")
        with pytest.raises(UserError, match=r"a\[0\]\.b is 'x' and no number"):
            inner.number("b")
        assert inner.text("b") == "x" and document.maybe("m") is None and document.within(0, 1, "n") == 1
        with pytest.raises(UserError, match="n is 1 and not from 2 to 3"):
            document.within(2, 3, "n")
        assert Document(Path("f"), {"x": {"10": 0, "9": 0}, "y": [1, 2]}).ascending("x") == ["9", "10"]
        wrong = [
            lambda: document.parts("n"),
            lambda: document.part("a"),
            lambda: document.text("n"),
            lambda: document.numbers("n"),
            lambda: document.ascending("a", 0),
        ]
        for call in wrong:
            with pytest.raises(UserError, match=r"f\.json"):
                call()


class TestSixLines:
    def test_a_line_names_each_claim_of_its_verdict_in_a_few_words(self, results: Results):
        content = judge(results)
        lines = content["lines"]
        assert len(lines) == 6
        for line, verdict in zip(lines[2:5], (HOLDS, FAILS, OPEN), strict=True):
            of = [row["short"] for row in content["claims"] if row["verdict"] == verdict]
            assert line.startswith(f"{len(of)} ") and line.endswith(f": {'; '.join(of)}.")

    def test_they_fit_a_terminal(self, results: Results):
        shorts = [claim.short for claim in CLAIMS]
        assert len(set(shorts)) == len(shorts) and max(map(len, shorts)) <= 30
        assert sum(map(len, shorts)) / len(shorts) < 20  # nine of one verdict stay below 200 characters
        lines = judge(results)["lines"]
        assert max(len(line) for line in (*lines[:2], *lines[3:])) <= 200

    def test_no_claim_of_a_verdict_is_said(self, results: Results):
        change(results.folder, "trajectory_steering/summary.json", "features", 8, "alpha_results", "5.0",
               "frac_positive_shift", to=0.0)  # fmt: skip
        assert judge(results)["lines"][4] == "0 cannot be said here: none."


class TestScript:
    def test_it_writes_the_claims_and_prints_six_lines(self, results: Results, tmp_path: Path, capsys):
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
        assert check_claims.main(["--results", str(results.folder), "--readme", str(readme)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 7 and lines[1].startswith(NAME)
        content = json.loads((results.folder / "claims.json").read_text())
        assert content == judge(results) and content["inputs_name"] == NAME and content["n_claims"] == len(CLAIMS)
        text = readme.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
        assert (results.folder / "claims.md").read_text().count("\n| ") == len(CLAIMS) + 1

    def test_a_check_writes_nothing(self, results: Results, capsys):
        assert check_claims.main(["--results", str(results.folder), "--check"]) == 0
        assert not (results.folder / "claims.json").exists()

    def test_a_readme_without_marks_is_refused(self, results: Results, tmp_path: Path, capsys):
        (tmp_path / "README.md").write_text("nothing")
        flags = ["--results", str(results.folder), "--readme", str(tmp_path / "README.md")]
        assert check_claims.main(flags) == 2
        assert "has no lines" in capsys.readouterr().err and not (results.folder / "claims.json").exists()

    def test_no_results_is_one_sentence(self, tmp_path: Path, capsys):
        assert check_claims.main(["--results", str(tmp_path)]) == 2
        assert "no such file; make it again" in capsys.readouterr().err
