"""Tables of the report, and how any text or figure gets into its HTML."""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastcraft.evaluation.curves import short
from fastcraft.evaluation.images import plain
from fastcraft.evaluation.scores import REWARD, REWARD_SE, compare


def safe(text: Any) -> str:
    """Escaped for element content and attributes; control characters become blanks, as HTML has no form for them."""
    return escape(plain(str(text)))


def breakable(name: str) -> str:
    """`safe`, with a place to break the line after each underscore and slash."""
    return safe(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def block(text: str) -> str:
    """`safe`, line by line."""
    return "\n".join(safe(line) for line in text.splitlines())


def column(metrics: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Finite figures under ``key``, line by line."""
    return [line[key] for line in metrics if is_number(line.get(key))]


def is_number(value: Any) -> bool:
    """A finite number, no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def exam_table(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> str:
    """Metrics before, after and their difference; empty when there are none."""
    if not before and not after:
        return ""
    rows = []
    for row in compare(before, after):
        sign = "&minus;" if (row.difference or 0) < 0 else "+"
        difference = "&ndash;" if row.difference is None else f"{sign}{short(abs(row.difference))}"
        name = row.name.removeprefix(REWARD) if row.name != f"{REWARD}total" else "total reward"
        kind = " <small>reward</small>" if row.name.startswith(REWARD) and row.name != f"{REWARD}total" else ""
        cells = [_figure(row.before, row.before_se), _figure(row.after, row.after_se), difference]
        rows.append(f"<tr><th>{breakable(name)}{kind}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    sure = any(name.startswith(REWARD_SE) for name in [*before, *after])
    note = '<p class="legend">± is the standard error of the mean.</p>' if sure else ""
    head = "<tr><th></th><td>before</td><td>after</td><td>difference</td></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def _figure(value: float | None, error: float | None) -> str:
    if value is None:
        return "&ndash;"
    return short(value) + (f" <small>± {short(float(f'{error:.2g}'))}</small>" if error is not None else "")


def phase_table(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Medians of ``phase_ms`` as bars."""
    names = dict.fromkeys(name for line in metrics for name in line.get("phase_ms") or {})
    times = {name: column([line.get("phase_ms") or {} for line in metrics], name) for name in names}
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    longest = max(medians.values(), default=0.0) or 1.0
    bars = "".join(
        f'<tr><th>{safe(name)}</th><td class="bar"><i style="width:{100 * value / longest:.1f}%"></i></td>'
        f"<td>{short(value)} ms</td></tr>"
        for name, value in medians.items()
    )
    return f'<table class="bars"><tbody>{bars}</tbody></table>' if bars else ""


def facts_table(tree: Mapping[str, Any]) -> str:
    """A nested table, flattened to ``a.b`` names."""
    rows = "".join(f"<tr><th>{safe(name)}</th><td>{safe(value)}</td></tr>" for name, value in _flat(tree))
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            rows += _flat({str(index): item for index, item in enumerate(value)}, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, "unknown" if value is None else value))
    return rows
