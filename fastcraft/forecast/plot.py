"""Memory and time against depth, drawn for a paper: one line per policy, the predicted memory dotted over it."""

from collections.abc import Sequence
from pathlib import Path

from fastcraft.forecast.profile import Row

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)  # told apart by colour-blind eyes
MAX_TICKS = 8
"""Up to so many depths each has a tick of its own."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Write a picture; its kind follows the ending (.png, .pdf, .svg).

    Args:
        rows: of any depths and policies; policies keep their order.
        path: the file.
        title: above the left half.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, MaxNLocator

    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(7.2, 2.9), layout="constrained")
    for number, policy in enumerate(dict.fromkeys(row.policy for row in rows)):
        of_policy = sorted((row for row in rows if row.policy == policy), key=lambda row: row.depth)
        depths = [row.depth for row in of_policy]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        memory.plot(depths, [row.allocator_peak_mib or row.peak_mib for row in of_policy], label=policy, **style)
        memory.plot(
            depths,
            [row.predicted_peak_mib for row in of_policy],
            color="black",
            linestyle=(0, (2, 3)),
            linewidth=0.9,
            zorder=3,
        )
        time.plot(depths, [row.seconds for row in of_policy], label=policy, **style)
    memory.set_ylabel("peak above weights (MiB)", fontsize=8)
    time.set_ylabel("forward + backward (s)", fontsize=8)
    depths = sorted({row.depth for row in rows})
    for axes in (memory, time):
        axes.set_xlabel("denoising steps with gradient (K)", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(FixedLocator(depths) if len(depths) <= MAX_TICKS else MaxNLocator(integer=True))
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    handles, labels = memory.get_legend_handles_labels()
    handles.append(Line2D([], [], color="black", linestyle=(0, (2, 3)), linewidth=0.9))
    figure.legend(
        handles, [*labels, "predicted"], loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )
    memory.set_title(title, fontsize=9, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    pyplot.close(figure)
