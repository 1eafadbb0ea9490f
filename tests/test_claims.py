"""Claims of several processes on one file: who gets it, and what becomes of the claims of the dead."""

import errno
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellcircuits import claims
from cellcircuits.claims import Claim, claimed, is_claimed
from cellcircuits.errors import UserError
from cellcircuits.results import HALF_WRITTEN

HERE, ELSEWHERE = claims.machine(), "another machine"
OLD = claims.EXPIRE_SECONDS + 5


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "blocks" / "block_00016.parquet"


def leave(target: Path, generation: int, content: object, age: float = 0.0) -> Path:
    """A claim that nobody holds a lock on, touched `age` seconds ago."""
    path = target.with_name(f"block_00016.claim.{generation}")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    touched = path.stat().st_mtime - age
    os.utime(path, (touched, touched))
    return path


def by(machine: str, *, is_locked: bool = True) -> dict[str, object]:
    return {"machine": machine, "host": "h", "pid": 1, "started_ns": 5, "is_locked": is_locked}


def names(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def take(target: Path) -> Claim | None:
    """What `claimed` does first, without a heartbeat and without giving back."""
    return claims._take(target)


def test_a_free_file_is_claimed_and_given_back(target: Path):
    with claimed(target) as claim:
        assert names(target) == ["block_00016.claim.0"] and claim.is_held() and is_claimed(target)
        owner = json.loads(claim.path.read_bytes())
        assert (owner["machine"], owner["pid"], owner["is_locked"]) == (HERE, os.getpid(), True)
        assert not is_claimed(target.with_name("block_00160.parquet"))
    assert names(target) == [] and not is_claimed(target)


def test_a_failed_owner_gives_back_too(target: Path):
    with pytest.raises(ZeroDivisionError), claimed(target):
        raise ZeroDivisionError
    assert names(target) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path):
    (tmp_path / "blocks").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"), claimed(tmp_path / "blocks" / "block_00016.parquet"):
        pytest.fail("claimed")


class TestWhoIsAlive:
    def test_here_an_owner_with_its_lock_however_long_it_was_not_touched(self, target: Path):
        with claimed(target) as claim:
            os.utime(claim.path, (0, 0))
            with claimed(target) as second:
                assert second is None
            assert claim.is_held()

    def test_here_a_claim_without_its_lock_is_dead_at_once(self, target: Path):
        leave(target, 0, by(HERE))
        with claimed(target) as claim:
            assert claim.path.name == "block_00016.claim.1"
        assert names(target) == []

    @pytest.mark.parametrize("age", [claims.EXPIRE_SECONDS + 60, -1e7], ids=["expired", "in the future"])
    def test_elsewhere_a_time_far_from_now_is_no_sign_of_life(self, target: Path, age: float):
        """A server's clock was set back, or the folder was copied."""
        leave(target, 0, by(ELSEWHERE), age=age)
        with claimed(target) as claim:
            assert claim.path.name == "block_00016.claim.1"

    @pytest.mark.parametrize(
        "content",
        [by(ELSEWHERE), by(HERE, is_locked=False), b"", b"{", b"\xff\xfe", b"[]", b"7", {}],
        ids=["elsewhere", "no locks", "empty", "cut off", "no text", "a list", "a number", "says nothing"],
    )
    def test_of_others_and_of_damaged_ones_the_age_decides(self, target: Path, content: object):
        leave(target, 0, content, age=claims.EXPIRE_SECONDS - 60)
        with claimed(target) as claim:
            assert claim is None
        assert names(target) == ["block_00016.claim.0"]
        leave(target, 0, content, age=OLD)
        with claimed(target) as claim:
            assert claim.is_held()
        assert names(target) == []

    def test_the_age_is_that_of_the_file_system_s_clock(self, target: Path, monkeypatch: pytest.MonkeyPatch):
        leave(target, 0, by(ELSEWHERE), age=300)
        monkeypatch.setattr(time, "time", lambda: 0.0)
        with claimed(target) as claim:
            assert claim is None
        monkeypatch.setattr(claims, "_file_system_time", lambda folder: target.parent.stat().st_mtime + 400)
        with claimed(target) as claim:
            assert claim.is_held()

    def test_the_newest_generation_counts(self, target: Path):
        leave(target, 2, by(HERE))
        leave(target, 10, by(ELSEWHERE))
        with claimed(target) as claim:
            assert claim is None
        leave(target, 10, by(ELSEWHERE), age=OLD)
        with claimed(target) as claim:
            assert claim.path.name == "block_00016.claim.11"
        assert names(target) == []

    def test_a_living_owner_of_an_older_generation_is_heard_too(self, target: Path):
        """It slept, was overruled by one that died, and is at work again."""
        leave(target, 0, by(ELSEWHERE))
        leave(target, 1, by(ELSEWHERE), age=OLD)
        with claimed(target) as claim:
            assert claim is None
        assert names(target) == ["block_00016.claim.0", "block_00016.claim.1"]

    def test_other_files_are_no_claims(self, target: Path):
        target.parent.mkdir()
        others = ["block_00016.claim.old", "block_00016.parquet", "block_000160.claim.0"]
        for name in others:
            (target.parent / name).write_text("")
        with claimed(target) as claim:
            assert claim.path.name == "block_00016.claim.0"
        assert names(target) == sorted(others)


class TestHeartbeat:
    def test_it_touches_while_the_claim_is_held_and_then_ends(self, target: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(claims, "TOUCH_EVERY_SECONDS", 0.01)
        before = set(threading.enumerate())
        with claimed(target) as claim:
            os.utime(claim.path, (0, 0))
            deadline = time.monotonic() + 10
            while claim.path.stat().st_mtime == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert claim.path.stat().st_mtime > 0
            (thread,) = set(threading.enumerate()) - before
            assert thread.daemon
            claim.path.unlink()
            time.sleep(0.05)
            assert names(target) == []  # touching does not bring it back
        assert set(threading.enumerate()) == before and names(target) == []

    def test_many_beats_fit_before_a_claim_expires(self):
        assert 10 * claims.TOUCH_EVERY_SECONDS <= claims.EXPIRE_SECONDS


class TestASleeper:
    """An owner on another machine is suspended, another process takes over, the owner wakes up."""

    @pytest.fixture
    def sleeper(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Claim]:
        with monkeypatch.context() as patch:
            patch.setattr(claims, "machine", lambda: ELSEWHERE)
            claim = take(target)
        os.utime(claim.path, (0, 0))
        yield claim
        claim.stream.close()

    def test_it_sees_that_it_was_overruled_and_leaves_everything_to_the_new_owner(self, target: Path, sleeper: Claim):
        assert sleeper.is_held()
        with claimed(target) as taker:
            assert taker.path.name == "block_00016.claim.1" and not sleeper.is_held()
            sleeper.release()
            assert taker.is_held() and names(target) == ["block_00016.claim.0", "block_00016.claim.1"]
        assert names(target) == []

    def test_it_leaves_a_later_claim_under_the_name_of_its_own(self, target: Path, sleeper: Claim):
        with claimed(target):
            pass
        with claimed(target) as later:
            assert later.path == sleeper.path and not sleeper.is_held()
            sleeper.release()
            sleeper.withdraw()
            assert later.is_held()


class TestSteps:
    """What others do between the steps of taking a claim."""

    def between(self, monkeypatch: pytest.MonkeyPatch, before=lambda: None, after=lambda claim: None):
        real = claims._make

        def make(path: Path) -> Claim | None:
            monkeypatch.setattr(claims, "_make", real)
            before()
            claim = real(path)
            after(claim)
            return claim

        monkeypatch.setattr(claims, "_make", make)

    def test_another_is_faster(self, target: Path, monkeypatch: pytest.MonkeyPatch):
        leave(target, 0, by(HERE))
        made = []
        self.between(monkeypatch, before=lambda: made.append(take(target)))
        with claimed(target) as claim:
            assert claim is None and made[0].is_held()
        made[0].release()
        assert names(target) == []

    def test_the_dead_claim_is_released_and_a_new_one_begins_below(self, target: Path, monkeypatch):
        leave(target, 0, by(HERE))
        made = []

        def others() -> None:
            take(target).release()  # took the dead one over, and was interrupted
            made.append(take(target))

        self.between(monkeypatch, before=others)
        with claimed(target) as claim:
            assert claim is None
        assert made[0].is_held() and names(target) == ["block_00016.claim.0"]
        made[0].release()

    def test_an_owner_above_releases_and_removes_the_one_just_made(self, target: Path, monkeypatch):
        self.between(monkeypatch, after=lambda claim: claim.path.unlink())
        with claimed(target) as claim:
            assert claim is None
        assert names(target) == []

    def test_the_last_claim_is_released_while_it_is_looked_at(self, target: Path, monkeypatch):
        path = leave(target, 0, by(ELSEWHERE))
        real = claims._is_alive

        def look(of: Path) -> bool:
            path.unlink(missing_ok=True)
            return real(of)

        monkeypatch.setattr(claims, "_is_alive", look)
        with claimed(target) as claim:
            assert claim.path.name == "block_00016.claim.1"


def test_a_file_system_without_locks_goes_by_age(target: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(claims.fcntl, "flock", flock)
    with claimed(target) as claim:
        assert json.loads(claim.path.read_bytes())["is_locked"] is False
        with claimed(target) as second:
            assert second is None
        os.utime(claim.path, (0, 0))
        with claimed(target) as taker:
            assert taker.is_held() and not claim.is_held()


def test_measuring_the_time_leaves_nothing_that_is_not_removed_later(target: Path, monkeypatch: pytest.MonkeyPatch):
    target.parent.mkdir()
    real, made = claims.tempfile.NamedTemporaryFile, []

    def recorded(**where: object):
        made.append(real(**where))
        return made[-1]

    monkeypatch.setattr(claims.tempfile, "NamedTemporaryFile", recorded)
    assert claims._file_system_time(target.parent) == pytest.approx(time.time(), abs=60)
    assert HALF_WRITTEN.fullmatch(Path(made[0].name).name) and names(target) == []


def test_many_at_once_are_never_two_inside(target: Path):
    """Threads that take, give back, and die with a claim: each opens its own files, as processes do."""
    inside, worst, n_taken = [], [], []
    lock, barrier, deadline = threading.Lock(), threading.Barrier(6), time.monotonic() + 30

    def work(seed: int) -> None:
        dice = random.Random(seed)
        barrier.wait()
        while len(n_taken) < 100 and time.monotonic() < deadline:
            claim = take(target)
            if claim is None:
                continue
            with lock:
                inside.append(seed)
                worst.append(len(inside))
                n_taken.append(seed)
            time.sleep(dice.random() / 2000)
            with lock:
                inside.remove(seed)
            if dice.random() < 0.3:
                claim.stream.close()  # killed: the lock is gone, the file stays
            else:
                claim.release()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(n_taken) >= 100 and max(worst) == 1
    with claimed(target) as claim:
        assert claim is not None
    assert names(target) == []
