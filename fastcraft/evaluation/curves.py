"""Curves as inline SVG: thin raw line, thick smoothed one; colours come from the page's style sheet."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
MAX_DRAWN = 500
"""Points of a line; of more, each stretch keeps its lowest and highest."""
OUTLIER_SPANS = 1.5
"""A frame holds the 2nd to 98th percentile and this many of its spans on either side; what lies beyond is clamped."""

Point = tuple[int, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The rectangle of figures that a plot shows."""

    first: float
    last: float
    low: float
    high: float

    def place(self, step: float, value: float) -> str:
        """``"x,y"`` in SVG units; a value outside is put on the border."""
        x = LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)
        value = min(max(value, self.low), self.high)
        y = TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"


def smoothing_window(count: int) -> int:
    """Steps that one point of the thick line averages: about a tenth of the run, odd; 1 below ten points."""
    return 2 * max(1, count // 20) + 1 if count >= 10 else 1


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over ``window`` values centred on each; near the ends over those that exist."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half, count = window // 2, len(values)
    ranges = ((max(0, i - half), min(count, i + half + 1)) for i in range(count))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ranges]


def curve_svg(
    steps: Sequence[int], values: Sequence[float | None], *, label: str, exact: bool = False, dots: bool = False
) -> str:
    """One plot.

    Args:
        steps: N ascending step numbers.
        values: N figures; None or a figure that is not finite leaves a gap.
        label: names the plot to a screen reader.
        exact: figures without noise: no smoothing.
        dots: mark each point; for few figures, which are not smoothed either.

    Returns:
        An ``<svg>``, or a paragraph that says that there is nothing to draw.
    """
    pairs = zip(steps, values, strict=True)
    points = [(step, float(value)) for step, value in pairs if value is not None and math.isfinite(value)]
    if not points:
        return '<p class="empty">no finite value</p>'
    frame = make_frame(points)
    numbers = [value for _, value in points]
    window = 1 if dots or exact else smoothing_window(len(points))
    text = f"{label} from {short(numbers[0])} at step {points[0][0]} to {short(numbers[-1])} at step {points[-1][0]}"
    parts = [
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(text)}">',
        _axes(frame),
        *(_line(run, frame, "raw" if window > 1 else "smooth") for run in _runs(points, steps)),
    ]
    if window > 1:
        tamed = [min(max(value, frame.low), frame.high) for value in numbers]
        averaged = [(step, value) for (step, _), value in zip(points, smooth(tamed, window), strict=True)]
        parts += [_line(run, frame, "smooth") for run in _runs(averaged, steps)]
    if dots or len(points) == 1:
        for step, value in points:
            x, y = frame.place(step, value).split(",")
            parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>')
    outside = sum(not frame.low <= value <= frame.high for value in numbers)
    if outside:
        parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{TOP + 8}" text-anchor="end">{outside} outside</text>')
    return "".join([*parts, "</svg>"])


def make_frame(points: Sequence[Point]) -> Frame:
    """Room for the points; single spikes do not flatten the rest."""
    values = sorted(value for _, value in points)
    low, high = values[0], values[-1]
    if len(values) >= 20:
        inner_low, inner_high = values[len(values) // 50], values[-1 - len(values) // 50]
        room = OUTLIER_SPANS * (inner_high - inner_low)
        if room > 0:
            low, high = max(low, inner_low - room), min(high, inner_high + room)
    pad = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    first, last = points[0][0], points[-1][0]
    if first == last:
        first, last = first - 1, last + 1
    return Frame(first=first, last=last, low=low - pad, high=high + pad)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round figures inside [low, high], about ``count`` of them: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(value: float) -> str:
    """Four significant digits, exponents without padding: ``0.7142``, ``1e-6``, ``12,340``."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e7):
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _axes(frame: Frame) -> str:
    parts = []
    for value in nice_ticks(frame.low, frame.high, 4):
        y = frame.place(frame.first, value).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        label = "0" if abs(value) < 1e-9 * (frame.high - frame.low) else short(value)
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{float(y) + 3.5:.1f}" text-anchor="end">{label}</text>')
    for step in nice_ticks(frame.first, frame.last, 4):
        if step == int(step):
            x = frame.place(step, frame.low).split(",")[0]
            parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{int(step):,}</text>')
    return "".join(parts)


def _line(points: Sequence[Point], frame: Frame, style: str) -> str:
    thin = _thinned(points)
    return f'<polyline class="{style}" points="{" ".join(frame.place(*point) for point in thin)}"/>'


def _runs(points: Sequence[Point], steps: Sequence[int]) -> list[list[Point]]:
    """Stretches of points between which no recorded step is missing."""
    runs: list[list[Point]] = []
    for point in points:
        if runs and bisect.bisect_left(steps, point[0]) - bisect.bisect_left(steps, runs[-1][-1][0]) == 1:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= MAX_DRAWN:
        return list(points)
    size = math.ceil(2 * len(points) / MAX_DRAWN)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        lowest, highest = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({lowest, highest})
    return kept
