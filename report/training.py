"""The picture of the trainings of a run: what their trainers logged, one round after the other on one axis."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from baton.errors import InputError
from report.rounds import rounds_in

Line = dict[str, Any]

# In a round's folder: where the loop has the trainer write, and where the trainer writes by itself.
FILES = ("metrics.jsonl", "policy.metrics.jsonl")

# What may be drawn: the keys of which a training has one, heading, what it is. The first six that there are.
PANELS = (
    (("loss",), "Loss", "of a step's batch"),
    (("reward",), "Reward", "mean of a step's samples, before they are trained on"),
    (("rewards/accuracies", "accuracy"), "Accuracy", "share of pairs in the right order"),
    (("rewards/margins", "margin"), "Margin", "reward of chosen less rejected"),
    (("learning_rate",), "Learning rate", ""),
    (("explained_variance",), "Critic", "explained variance of the returns; 0 is a constant"),
    (("grad_norm",), "Gradient norm", "before clipping"),
    (("kl_on_pairs", "kl"), "KL on the training batches", "an estimate, nats per response"),
    (("entropy",), "Entropy", "nats per token"),
)


def read_trainings(run_dir: Path) -> dict[int, list[Line]]:
    """By round: the lines of roundN/metrics.jsonl that are of the training, in order; rounds without any are left out.

    A last line without its end is left out: it is being written. Raises InputError, naming file:line, for a bad one.
    """
    found = {number: _lines(folder) for number, folder in rounds_in(run_dir).items()}
    return {number: lines for number, lines in found.items() if lines}


def account(trainings: dict[int, list[Line]]) -> list[dict[str, Any]]:
    """For each round its last `step`, how many `lines` it has, and the last loss."""
    return [
        {"round": number, "step": lines[-1]["step"], "lines": len(lines), "loss": lines[-1]["loss"]}
        for number, lines in trainings.items()
    ]


def draw_trainings(trainings: dict[int, list[Line]], title: str, path: Path) -> None:
    """Draw what was logged into a PNG file at `path`, atomically; a number that no round has gets no panel."""
    from report.plot import BLUE, INK, panels_of, save, style

    shown = [panel for panel in PANELS if any(_known(lines, panel[0]) for lines in trainings.values())]
    figure, axes = panels_of(title)
    for axis, (keys, heading, meaning) in zip(axes, shown, strict=False):
        style(axis, heading, meaning)
        ticks, begin = [], 0
        for number, lines in trainings.items():
            points = _known(lines, keys)
            # A round of a single line is a point.
            axis.plot([begin + step for step, _ in points], [value for _, value in points], color=BLUE, marker=_marker(points))
            edge = begin + 0.5  # between the last step of a round and the first of the next
            ticks.append((edge, f"round {number}" if len(trainings) <= 6 else str(number)))
            axis.axvline(edge, color="#d6d9dc", linewidth=1)
            begin += lines[-1]["step"]
        axis.set_xticks([place for place, _ in ticks], [name for _, name in ticks], ha="left")
        axis.set_xlim(0, 1.02 * begin or 1)
        axis.set_xlabel(f"{begin} steps; a line where each round begins", fontsize=10, color=INK)
        axis.margins(y=0.1)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    save(figure, path)


def _marker(points: Sequence[tuple[int, float]]) -> str:
    return "o" if len(points) < 2 else ""


def _known(lines: Sequence[Line], keys: Sequence[str]) -> list[tuple[int, float]]:
    """(step, value) of the lines that have a number under one of `keys`."""
    return [
        (line["step"], line[key])
        for line in lines
        for key in keys
        if isinstance(line.get(key), int | float)  # null where it was not finite
    ]


def _lines(folder: Path) -> list[Line]:
    path = next((path for name in FILES if (path := folder / name).exists()), None)
    if path is None:
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not text.endswith(b"\n"):
            continue
        try:
            line = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise InputError(f"{path}:{number}: expected an object with a `step`")
        if "loss" in line:  # the others are evaluations, and the summary at the end
            lines.append(line)
    return lines
