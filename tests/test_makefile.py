"""The Makefile's recipes: every script they name exists, and takes the flags that the demo's settings give it."""

import os
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words: str) -> subprocess.CompletedProcess[str]:
    """Run make as in a folder whose environment is ready."""
    command = ["make", "-C", str(ROOT), "VENV=ready", "-o", "ready/ready", "-o", "ready/ready-for-tests", *words]
    # a make that runs these tests passes its own flags and variables on by the environment
    foreign = ("MAKE", "MFLAGS", "OUT", "RUNS", "PAPER", "INPUTS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def commands(*words: str) -> list[list[str]]:
    """The command lines that would run."""
    done = make("-n", *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("ready/bin/python src/")]


@pytest.mark.parametrize("target", ["experiments", "results", "claims", "figures", "numbers", "check"])
def test_every_command_is_understood(target: str):
    found = commands(target)
    assert found
    for _, script, *flags in found:
        import_module(Path(script).stem).build_parser().parse_args(flags)


def test_results_go_where_they_are_asked_to():
    targets = ("experiments", "results", "figures", "numbers")
    flags = [words for target in targets for words in commands(target, "OUT=/tmp/mine")]
    written = [words[words.index("--out-dir") + 1] for words in flags if "--out-dir" in words]
    assert len(written) > 8 and all(path.startswith("/tmp/mine") for path in written)
    assert not any("--readme" in words for words in flags)


def test_the_demo_works_in_a_folder_that_git_ignores():
    flags = [words for words in commands("experiments") if "--out-dir" in words]
    written = {words[words.index("--out-dir") + 1] for words in flags}
    assert len(written) > 6 and all(path.startswith("results/demo/") for path in written)
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "results/*" in ignored and not any(re.fullmatch(r"!results/demo/?", line) for line in ignored)


def test_the_demo_ends_with_the_claims_and_touches_nothing_else():
    found = commands("demo")
    names = [Path(script).stem for _, script, *_ in found]
    assert names[-2:] == ["collect_results", "check_claims"]
    assert "--readme" not in found[-1] and found[-1][-2:] == ["--results", "results/demo/kept"]
    assert {"--runs", "results/demo", "--name", "demo model"} <= set(found[-2])
    written = [words[words.index("--out-dir") + 1] for words in found if "--out-dir" in words]
    assert len(written) > 8 and all(path.startswith("results/demo/") for path in written)
    assert [words[3:] for words in commands("demo", "INPUTS=mine")][-1] == found[-1][3:]


def test_inputs_without_settings_are_refused(tmp_path: Path):
    done = make("experiments", f"INPUTS={tmp_path}", f"OUT={tmp_path}")
    assert done.returncode == 2 and f"{tmp_path}/settings.mk: no such file" in done.stderr
    assert not list(tmp_path.iterdir())
