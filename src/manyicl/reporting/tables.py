"""Tables of a report: raw values for CSV, and the same values as text. Numbers are written by these functions alone.

Table(columns=(Column("method", is_number=False), Column("score", digits=1)), rows=[("base", 24.3125)])
shown     base | 24.3                     downloaded     method,score / base,24.3125
"""

import csv
import io
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A column's name, and how its numbers are shown.

    Attributes:
        digits: Digits after the point of a number that is no integer.
        is_signed: Whether a plus stands before numbers above zero.
    """

    name: str
    is_number: bool = True
    digits: int = 1
    is_signed: bool = False

    def show(self, value: Value) -> str:
        """A value as text; a dash for one that is not there."""
        if value is None:
            return "–"
        if isinstance(value, str):
            return value
        if isinstance(value, int):
            return show_number(value, 0, is_signed=self.is_signed)
        return show_number(value, self.digits, is_signed=self.is_signed)


@dataclass(frozen=True)
class Table:
    """Rows of values under columns.

    Attributes:
        best: Places (row, column) of the best values, which are marked.
    """

    columns: tuple[Column, ...]
    rows: Sequence[tuple[Value, ...]]
    best: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def csv(self) -> str:
        """The table as CSV (RFC 4180), numbers not rounded."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\r\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows([["" if value is None else value for value in row] for row in self.rows])
        return stream.getvalue()

    def csv_address(self) -> str:
        """The CSV as an address of its own, so that a link downloads it from a page that is offline."""
        return "data:text/csv;charset=utf-8," + urllib.parse.quote(self.csv())


def show_number(value: float, digits: int = 1, *, is_signed: bool = False) -> str:
    """A number with a real minus, thousands parted by commas and, if signed, a plus; what is rounded to zero has no sign."""
    text = f"{abs(value):,.{digits}f}"
    if not text.strip("0.,"):
        return text
    return ("−" if value < 0 else "+" if is_signed else "") + text


def show_interval(estimate: Mapping[str, Any], digits: int = 1, *, is_signed: bool = True) -> str:
    """The ends of an interval: −0.3 to +4.1."""
    ends = (show_number(estimate[end], digits, is_signed=is_signed) for end in ("low", "high"))
    return " to ".join(ends)


def show_estimate(estimate: Mapping[str, Any], digits: int = 1, *, is_signed: bool = True) -> str:
    """A value with its interval: +1.9 (−0.3 to +4.1)."""
    value = show_number(estimate["value"], digits, is_signed=is_signed)
    return f"{value} ({show_interval(estimate, digits, is_signed=is_signed)})"


def show_bytes(count: int) -> str:
    """Bytes in GiB, or MiB below one; a dash where nothing was measured."""
    if not count:
        return "–"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def show_seconds(seconds: float) -> str:
    """A time in the unit that fits it: 40 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count_words(count: int, word: str) -> str:
    """A number of things: 1 model, 3 models."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def join_words(words: Sequence[str]) -> str:
    """Words as a sentence has them: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
