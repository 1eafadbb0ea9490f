"""A dozen kills over all scripts; crash_runs.py says what is done to them, and has hundreds."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "exhaustive", "selective", "triplets", "trajectory", "steering", "specificity", "controlled", "prepare",
)  # fmt: skip


def test_killed_runs_go_on_to_the_same_files():
    words = [word for name in SCRIPTS for word in ("--experiment", name)]
    script = Path(__file__).with_name("crash_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "12", "--slow", "0.002", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    everything = done.stdout.splitlines()[-1].split()
    assert done.returncode == 0, done.stdout
    assert sum(map(int, everything[1:4])) == 12 and everything[-4:] == ["0"] * 4, done.stdout
