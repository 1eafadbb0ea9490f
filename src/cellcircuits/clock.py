"""The times that go into result files: real ones, or fixed ones where results must be the same from run to run.

With the environment variable SOURCE_DATE_EPOCH set, which compilers, matplotlib and TeX obey too, a duration is
recorded as 0 and a moment as that of the variable. What the terminal shows, and what a run waits for, stays real.
Standard library only. Source: https://reproducible-builds.org/specs/source-date-epoch/
"""

import os
from datetime import UTC, datetime

from cellcircuits.errors import UserError

VARIABLE = "SOURCE_DATE_EPOCH"


def fixed_time() -> int | None:
    """Seconds since 1970 that SOURCE_DATE_EPOCH says, or None where it is unset or empty.

    Raises:
        UserError: it says something else.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    if not (text.isdecimal() and text.isascii() and len(text) <= 11):  # up to the year 5138
        raise UserError(f"{VARIABLE}={text}: is not a number of seconds since 1970; unset it, or set one.")
    return int(text)


def recorded_seconds(seconds: float) -> float:
    """A duration as result files record it: `seconds`, or 0 where times are fixed.

    Raises:
        UserError: see `fixed_time`.
    """
    return float(seconds) if fixed_time() is None else 0.0


def recorded_moment(timestamp: float) -> str:
    """A moment as result files record it: `timestamp` in seconds since 1970, or the fixed one; ISO 8601, UTC.

    Raises:
        UserError: see `fixed_time`.
    """
    fixed = fixed_time()
    return datetime.fromtimestamp(timestamp if fixed is None else fixed, UTC).isoformat()
