"""The report on the terminal: rounds, stages, and what the model says, which is untrusted text."""

import re
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton.program import harmless
from report.metrics import PROXY, Round

LONGEST = 600  # characters of a prompt or a response that are printed

OPTIMISED = "It is by the reward that was optimised: judge the run by another score (EVAL_SCORERS)."

ROUND_COLUMNS = (  # heading, name in the summary, format
    ("round", "round", "{}"),
    ("gold", "gold_mean", "{:.3f}"),
    ("proxy", "proxy_mean", "{:.3f}"),
    ("win rate", "win_rate", "{:.3f}"),
    ("95 % interval", "win_rate_ci", "[{:.3f}, {:.3f}]"),
    ("KL", "kl", "{:.2f}"),
    ("length", "length_mean", "{:.1f}"),
    ("distinct", "distinct", "{:.3f}"),
    ("within prompt", "distinct_within", "{:.3f}"),
)
STAGE_COLUMNS = (
    ("in", "in", "{:,}"),
    ("out", "out", "{:,}"),
    ("dropped", "dropped", "{:,}"),
    ("seconds", "seconds", "{:,.1f}"),
    ("tokens", "tokens", "{:,}"),
)


def print_rounds(
    console: Console, rounds: Sequence[dict[str, Any]], kl_notes: Sequence[str], left_out: dict[str, Any] | None = None
) -> None:
    """The numbers of each round, and below them what they are."""
    judge, unit, prompts = (rounds[0][name] for name in ("win_rate_by", "length_unit", "prompts"))
    table = _table("Held-out prompts, round by round")
    for heading, _, _ in ROUND_COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in rounds:
        table.add_row(*(_cell(form, summary[name]) for _, name, form in ROUND_COLUMNS))
    console.print(table)
    if len(rounds[0]["judges"]) > 1:
        _print_judges(console, rounds)
    lines = (
        f"{prompts} prompts that no stage trained on; round 0 is the model that the run started from.",
        *([left_out_words(left_out)] if left_out else []),
        "gold: mean of the score that the loop never sees. proxy: mean of the reward that it optimises.",
        f"win rate: against round 0's responses to the same prompt, by {printable(judge)}, ties half.",
        *([OPTIMISED] if judge == PROXY else []),
        f"KL: to round 0's model, nats per response. length: {unit} per response.",
        *kl_notes,
        "distinct: share of different texts among all responses; within prompt: among one prompt's samples.",
    )
    console.print(Text("\n".join(lines), style="dim"))


def _print_judges(console: Console, rounds: Sequence[dict[str, Any]]) -> None:
    """The win rate by each who judges, with its interval."""
    table = _table("Win rate against round 0, by who judges")
    table.add_column("round", justify="right", no_wrap=True)
    for name, judge in rounds[0]["judges"].items():
        heading = f"{printable(name)}\n(the reward that was optimised)" if judge["optimised"] else printable(name)
        table.add_column(Text(heading), justify="right")
    for summary in rounds:
        cells = [_win_rate(judge) for judge in summary["judges"].values()]
        table.add_row(str(summary["round"]), *cells)
    console.print(table)


def _win_rate(judge: dict[str, Any]) -> Text:
    interval = _cell(" [{:.3f}, {:.3f}]", judge["win_rate_ci"]) if judge["win_rate_ci"] else Text()
    return Text(f"{judge['win_rate']:.3f}") + interval


def left_out_words(left_out: dict[str, Any]) -> str:
    """What `metrics.in_all` left out, as a sentence."""
    missing = ", ".join(f"{count} in round {number}" for number, count in left_out["missing"].items())
    share = left_out["prompts"] / left_out["of"]
    return (
        f"{left_out['prompts']} of {left_out['of']} prompts ({share:.1%}) are left out: not all rounds have responses with "
        f"rewards to them (missing: {missing})."
    )


def print_stages(console: Console, stages: Sequence[dict[str, Any]]) -> None:
    """What each stage took in, gave out and dropped, and its time; the shards of one stage are one row."""
    table = _table("Stages")
    table.add_column("folder")
    table.add_column("stage")
    for heading, _, _ in STAGE_COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in stages:
        names = (Text(printable(stage[name])) for name in ("folder", "stage"))
        table.add_row(*names, *(_cell(form, stage[name]) for _, name, form in STAGE_COLUMNS))
    console.print(table)
    total = sum(stage["seconds"] for stage in stages)
    console.print(Text(f"{total:,.0f} s in all, shards that ran at the same time added up.", style="dim"))


def print_samples(console: Console, rounds: Sequence[Round], count: int) -> None:
    """What round 0 and the last round say to the first `count` prompts: their first samples, side by side."""
    compared = sorted({0, len(rounds) - 1})
    table = _table("The first sample of each, not the best", box=box.ROUNDED, show_lines=True, expand=True)
    table.add_column("prompt", ratio=2)
    for number in compared:
        table.add_column(f"round {number}", ratio=3)
    for id_, first in list(rounds[0].items())[:count]:
        texts = [first.prompt, *(rounds[number][id_].responses[0] for number in compared)]
        table.add_row(*(Text(printable(text)) for text in texts))
    console.print(table)


def printable(text: str) -> str:
    """The first LONGEST characters of `text` as harmless ones, with its line breaks."""
    shown = text if len(text) <= LONGEST else text[:LONGEST] + "…"
    return "\n".join(harmless(line.replace("\t", " ")) for line in shown.split("\n"))


def _table(title: str, **options: Any) -> Table:
    return Table(title=title, title_style="bold", title_justify="left", **{"box": box.SIMPLE_HEAD, **options})


def _cell(form: str, value: Any) -> Text:
    """A number, or the numbers of a list, as plain text; a dash for None, and no sign before a zero."""
    values = value if isinstance(value, list) else [value]
    return Text("–" if value is None else re.sub(r"-(0\.0+)\b", r"\1", form.format(*values)))
