"""The picture of a run: one small panel a number, over the rounds, with its 95 % interval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, GREY, INK = "#2f6db5", "#d9822b", "#3a9a6b", "#b8405e", "#9aa0a6", "#33383d"

STYLE = {
    "font": {"fontsize": 10, "color": INK},
    "title": {"fontsize": 12, "fontweight": "bold", "color": INK, "loc": "left", "pad": 22},
}


def draw(rounds: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw summaries of rounds (see `metrics.summarize`) into a PNG file at `path`, atomically.

    Points are means over the held-out prompts, bars and bands their intervals. A number that no round has
    gets no panel.
    """
    judge, unit = rounds[0]["win_rate_by"], rounds[0]["length_unit"]
    panels = (
        ("gold_mean", "Gold score", "what we want; never seen by the loop", ORANGE, "{:.2f}"),
        ("proxy_mean", "Proxy reward", "what the loop optimises", BLUE, "{:.2f}"),
        ("win_rate", "Win rate", f"against round 0, by {judge}; ties count half", GREEN, "{:.2f}"),
        ("kl", "KL to round 0's model", "nats per response", RED, "{:.2f}"),
        ("length_mean", "Length", f"{unit} per response", BLUE, "{:.1f}"),
        ("distinct", "Distinct responses", "share of all; dashed: of one prompt's samples", GREEN, "{:.2f}"),
    )
    shown = [panel for panel in panels if any(summary[panel[0]] is not None for summary in rounds)]
    figure = Figure(figsize=(13, 7.2), dpi=130, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.18, h_pad=0.14)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, color=INK)
    axes = list(figure.subplots(2, 3).flat)
    for axis, (name, heading, meaning, color, form) in zip(axes, shown, strict=False):
        _frame(axis, heading, meaning, [summary["round"] for summary in rounds])
        _line(axis, rounds, name, color, form)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    _fix_scales({panel[0]: axis for panel, axis in zip(shown, axes, strict=False)}, rounds)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _frame(axis: Axes, heading: str, meaning: str, numbers: Sequence[int]) -> None:
    axis.set_title(heading, **STYLE["title"])
    axis.text(0, 1.03, meaning, transform=axis.transAxes, fontsize=9, color=GREY)
    axis.set_xlabel("round", **STYLE["font"])
    axis.set_xlim(-0.3, max(numbers[-1], 1) + 0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axis.tick_params(colors=INK, labelsize=9, length=0)
    axis.grid(axis="y", color="#e6e8ea", linewidth=1)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GREY)


def _line(axis: Axes, rounds: Sequence[dict[str, Any]], name: str, color: str, form: str) -> None:
    """The values of one number over rounds with their intervals; in figures too where there is room."""
    known = [summary for summary in rounds if summary[name] is not None]
    x, y = [summary["round"] for summary in known], [summary[name] for summary in known]
    intervals = [summary.get(f"{name}_ci") or [summary[name]] * 2 for summary in known]
    low, high = zip(*intervals, strict=True)
    axis.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0)
    axis.vlines(x, low, high, color=color, linewidth=1.4)
    axis.plot(x, y, color=color, linewidth=2.2, marker="o", markersize=6.5, markeredgecolor="white", zorder=3)
    if len(known) <= 10:
        for number, value, top in zip(x, y, high, strict=True):
            text = form.format(value).replace("-", "\N{MINUS SIGN}")
            label = axis.annotate(text, (number, top), (0, 7), textcoords="offset points", ha="center", fontsize=9)
            label.set(color=INK, path_effects=[withStroke(linewidth=3, foreground="white")])
    axis.margins(y=0.25)


def _fix_scales(axes: dict[str, Axes], rounds: Sequence[dict[str, Any]]) -> None:
    """Shares run from 0 to 1, and lengths and divergences start at 0, so that small changes look small."""
    axes["win_rate"].axhline(0.5, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    axes["win_rate"].set_ylim(0, 1.08)
    x = [summary["round"] for summary in rounds]
    within = [summary["distinct_within"] for summary in rounds]
    axes["distinct"].plot(x, within, color=GREEN, linewidth=1.4, linestyle=(0, (4, 3)), alpha=0.8)
    axes["distinct"].set_ylim(0, 1.12)
    axes["length_mean"].set_ylim(0, 1.25 * max(summary["length_mean"] for summary in rounds) or 1)
    if "kl" in axes:
        axes["kl"].set_ylim(bottom=min(0, axes["kl"].get_ylim()[0] / 4))
