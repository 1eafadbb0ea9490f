"""Real signals to real processes: they end in seconds, in one sentence, with nothing half-written."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cellcircuits import cli
from cellcircuits.stopping import SIGNALS, Stopped, stop_signals

SRC = Path(__file__).parents[1] / "src"
HEAD = """
import os, signal, sys, time
from pathlib import Path
from cellcircuits.cli import leave, run_script

def ready():
    print("ready", flush=True)
"""


def start(body: str, *, ignored: tuple[int, ...] = (), **streams) -> subprocess.Popen[str]:
    """A process whose `main` is `body`; it has said "ready" when this returns."""
    program = HEAD + body + "\nleave(run_script(main, 'run it again.'))"

    def before() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        preexec_fn=before,
        start_new_session=True,
        text=True,
        **streams,
    )
    if process.stdout:
        assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and standard error of a process that must end within five seconds."""
    _, error = process.communicate(timeout=5)
    return process.returncode, error


SLEEPING = """
def main():
    ready()
    time.sleep(60)
"""
SAVING = """
def main():
    try:
        ready()
        time.sleep(60)
    except KeyboardInterrupt:
        print("saving", flush=True)
        time.sleep(0.6)
        Path(sys.argv[-1] if len(sys.argv) > 1 else os.environ["SAVED"]).write_text("whole")
        raise
"""
CONVERTING = """
def main():
    ready()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError("what a library makes of it") from None
"""
FINALIZING = """
class Loud:
    def __del__(self):
        ready()
        time.sleep(60)

def main():
    Loud()
    time.sleep(60)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("body", [SLEEPING, CONVERTING, FINALIZING], ids=["sleeping", "converting", "finalizing"])
def test_one_sentence_and_a_status(body: str, number: signal.Signals, status: int):
    process = start(body)
    process.send_signal(number)
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert ended(process) == (status, f"\ninterrupted{by}: run it again.\n")


def test_what_nohup_ignores_stays_ignored():
    process = start(SLEEPING, ignored=(signal.SIGHUP,))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


def test_a_second_signal_does_not_cut_the_saving_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAVED", str(tmp_path / "saved"))
    process = start(SAVING)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    for number in SIGNALS:
        process.send_signal(number)
    status, error = ended(process)
    assert (status, error) == (143, "\ninterrupted by SIGTERM: run it again.\n")
    assert (tmp_path / "saved").read_text() == "whole"


def test_after_a_while_a_second_signal_counts(monkeypatch: pytest.MonkeyPatch):
    with stop_signals() as received:
        with pytest.raises(Stopped):
            received.stop(signal.SIGTERM)
        received.stop(signal.SIGINT)
        later = time.monotonic() + 6
        monkeypatch.setattr("cellcircuits.stopping.time.monotonic", lambda: later)
        with pytest.raises(Stopped):
            received.stop(signal.SIGINT)
        assert received.number == signal.SIGINT


def test_nothing_is_cleared_up_after_a_signal():
    process = start("""
import atexit

def main():
    atexit.register(time.sleep, 60)
    ready()
    time.sleep(60)
""")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS], sys.unraisablehook, sys.stderr
    seen = []
    assert cli.run_script(lambda: seen.append(signal.getsignal(signal.SIGTERM)) or 0, "") == 0
    assert seen[0] != before[0][1]
    assert cli.run_script(lambda: (_ for _ in ()).throw(KeyboardInterrupt), "") == 130
    assert ([signal.getsignal(number) for number in SIGNALS], sys.unraisablehook, sys.stderr) == before


def test_another_thread_than_the_main_one_runs_as_before():
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(cli.run_script(lambda: 7, "")))
    thread.start()
    thread.join()
    assert statuses == [7]


PRINTING = """
def main():
    for _ in range(int(os.environ["LINES"])):
        print("a line of the summary", "x" * 90)
        print("a line of the log", "x" * 90, file=sys.stderr)
    return 0
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("n_lines", ["1", "1000"])
class TestFullDisk:
    def test_below_the_output(self, n_lines: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("LINES", n_lines)
        with Path("/dev/full").open("w") as full:
            process = start(PRINTING, stdout=full)
        status, error = ended(process)
        assert status == 2 and "Traceback" not in error and "Exception" not in error
        assert error.splitlines()[-1].startswith("error: standard output: cannot be written (No space left on device)")

    def test_below_the_log(self, n_lines: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("LINES", n_lines)
        with Path("/dev/full").open("w") as full:
            process = start(PRINTING, stdout=subprocess.DEVNULL, stderr=full)
        assert ended(process)[0] == 0

    def test_below_both(self, n_lines: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("LINES", n_lines)
        with Path("/dev/full").open("w") as full:
            process = start(PRINTING, stdout=full, stderr=full)
        assert ended(process)[0] == 2


def test_a_reader_that_has_seen_enough_is_no_error():
    process = start("def main():\n    ready()\n    time.sleep(0.3)\n    print('more' * 9999)\n    return 0")
    process.stdout.close()
    process.stdout = None
    assert ended(process) == (0, "")


def test_without_any_output_at_all():
    program = f"{HEAD}{PRINTING}\nsys.exit(run_script(main, ''))"
    command = f'exec "{sys.executable}" -c "$PROGRAM" >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(SRC), "PROGRAM": program, "LINES": "2"}
    assert subprocess.run(["sh", "-c", command], env=environment, timeout=20, check=False).returncode == 0


def test_a_full_disk_below_something_else(capsys):
    def main() -> int:
        raise OSError(28, "No space left on device", "/tmp/cache.bin")

    assert cli.run_script(main, "") == 2
    assert capsys.readouterr().err.startswith("error: /tmp/cache.bin: cannot be written (No space left on device)")


def test_other_errors_stay_errors():
    with pytest.raises(FileNotFoundError):
        cli.run_script(lambda: Path("absent").read_text(), "")
