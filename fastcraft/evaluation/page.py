"""The report as HTML: every text is escaped, every picture is inside the file, there is no script."""

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcraft.evaluation.curves import curve_svg, short, smooth, smoothing_window
from fastcraft.evaluation.images import plain
from fastcraft.evaluation.page_style import STYLE
from fastcraft.evaluation.page_tables import (
    block,
    breakable,
    column,
    exam_table,
    facts_table,
    is_number,
    phase_table,
    safe,
)
from fastcraft.evaluation.progress import duration
from fastcraft.evaluation.scores import REWARD_SE

Pair = tuple[str, Path | None, Path | None]
"""Prompt, picture before, picture after."""
PIXEL_ART = 256
"""Pictures up to this width are embedded as they are and enlarged with hard pixel edges."""
MAX_EMBEDDED = 768
"""Longer pictures are embedded at this length, as JPEG; the originals stay in samples/."""
LONG_PROMPT = 180
FIRST_CURVES = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "samples_per_sec_per_gpu": "Samples/s per GPU",
    "peak_memory_mib": "Peak memory, MiB",
}
EXACT = ("lr", "peak_memory_mib")
"""Figures without noise, which are drawn as they are."""
NOT_CURVES = ("step", "rewards", "phase_ms", "num_samples_seen")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """Everything that the page shows."""

    title: str
    recipe_text: str
    exam_before: Mapping[str, float | None] | None
    exam_after: Mapping[str, float | None] | None
    environment: Mapping[str, Any]
    notes: Sequence[str]
    command: str
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    pairs: Sequence[Pair]
    strips: Sequence[tuple[str, Sequence[tuple[int, Path]]]]
    before_step: int
    after_step: int


def render_page(data: ReportData) -> str:
    """A whole HTML document; the policy in its head forbids scripts and anything from elsewhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    body = [
        f"<header><h1>{safe(data.title)}</h1>{_tiles(data)}{_notes(data.notes)}</header>",
        _section("Before and after", _pictures(data)),
        _section("Measured before and after", exam_table(data.exam_before or {}, data.exam_after or {})),
        _section("Rewards", _reward_curves(data.metrics)),
        _section("Training", _training_curves(data.metrics)),
        _section("On the same prompts along the way", _strips(data.strips) + _evaluation_curves(data.evaluations)),
        _section("Where a step's time goes", phase_table(data.metrics)),
        _section("How it was made", _making(data)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{safe(data.title)}</title><style>{STYLE}</style></head>\n<body><main>"
        + "\n".join(filter(None, body))
        + "</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{safe(note)}</li>" for note in notes)}</ul>' if notes else ""


def _tiles(data: ReportData) -> str:
    """The run in a handful of figures."""
    metrics = data.metrics
    if not metrics:
        return ""
    tiles = [("steps", f"{metrics[-1]['step']:,}", "")]
    if seen := column(metrics, "num_samples_seen"):
        tiles.append(("pictures made", f"{seen[-1]:,}", ""))
    totals = [value for line in metrics if is_number(value := line["rewards"].get("total"))]
    if totals:
        start, end = _ends(totals)
        tiles.append(("total reward", short(end), f"from {short(start)}"))
    if speeds := column(metrics, "samples_per_sec_per_gpu"):
        tiles.append(("samples/s per GPU", short(statistics.median(speeds)), "median"))
    if memory := column(metrics, "peak_memory_mib"):
        tiles.append(("peak memory", f"{max(memory) / 1024:.2f} GiB", ""))
    if seconds := column(metrics, "step_time_s"):
        tiles.append(("time in steps", duration(sum(seconds)), ""))
    if skipped := sum(bool(line.get("skipped")) for line in metrics):
        tiles.append(("skipped steps", str(skipped), "loss or gradient not finite"))
    cells = (f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth."""
    size = max(1, len(values) // 10)
    return statistics.fmean(values[:size]), statistics.fmean(values[-size:])


def _reward_curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    names = dict.fromkeys(name for line in metrics for name in line["rewards"])
    ordered = sorted(names, key=lambda name: name != "total")
    cards = [
        _card(
            "Total reward" if name == "total" else name, [(line["step"], line["rewards"].get(name)) for line in metrics]
        )
        for name in ordered
    ]
    return _cards(cards) + (_legend(len(metrics)) if cards else "")


def _training_curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    keys = dict.fromkeys(key for line in metrics for key, value in line.items() if is_number(value))
    others = [key for key in keys if key not in FIRST_CURVES and key not in NOT_CURVES]
    points = {key: [(line["step"], line.get(key)) for line in metrics] for key in [*FIRST_CURVES, *others]}
    content = _cards([_card(title, points[key], exact=key in EXACT) for key, title in FIRST_CURVES.items()])
    if others:
        rest = _cards([_card(key, points[key]) for key in others])
        content += f"<details><summary>Everything else that was recorded</summary>{rest}</details>"
    return content


def _evaluation_curves(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if len(evaluations) < 3:
        return ""
    names = dict.fromkeys(name for line in evaluations for name in line["evaluation"] if not name.startswith(REWARD_SE))
    cards = []
    for name in names:
        points = [(line["step"], line["evaluation"].get(name)) for line in evaluations]
        if all(value is None or is_number(value) for _, value in points):
            cards.append(_card(name, points, dots=True))
    return _cards(cards)


def _card(title: str, points: Sequence[tuple[int, Any]], *, exact: bool = False, dots: bool = False) -> str:
    values = [value if is_number(value) else None for _, value in points]
    known = [value for value in values if value is not None]
    window = 1 if exact or dots else smoothing_window(len(known))
    newest = short(smooth(known, window)[-1]) if known else ""
    svg = curve_svg([step for step, _ in points], values, label=plain(title), exact=exact, dots=dots)
    return f'<figure class="card"><figcaption><b>{breakable(title)}</b><span>{newest}</span></figcaption>{svg}</figure>'


def _cards(cards: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _legend(count: int) -> str:
    window = smoothing_window(count)
    if window == 1:
        return ""
    return f'<p class="legend">Thin: every step. Thick, and the figure above: mean over {window} steps.</p>'


def _pictures(data: ReportData) -> str:
    if not data.pairs:
        return ""
    steps = (data.before_step, data.after_step)
    labels = ("before", f"after step {steps[1]:,}" if data.metrics else "after")
    figures = []
    for prompt, *files in data.pairs:
        halves = "".join(
            f"<div>{_image(file, f'{label}: {prompt}')}<span>{label}</span></div>"
            for file, label in zip(files, labels, strict=True)
            if file is not None
        )
        figures.append(f'<figure class="pair"><div class="halves">{halves}</div>{_caption(prompt)}</figure>')
    return f'<p class="legend">Same prompt and same noise on both sides.</p><div class="pairs">{"".join(figures)}</div>'


def _strips(strips: Sequence[tuple[str, Sequence[tuple[int, Path]]]]) -> str:
    figures = []
    for prompt, pictures in strips:
        cells = "".join(
            f"<div>{_image(file, f'step {step}: {prompt}')}<span>step {step:,}</span></div>" for step, file in pictures
        )
        figures.append(f'<figure class="strip"><div class="cells">{cells}</div>{_caption(prompt)}</figure>')
    return "".join(figures)


def _caption(prompt: str) -> str:
    if len(prompt) <= LONG_PROMPT:
        return f"<figcaption>{safe(prompt)}</figcaption>"
    head, tail = prompt[:LONG_PROMPT], prompt[LONG_PROMPT:]
    cut = head.rfind(" ") if " " in head else len(head)
    head, tail = head[:cut], head[cut:] + tail
    return f"<figcaption><details><summary>{safe(head)} <em>more</em></summary>{safe(tail)}</details></figcaption>"


def _image(path: Path, text: str) -> str:
    """An ``<img>`` with its data inside."""
    from PIL import Image

    with Image.open(path) as picture:
        width, height = picture.size
        if width <= PIXEL_ART:
            kind, data, style = "png", path.read_bytes(), ' class="pixels"'
        else:
            picture.thumbnail((MAX_EMBEDDED, MAX_EMBEDDED))
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, format="JPEG", quality=90)
            kind, data, style = "jpeg", buffer.getvalue(), ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return f'<img{style} width="{width}" height="{height}" alt="{safe(text)}" src="{source}">'


def _making(data: ReportData) -> str:
    parts = []
    if data.command:
        parts.append(f"<pre>{block(data.command)}</pre>")
    if data.recipe_text:
        parts.append(f"<details><summary>Recipe</summary><pre>{block(data.recipe_text)}</pre></details>")
    if data.environment:
        parts.append(f"<details><summary>Environment</summary>{facts_table(data.environment)}</details>")
    return "".join(parts)
