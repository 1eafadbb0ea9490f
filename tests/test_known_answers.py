"""The demo gives the numbers it gave: every answer of known_answers.json, and the comparison itself."""

import json
import sys
from pathlib import Path

import pytest

import known_answers

KNOWN = known_answers.read(known_answers.FILE)


def test_the_demo_gives_the_known_answers(tmp_path: Path) -> None:
    """A change here is explained and written with `python tests/known_answers.py --write`."""
    found = json.loads(json.dumps(known_answers.compute(tmp_path), allow_nan=False))
    assert list(known_answers.differences(KNOWN, found)) == []


def changed(*path: str, by: object) -> dict:
    """The known answers with one of them replaced, or for a number multiplied."""
    content = json.loads(json.dumps(KNOWN))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = place[path[-1]] * by if isinstance(by, float) else by
    return content


EDGE = ("tracing", "edges", "L5/F114 -> L6/F46")
SHIFT = ("steering", "L5/F114", "5.0")


class TestDifferences:
    @pytest.mark.parametrize(
        "path, by",
        [((*EDGE, "cohens_d"), 1.0004), ((*EDGE, "mean_delta"), 0.9996), ((*SHIFT, "mean_state_shift"), 1.0004),
         (("training", "fvu"), 1.001), (("tracing", "n_edges", "L6"), 230), (("tracing", "degree", "F172"), 12)],
    )  # fmt: skip
    def test_within_its_tolerance_an_answer_is_the_same(self, path: tuple[str, ...], by: object) -> None:
        assert list(known_answers.differences(KNOWN, changed(*path, by=by))) == []

    @pytest.mark.parametrize(
        "path, by",
        [((*EDGE, "cohens_d"), 1.0007), ((*EDGE, "cohens_d"), -1.0), ((*EDGE, "n_cells"), 11),
         ((*SHIFT, "mean_state_shift"), 1.0007), ((*SHIFT, "most_raised"), "APOE"), (("training", "fvu"), 1.003),
         (("tracing", "n_edges", "L6"), 231), (("tracing", "degree", "F172"), 11), (("trajectory", "n_early"), 21),
         (("trajectory", "rho", "APOE"), None)],
    )  # fmt: skip
    def test_outside_it_is_named(self, path: tuple[str, ...], by: object) -> None:
        (line,) = known_answers.differences(KNOWN, changed(*path, by=by))
        assert line.startswith(".".join(path)) and " -> " in line

    def test_what_is_new_or_gone_is_named(self) -> None:
        fewer = changed("tracing", by={key: x for key, x in KNOWN["tracing"].items() if key != "degree"})
        assert list(known_answers.differences(KNOWN, fewer)) == ["tracing.degree: gone"]
        assert list(known_answers.differences(fewer, KNOWN)) == ["tracing.degree: new"]


class TestCommand:
    @pytest.fixture
    def command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Runs the command on a copy of the file with these answers found."""
        path = tmp_path / "known_answers.json"
        path.write_text(json.dumps(KNOWN))
        monkeypatch.setattr(known_answers, "FILE", path)

        def run(found: dict, *flags: str) -> tuple[int, dict]:
            monkeypatch.setattr(known_answers, "answers", lambda: found)
            monkeypatch.setattr(sys, "argv", ["known_answers.py", *flags])
            return known_answers.main(), json.loads(path.read_text())

        return run

    def test_it_prints_what_differs_and_leaves_the_file(self, command, capsys: pytest.CaptureFixture[str]) -> None:
        status, kept = command(changed("trajectory", "n_early", by=21))
        assert (status, kept) == (1, KNOWN)
        assert capsys.readouterr().out == "trajectory.n_early: 20 -> 21\n"
        assert command(KNOWN)[0] == 0

    def test_asked_to_write_it_writes(self, command, capsys: pytest.CaptureFixture[str]) -> None:
        found = changed("trajectory", "n_early", by=21)
        assert command(found, "--write") == (0, found)
        assert "trajectory.n_early: 20 -> 21\nWritten: " in capsys.readouterr().out
