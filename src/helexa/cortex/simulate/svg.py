"""Charts as SVG text, written by hand: a page of frames, each with axes and lines or bars. No library is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Final

# Okabe and Ito's palette: told apart by everybody.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH: Final = 760
HEIGHT: Final = 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 20, 40, 52


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Bar:
    """value is drawn filled, most as a mark above it; both as shares of 1."""

    name: str
    value: float
    most: float


def page(charts: Sequence[str]) -> str:
    inside = "".join(f'<g transform="translate(0,{i * HEIGHT})">{chart}</g>\n' for i, chart in enumerate(charts))
    height = HEIGHT * len(charts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n{inside}</svg>\n'
    )


def lines(
    title: str, x_label: str, y_label: str, drawn: Sequence[Line], *, log_x: bool = False, log_y: bool = False
) -> str:
    """Points that a logarithmic axis has no place for (0 and below) are left out."""
    kept = [Line(d.name, [(x, y) for x, y in d.points if (x > 0 or not log_x) and (y > 0 or not log_y)]) for d in drawn]
    xs = [x for d in kept for x, _ in d.points] or [1.0]
    ys = [y for d in kept for _, y in d.points] or [1.0]
    x_at, x_ticks = _axis(xs, log_x, _LEFT, WIDTH - _RIGHT)
    y_at, y_ticks = _axis(ys, log_y, HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(title, x_label, y_label)]
    parts += [_tick_x(x_at(x), _figure(x)) for x in x_ticks]
    parts += [_tick_y(y_at(y), _figure(y)) for y in y_ticks]
    for number, line in enumerate(kept):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = _TOP + 16 + 16 * number
        parts.append(f'<rect x="{_LEFT + 10}" y="{y - 8}" width="14" height="3" fill="{colour}"/>')
        parts.append(f'<text x="{_LEFT + 30}" y="{y - 2}">{escape(line.name)}</text>')
    return "\n".join(parts)


def bars(title: str, y_label: str, drawn: Sequence[Bar]) -> str:
    """Shares of 1, one beside the other; names turn where there are many."""
    y_at, ticks = _axis([0.0, 1.0], False, HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(title, "", y_label), *(_tick_y(y_at(y), f"{y:.0%}") for y in ticks)]
    step = (WIDTH - _LEFT - _RIGHT) / max(len(drawn), 1)
    for number, bar in enumerate(drawn):
        x, width = _LEFT + step * (number + 0.15), step * 0.7
        y, most = y_at(bar.value), y_at(bar.most)
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT - _BOTTOM - y:.1f}" '
            f'fill="{COLOURS[0]}"><title>{escape(bar.name)}: mean {bar.value:.0%}, most {bar.most:.0%}</title></rect>'
        )
        parts.append(f'<rect x="{x:.1f}" y="{most:.1f}" width="{width:.1f}" height="2" fill="{COLOURS[1]}"/>')
        middle, under = x + width / 2, HEIGHT - _BOTTOM + 14
        if len(drawn) <= 12:
            parts.append(f'<text x="{middle:.1f}" y="{under}" text-anchor="middle">{escape(bar.name)}</text>')
        else:
            turn = f'transform="rotate(-60 {middle:.1f} {under})" text-anchor="end" font-size="9"'
            parts.append(f'<text x="{middle:.1f}" y="{under}" {turn}>{escape(bar.name)}</text>')
    return "\n".join(parts)


def _axis(
    values: Sequence[float], log: bool, begin: float, end: float
) -> tuple[Callable[[float], float], Sequence[float]]:
    """From a value to its place, and where ticks stand."""
    low, high = min(values), max(values)
    if log:
        first, last = floor(log10(low)), ceil(log10(high))
        last = max(last, first + 1)
        return (
            lambda v: begin + (end - begin) * (log10(v) - first) / (last - first),
            [10.0**power for power in range(first, last + 1)],
        )
    low = min(low, 0.0)
    step = _step(high - low)
    top = max(step * ceil(high / step), low + step)
    count = round((top - low) / step)
    return lambda v: begin + (end - begin) * (v - low) / (top - low), [low + step * i for i in range(count + 1)]


def _step(span: float) -> float:
    """A round one, for some five ticks."""
    rough = max(span, 1e-9) / 5
    unit = 10.0 ** floor(log10(rough))
    return next(unit * times for times in (1, 2, 2.5, 5, 10) if unit * times >= rough)


def _frame(title: str, x_label: str, y_label: str) -> str:
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    return (
        f'<text x="{_LEFT}" y="24" font-size="14" font-weight="bold">{escape(title)}</text>'
        f'<path d="M{_LEFT} {_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}" fill="none" stroke="#444"/>'
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(y_label)}</text>'
    )


def _tick_x(x: float, text: str) -> str:
    y = HEIGHT - _BOTTOM
    return f'<path d="M{x:.1f} {y}v5" stroke="#444"/><text x="{x:.1f}" y="{y + 18}" text-anchor="middle">{text}</text>'


def _tick_y(y: float, text: str) -> str:
    return (
        f'<path d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.4g}"
