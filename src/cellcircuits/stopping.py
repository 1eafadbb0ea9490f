"""Being told to stop: SIGINT (Ctrl-C), SIGTERM (a cluster's end of a job) and SIGHUP (a closed terminal) alike.

Each raises `Stopped`, a KeyboardInterrupt, in the main thread, so that whoever saves on Ctrl-C saves on all of them.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEAF_SECONDS = 5.0  # a second signal within these would cut short what the first one has saved
REPEAT_SECONDS = 0.1


class Stopped(KeyboardInterrupt):
    """A signal that asks to stop; `number` says which."""

    def __init__(self, number: int) -> None:
        """Keep the number."""
        super().__init__()
        self.number = number


class StopSignals:
    """What has come so far: `number` of the last signal that was answered, None before."""

    def __init__(self) -> None:
        """Nothing has come."""
        self.number: int | None = None
        self._answered = float("-inf")

    def stop(self, number: int, _frame: FrameType | None = None) -> None:
        """Answer a signal.

        Raises:
            Stopped: always, but for one that follows another within seconds.
        """
        if time.monotonic() - self._answered > DEAF_SECONDS:
            self.number, self._answered = number, time.monotonic()
            raise Stopped(number)

    def repeat(self, lost: Any) -> None:
        """Send a signal again that came inside a finalizer, where Python drops what is raised (an unraisablehook)."""
        if not isinstance(lost.exc_value, Stopped):
            if self.number is None:  # else what a stop has cut short, such as an archive, complains of it
                sys.__unraisablehook__(lost)
            return
        self._answered = float("-inf")
        # not at once: it would be raised, and dropped, in here
        threading.Timer(REPEAT_SECONDS, os.kill, (os.getpid(), lost.exc_value.number)).start()


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Inside the `with`, each of SIGNALS raises `Stopped`, unless it is ignored, as nohup does with SIGHUP.

    In another thread than the main one nothing changes: Python delivers no signals there.
    """
    received = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    there = {number: signal.getsignal(number) for number in SIGNALS}
    kept = {number: handler for number, handler in there.items() if handler not in (signal.SIG_IGN, None)}
    hook = sys.unraisablehook
    try:
        sys.unraisablehook = received.repeat
        for number in kept:
            signal.signal(number, received.stop)
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
