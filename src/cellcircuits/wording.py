"""Numbers as text: for tables, terminals and papers. Standard library only."""

from collections.abc import Callable


def count(value: float) -> str:
    """`1,393,850`."""
    return f"{value:,.0f}"


def decimal(value: float, digits: int = 2) -> str:
    """`0.74`; a value that would round to zero keeps two significant digits in scientific notation."""
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def fixed(value: float) -> str:
    """`-0.001`: three decimals, for what is compared with 0."""
    return f"{round(value, 3) + 0.0:.3f}"


def percent(value: float) -> str:
    """`4.8%`; from 10% on without decimals."""
    shown = 100 * value
    return f"{shown:.0f}%" if abs(shown) >= 9.95 or shown == 0 else f"{shown:.2g}%"


def p_value(value: float) -> str:
    """`p 0.03`, `p < 0.0001`."""
    return "p < 0.0001" if value < 1e-4 else f"p {value:.2g}"


def with_interval(
    value: float | None, low: float | None, high: float | None, form: Callable[[float], str] = decimal
) -> str:
    """`0.74 (0.70 to 0.78)`; without an interval the value alone, `not defined` without a value."""
    if value is None:
        return "not defined"
    if low is None or high is None:
        return form(value)
    return f"{form(value)} ({form(low)} to {form(high)})"
