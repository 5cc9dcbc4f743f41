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


LABELLED = 10  # rounds whose figures have room
SHARE_TOP = 1.17  # of an axis of shares: a figure stands above 1


def draw(rounds: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw summaries of rounds (see `metrics.summarize`) into a PNG file at `path`, atomically.

    Points are means over the held-out prompts, bars and bands their intervals. A number that no round has
    gets no panel.
    """
    judge, unit = rounds[0]["win_rate_by"], rounds[0]["length_unit"]
    # Not what was optimised: the gold score, or the first of the evaluation scorers.
    rounds = [{**summary, "judge": by["mean"], "judge_ci": by["mean_ci"]} for summary in rounds for by in [_first(summary)]]
    named = ("Gold score", "what we want") if judge == "gold" else (f"Score by {judge}", "an evaluation scorer")
    panels = (
        ("judge", named[0], f"{named[1]}; never seen by the loop", ORANGE, "{:.2f}"),
        ("proxy_mean", "Proxy reward", "what the loop optimises", BLUE, "{:.2f}"),
        ("win_rate", "Win rate", f"against round 0, by {judge}; ties count half", GREEN, "{:.2f}"),
        ("kl", "KL to round 0's model", "nats per response", RED, "{:.2f}"),
        ("length_mean", "Length", f"{unit} per response", BLUE, "{:.1f}"),
        ("distinct", "Distinct responses", "share of all; dashed: of one prompt's samples", GREEN, "{:.2f}"),
    )
    shown = [panel for panel in panels if any(summary[panel[0]] is not None for summary in rounds)]
    figure, axes = panels_of(title)
    for axis, (name, heading, meaning, color, form) in zip(axes, shown, strict=False):
        _frame(axis, heading, meaning, [summary["round"] for summary in rounds])
        _line(axis, rounds, name, color, form)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    by_name = {panel[0]: axis for panel, axis in zip(shown, axes, strict=False)}
    _fix_scales(by_name, rounds)
    _other_judges(by_name["win_rate"], rounds)
    save(figure, path)


def panels_of(title: str) -> tuple[Figure, list[Axes]]:
    """A figure with its title and six axes."""
    figure = Figure(figsize=(13, 7.2), dpi=130, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.18, h_pad=0.14)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, color=INK)
    return figure, list(figure.subplots(2, 3).flat)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file, atomically."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def style(axis: Axes, heading: str, meaning: str) -> None:
    """Heading, what it means, a quiet frame and grid."""
    axis.set_title(heading, **STYLE["title"])
    axis.text(0, 1.03, meaning, transform=axis.transAxes, fontsize=9, color=GREY)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axis.tick_params(colors=INK, labelsize=9, length=0)
    axis.grid(axis="y", color="#e6e8ea", linewidth=1)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GREY)


def _first(summary: dict[str, Any]) -> dict[str, Any]:
    """What the first of the judges says, nothing if that is the proxy."""
    judge = next(iter(summary["judges"].values()))
    return {"mean": None, "mean_ci": None} if judge["optimised"] else judge


def _frame(axis: Axes, heading: str, meaning: str, numbers: Sequence[int]) -> None:
    style(axis, heading, meaning)
    axis.set_xlabel("round", **STYLE["font"])
    axis.set_xlim(-0.3, max(numbers[-1], 1) + 0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _line(axis: Axes, rounds: Sequence[dict[str, Any]], name: str, color: str, form: str) -> None:
    """The values of one number over rounds with their intervals; in figures too where there is room."""
    known = [summary for summary in rounds if summary[name] is not None]
    x, y = [summary["round"] for summary in known], [summary[name] for summary in known]
    low, high = zip(*(_interval(summary, name) for summary in known), strict=True)
    axis.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0)
    axis.vlines(x, low, high, color=color, linewidth=1.4)
    axis.plot(x, y, color=color, linewidth=2.2, marker="o", markersize=6.5, markeredgecolor="white", zorder=3)
    if len(known) <= LABELLED:
        for number, value, top in zip(x, y, high, strict=True):
            text = form.format(value).replace("-", "\N{MINUS SIGN}")
            label = axis.annotate(text, (number, top), (0, 7), textcoords="offset points", ha="center", fontsize=9)
            label.set(color=INK, path_effects=[withStroke(linewidth=3, foreground="white")])
    axis.set_ylim(*_limits(min(low), max(high)))


def _interval(summary: dict[str, Any], name: str) -> list[float]:
    return summary.get(f"{name}_ci") or [summary[name]] * 2


def _limits(low: float, high: float) -> tuple[float, float]:
    """Limits that leave room below for an interval's end, and above for a figure."""
    span = high - low or abs(high) or 1.0
    return low - 0.08 * span, high + 0.2 * span


def _fix_scales(axes: dict[str, Axes], rounds: Sequence[dict[str, Any]]) -> None:
    """Shares run from 0 to 1, and lengths and divergences start at 0, so that small changes look small."""
    axes["win_rate"].axhline(0.5, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    axes["win_rate"].set_ylim(-0.03, SHARE_TOP)
    x = [summary["round"] for summary in rounds]
    within = [summary["distinct_within"] for summary in rounds]
    axes["distinct"].plot(x, within, color=GREEN, linewidth=1.4, linestyle=(0, (4, 3)), alpha=0.8)
    axes["distinct"].set_ylim(0, SHARE_TOP)
    for name in axes.keys() & {"length_mean", "kl"}:
        low, high = zip(*(_interval(summary, name) for summary in rounds if summary[name] is not None), strict=True)
        if min(low) >= 0:
            axes[name].set_ylim(0, 1.2 * max(high) or 1)
        else:
            axes[name].set_ylim(*_limits(min(low), max(*high, 0)))


def _other_judges(axis: Axes, rounds: Sequence[dict[str, Any]]) -> None:
    """The win rates by the judges after the first, as thin lines with a legend; dashed by what was optimised."""
    _, *others = rounds[0]["judges"]
    for number, judge in enumerate(others):
        optimised = rounds[0]["judges"][judge]["optimised"]
        axis.plot(
            [summary["round"] for summary in rounds],
            [summary["judges"][judge]["win_rate"] for summary in rounds],
            color=BLUE if optimised else (ORANGE, RED, INK)[number % 3],
            linewidth=1.4,
            zorder=1.9,  # below the figures
            linestyle=(0, (4, 3)) if optimised else "solid",
            label=f"by {judge}, which was optimised" if optimised else f"by {judge}",
        )
    if others:
        axis.legend(loc="lower left", fontsize=8, frameon=False, labelcolor=INK)
