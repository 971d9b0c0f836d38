"""Charts as inline SVG, drawn from numbers: lines with bands, points with whiskers, rows of dots.

In: series of points in the units of their axes. Out: markup that needs no script, style sheet colours by class (`m0` to `m11`,
light and dark), and dashes and markers that tell series apart without colour. All text is escaped.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

NUM_STYLES = 12
_MARKERS: tuple[Callable[[float], str], ...] = (
    lambda r: f"M{-r},0a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 {-2 * r},0Z",  # circle
    lambda r: f"M{-r},{-r}H{r}V{r}H{-r}Z",  # square
    lambda r: f"M0,{-1.3 * r:.1f}L{1.2 * r:.1f},{r}H{-1.2 * r:.1f}Z",  # triangle
    lambda r: f"M0,{-1.4 * r:.1f}L{1.4 * r:.1f},0L0,{1.4 * r:.1f}L{-1.4 * r:.1f},0Z",  # diamond
    lambda r: f"M0,{1.3 * r:.1f}L{1.2 * r:.1f},{-r}H{-1.2 * r:.1f}Z",  # triangle, point down
    lambda r: f"M{-r},{-r}L{r},{r}M{r},{-r}L{-r},{r}",  # cross
    lambda r: f"M{-1.3 * r:.1f},0H{1.3 * r:.1f}M0,{-1.3 * r:.1f}V{1.3 * r:.1f}",  # plus
)


@dataclass(frozen=True)
class Point:
    """A point, the interval of its height and, where there is one, of its place from left to right.

    Attributes:
        note: What a pointer over it reads.
        is_large: Whether its marker is drawn larger.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    note: str = ""
    is_large: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one method.

    Attributes:
        name: Names the series for the legend.
        style: Number of its colour, dash and marker.
        is_main: Whether it is drawn stronger than others.
    """

    name: str
    style: int
    points: Sequence[Point]
    is_main: bool = False


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high` with ticks; zero is a line of its own if asked for."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    marks_zero: bool = False


@dataclass(frozen=True)
class Frame:
    """A drawing's size, in pixels where it is not scaled."""

    width: int = 640
    height: int = 360
    left: int = 58
    right: int = 16
    top: int = 12
    bottom: int = 50


SMALL = Frame(width=330, height=240, left=48, right=12, top=10, bottom=46)


@dataclass(frozen=True)
class Names:
    """What a screen reader says of a chart: `key` is its id on the page, then a title and a description."""

    key: str
    title: str
    description: str


def number_axis(label: str, values: Iterable[float | None], *, marks_zero: bool = False, num_ticks: int = 5) -> Axis:
    """A scale that holds all values, with round ticks."""
    known = [value for value in values if value is not None and math.isfinite(value)] + ([0.0] if marks_zero else [])
    low, high = min(known, default=0.0), max(known, default=1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough - 1e-12)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple((number * step, _tick(number * step, digits)) for number in range(first, last + 1))
    return Axis(label, first * step, last * step, ticks, marks_zero)


def _tick(value: float, digits: int) -> str:
    if value and abs(value) >= 10_000 and not digits:
        return f"{value / 1000:,.0f}k".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def line_chart(
    series: Sequence[Series], x: Axis, y: Axis, names: Names, *, frame: Frame = Frame(), has_bands: bool = True
) -> Markup:
    """Series as lines with markers; intervals as bands, or as whiskers."""
    place_x = _scale(x, frame.left, frame.width - frame.right)
    place_y = _scale(y, frame.height - frame.bottom, frame.top)
    parts = [_grid(x, y, frame)]
    # What is drawn last lies on top: the series that matters most.
    for each in sorted(series, key=lambda each: each.is_main):
        placed = [(place_x(point.x), place_y(point.y)) for point in each.points]
        marks = [Markup("")]
        if has_bands:
            marks.append(_band(each.points, place_x, place_y))
        else:
            marks += [_whiskers(point, place_x, place_y) for point in each.points]
        if len(placed) > 1:
            marks.append(Markup('<path class="line" d="M{}"/>').format("L".join(f"{px:.1f},{py:.1f}" for px, py in placed)))
        radius = 4.5 if each.is_main else 3.6
        marks += [
            _marker(each.style, px, py, radius * (1.5 if point.is_large else 1.0), point.note)
            for point, (px, py) in zip(each.points, placed, strict=True)
        ]
        parts.append(_group(each.name, each.style, marks, is_main=each.is_main))
    return _svg(parts, frame.width, frame.height, names, "chart")


@dataclass(frozen=True)
class DotRow:
    """A line of a dot chart: a label, and one point per series, whose `x` is its value."""

    label: str
    dots: Sequence[tuple[str, int, Point]]
    is_heading: bool = False


def dot_chart(rows: Sequence[DotRow], x: Axis, names: Names) -> Markup:
    """Rows with a dot and a whisker for each series, labels to the left; points are read by `x`, `x_low` and `x_high`."""
    width, left, right, top, bottom = 640, 216, 18, 8, 46
    heights = [24 if row.is_heading else 13 + 13 * max(1, len(row.dots)) for row in rows]
    frame = Frame(width=width, height=top + sum(heights) + bottom, left=left, right=right, top=top, bottom=bottom)
    place_x = _scale(x, left, width - right)
    parts, upper = [_grid(x, None, frame)], float(top)
    for row, height in zip(rows, heights, strict=True):
        middle = upper + height / 2 + 4.5
        kind = "heading" if row.is_heading else "row-label"
        label_x, anchor = (8, "start") if row.is_heading else (left - 12, "end")
        parts.append(_text(label_x, middle, row.label, anchor, kind))
        for number, (name, style, point) in enumerate(row.dots):
            y = upper + height / 2 + 13 * (number - (len(row.dots) - 1) / 2)
            marks = [_marker(style, place_x(point.x), y, 4.5, point.note)]
            if point.x_low is not None and point.x_high is not None:
                marks.insert(0, _line(place_x(point.x_low), y, place_x(point.x_high), y, "whisker"))
            parts.append(_group(name, style, marks))
        upper += height
    return _svg(parts, width, frame.height, names, "chart dots")


def swatch(style: int) -> Markup:
    """A short line with a series' dash and marker, for legends."""
    parts = [_group("", style, [_line(1, 8, 31, 8, "line"), _marker(style, 16, 8, 4, "")])]
    return Markup('<svg class="swatch" viewBox="0 0 32 16" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def _scale(axis: Axis, start: float, stop: float) -> Callable[[float], float]:
    span = axis.high - axis.low or 1.0
    return lambda value: start + (stop - start) * (value - axis.low) / span


def _svg(parts: Sequence[Markup], width: float, height: float, names: Names, kind: str) -> Markup:
    return Markup(
        '<svg class="{kind}" viewBox="0 0 {width} {height:.0f}" role="img" aria-labelledby="{key}-title {key}-description">'
        '<title id="{key}-title">{title}</title><desc id="{key}-description">{description}</desc>{parts}</svg>'
    ).format(
        kind=kind,
        width=width,
        height=height,
        key=names.key,
        title=names.title,
        description=names.description,
        parts=Markup("").join(parts),
    )


def _group(name: str, style: int, marks: Sequence[Markup], *, is_main: bool = False) -> Markup:
    return Markup('<g class="series m{}{}" data-method="{}">{}</g>').format(
        style % NUM_STYLES, " main" if is_main else "", name, Markup("").join(marks)
    )


def _grid(x: Axis, y: Axis | None, frame: Frame) -> Markup:
    """Grid lines, ticks and the names of the axes."""
    right, floor = frame.width - frame.right, frame.height - frame.bottom
    place_x = _scale(x, frame.left, right)
    parts = []
    for value, text in x.ticks:
        px = place_x(value)
        kind = "zero" if x.marks_zero and abs(value) < 1e-12 else "grid"
        parts += [_line(px, frame.top, px, floor, kind), _text(px, floor + 18, text, "middle", "tick")]
    if y is not None:
        place_y = _scale(y, floor, frame.top)
        for value, text in y.ticks:
            py = place_y(value)
            kind = "zero" if y.marks_zero and abs(value) < 1e-12 else "grid"
            parts += [_line(frame.left, py, right, py, kind), _text(frame.left - 8, py + 4.5, text, "end", "tick")]
        middle = (frame.top + floor) / 2
        parts.append(
            Markup('<text class="axis" text-anchor="middle" transform="translate(14 {:.1f}) rotate(-90)">{}</text>').format(
                middle, y.label
            )
        )
    parts.append(_text((frame.left + right) / 2, frame.height - 10, x.label, "middle", "axis"))
    return Markup("").join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<path class="{}" d="M{:.1f},{:.1f}L{:.1f},{:.1f}"/>').format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _marker(style: int, x: float, y: float, radius: float, note: str) -> Markup:
    shape = _MARKERS[style % len(_MARKERS)](round(radius, 1))
    tip = Markup("<title>{}</title>").format(note) if note else Markup("")
    return Markup('<path class="marker" transform="translate({:.1f} {:.1f})" d="{}">{}</path>').format(x, y, Markup(shape), tip)


def _band(points: Sequence[Point], place_x: Callable[[float], float], place_y: Callable[[float], float]) -> Markup:
    """The area between the ends of the intervals; nothing for fewer than two points that have one."""
    known = [(place_x(point.x), point.low, point.high) for point in points if point.low is not None and point.high is not None]
    if len(known) < 2:
        return Markup("")
    upper = [f"{px:.1f},{place_y(high):.1f}" for px, _, high in known]
    lower = [f"{px:.1f},{place_y(low):.1f}" for px, low, _ in reversed(known)]
    return Markup('<path class="band" d="M{}Z"/>').format("L".join(upper + lower))


def _whiskers(point: Point, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> Markup:
    px, py = place_x(point.x), place_y(point.y)
    parts = []
    if point.low is not None and point.high is not None:
        parts.append(_line(px, place_y(point.low), px, place_y(point.high), "whisker"))
    if point.x_low is not None and point.x_high is not None:
        parts.append(_line(place_x(point.x_low), py, place_x(point.x_high), py, "whisker"))
    return Markup("").join(parts)
