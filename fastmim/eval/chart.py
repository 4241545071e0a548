"""A line chart with nothing but Pillow, so that every run can draw its curves."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_FINE = 3  # drawn so many times larger, then reduced: smooth lines
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2")
_INK, _PALE, _GRID = "#222222", "#666666", "#e4e4e4"


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    size: tuple[int, int] = (900, 540),
) -> Image.Image:
    """Draw curves over common axes.

    Args:
        series: Name for the legend to (x, y), two sequences of one length. Values that are not
            finite (with ``log_y``: not positive either) leave a gap; a point alone is a dot. Of
            very many points the extremes of each stretch are drawn.
        title: Above the chart.
        x_label: Below the horizontal axis; with its unit.
        y_label: Along the vertical axis; with its unit.
        log_y: Logarithmic vertical axis.
        size: (width, height) in pixels, at least (240, 160).

    Raises:
        ValueError: If x and y of a series differ in length, or ``size`` is too small.
    """
    if size[0] < 240 or size[1] < 160:
        raise ValueError(f"line_chart: expected a size of at least (240, 160), got {size}")
    curves = {name: _clean(name, x, y, log_y) for name, (x, y) in series.items()}
    xs = np.concatenate([x[np.isfinite(y)] for x, y in curves.values()] or [np.empty(0)])
    ys = np.concatenate([y[np.isfinite(y)] for _, y in curves.values()] or [np.empty(0)])
    x_low, x_high = _limits(xs)
    y_low, y_high = _limits(ys, margin=0.04)

    width, height = size[0] * _FINE, size[1] * _FINE
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font, big = (ImageFont.load_default(points * _FINE) for points in (13, 17))
    y_ticks = (_log_ticks if log_y else _ticks)(y_low, y_high, max(2, size[1] // 70))
    widest = max((font.getlength(text) for _, text in y_ticks), default=0)
    left, right = round(widest) + 46 * _FINE, width - 24 * _FINE
    count = size[0] // 90
    x_ticks = _ticks(x_low, x_high, count)
    while sum(font.getlength(text) + 20 * _FINE for _, text in x_ticks) > right - left:
        count -= 1
        x_ticks = _ticks(x_low, x_high, count) if count else []
    draw.text((left, 24 * _FINE), title, fill=_INK, font=big, anchor="lm")
    top = _legend(draw, font, list(curves), left, right, 52 * _FINE) + 22 * _FINE
    bottom = height - 58 * _FINE

    def across(x):
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def up(y):
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    for value, text in y_ticks:
        draw.line([(left, up(value)), (right, up(value))], fill=_GRID, width=_FINE)
        draw.text((left - 8 * _FINE, up(value)), text, fill=_PALE, font=font, anchor="rm")
    for value, text in x_ticks:
        draw.line([(across(value), top), (across(value), bottom)], fill=_GRID, width=_FINE)
        draw.text((across(value), bottom + 8 * _FINE), text, fill=_PALE, font=font, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=_PALE, width=_FINE)
    for i, (x, y) in enumerate(curves.values()):
        for piece in _pieces(across(x), up(y), limit=size[0]):
            _stroke(draw, piece, _COLOURS[i % len(_COLOURS)])
    middle = ((left + right) / 2, (top + bottom) / 2)
    if not len(ys):
        draw.text(middle, "no data", fill=_PALE, font=big, anchor="mm")
    draw.text((middle[0], height - 18 * _FINE), x_label, fill=_INK, font=font, anchor="mm")
    _write_upward(image, y_label, font, 16 * _FINE, middle[1])
    return image.resize(size, Image.Resampling.LANCZOS)


def _clean(name: str, x: Sequence[float], y: Sequence[float], log_y: bool) -> tuple:
    """Float64 arrays; y is NaN where the point cannot be drawn, and log10 of the value if asked."""
    x, y = np.array(x, dtype=np.float64), np.array(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"line_chart: expected x and y of one length for '{name}', got {x.shape} and {y.shape}"
        )
    good = (np.abs(x) < 1e150) & (np.abs(y) < 1e150)  # so that nothing below overflows
    if log_y:
        good &= y > 0
        y = np.log10(y, where=good, out=np.full_like(y, np.nan))
    return np.where(good, x, 0.0), np.where(good, y, np.nan)


def _limits(values: np.ndarray, margin: float = 0.0) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # constant but for rounding
        pad = 0.1 * abs(low) or 0.5
    else:
        pad = margin * (high - low)
    return low - pad, high + pad


def _ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """About ``count`` round values in [low, high], 1, 2 or 5 times a power of ten apart."""
    magnitude = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * count >= (high - low))
    steps = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    values = [i * step for i in steps]
    exponent = math.floor(math.log10(step) + 1e-9)
    largest = max(abs(low), abs(high))
    if 1e-5 < largest < 1e7 and exponent >= -6:
        return [(v, f"{v:,.{max(0, -exponent)}f}") for v in values]
    digits = max(0, math.floor(math.log10(largest)) - exponent)
    return [(v, f"{v:.{digits}e}" if v else "0") for v in values]


def _log_ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """Round values whose log10 is in [low, high]: powers of ten, or 1, 2, 5 times them."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    powers = powers[:: max(1, math.ceil(len(powers) / (2 * count)))]
    for factors in ((1,), (1, 2, 5)):
        values = [math.log10(f) + p for p in powers for f in factors]
        values = [v for v in values if low <= v <= high]
        if len(values) >= 3:
            return [(v, f"{10.0**v:.6g}") for v in values]
    return [(math.log10(float(v)), text) for v, text in _ticks(10.0**low, 10.0**high, count)]


def _pieces(x: np.ndarray, y: np.ndarray, limit: int) -> list[np.ndarray]:
    """Runs of drawable points, (n, 2) each, of at most about ``2 * limit`` points."""
    good = np.flatnonzero(np.isfinite(y))
    runs = np.split(good, np.flatnonzero(np.diff(good) > 1) + 1) if len(good) else []
    return [np.stack([x, y], axis=1)[_extremes(y, run, limit)] for run in runs]


def _extremes(y: np.ndarray, run: np.ndarray, limit: int) -> np.ndarray:
    """Of each of ``limit`` stretches of a run, the lowest and the highest point, and the ends."""
    if len(run) <= 4 * limit:
        return run
    kept = {int(run[0]), int(run[-1])}
    for stretch in np.array_split(run, limit):
        kept |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    return np.array(sorted(kept))


def _stroke(draw: ImageDraw.ImageDraw, points: np.ndarray, colour: str) -> None:
    if len(points) == 1:
        draw.circle(tuple(points[0]), 3.5 * _FINE, fill=colour)
    else:
        draw.line([tuple(point) for point in points], fill=colour, width=2 * _FINE, joint="curve")


def _legend(draw, font, names: list[str], left: int, right: int, y: int) -> int:
    """Draw the legend's rows from height ``y`` on; returns the height of the last."""
    x = left
    for i, name in enumerate(names):
        needed = font.getlength(name) + 50 * _FINE
        if x > left and x + needed > right:
            x, y = left, y + 20 * _FINE
        draw.line([(x, y), (x + 22 * _FINE, y)], fill=_COLOURS[i % len(_COLOURS)], width=3 * _FINE)
        draw.text((x + 29 * _FINE, y), name, fill=_INK, font=font, anchor="lm")
        x += needed
    return y


def _write_upward(image: Image.Image, text: str, font, x: float, y: float) -> None:
    """Write ``text`` turned left, its middle at (x, y)."""
    label = Image.new("L", (math.ceil(font.getlength(text)) + 2, round(1.6 * font.size)))
    ImageDraw.Draw(label).text((0, label.height / 2), text, fill=255, font=font, anchor="lm")
    label = label.transpose(Image.Transpose.ROTATE_90)
    image.paste(_INK, (round(x - label.width / 2), round(y - label.height / 2)), label)
