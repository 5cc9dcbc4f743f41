"""The trainer's numbers as a file of JSON lines, which is right after a death as well."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from baton import jsonl
from baton.errors import InputError

log = logging.getLogger("baton")

# What an evaluation, and the end of a training, log once a step; every other line is one of the training.
EVALUATION, SUMMARY = "eval_loss", "train_runtime"


class MetricsFile(TrainerCallback):
    """Writes what the trainer logs to `path`, as it is logged: {"step", "epoch", …}, one JSON object a line, in process 0.

    A training that goes on from a checkpoint keeps the lines up to its step, and replaces the later ones.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines: dict[tuple[int, str], dict[str, Any]] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = _read(self.path) if state.global_step else []
        # The summary of a training that ended, and was exported half, is written again.
        kept = [line for line in known if line["step"] <= state.global_step and SUMMARY not in line]
        self.lines = {(line["step"], _kind(line)): line for line in kept}
        self._write_all()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, "epoch": state.epoch, **logs}
        key = (state.global_step, _kind(logs))
        again = key in self.lines
        self.lines[key] = line
        if again:
            self._write_all()
            return
        with self.path.open("ab") as file:
            file.write(jsonl.dump(line))

    def _write_all(self) -> None:
        jsonl.write(self.path, self.lines.values())


def _kind(line: dict[str, Any]) -> str:
    return next((name for name in (EVALUATION, SUMMARY) if name in line), "")


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, those left out that a death has spoilt: they are no reason not to go on."""
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            lines.append(jsonl.parse(line, f"{path}:{number}"))
        except InputError as error:
            log.warning("%s; the line is left out", error)
    return [line for line in lines if isinstance(line.get("step"), int)]
