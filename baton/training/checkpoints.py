"""From the last whole checkpoint, or from the start, to a clean model folder."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from transformers.trainer_callback import PrinterCallback

from baton import program
from baton.stage import Stage
from baton.training.progress import ProgressLines

log = logging.getLogger("baton")


def train(trainer: Any, stage: Stage, export: Callable[[Path], None] = lambda folder: None) -> dict[str, float]:
    """Train from the last whole checkpoint, or from the start; returns the training metrics.

    At the end `<output>.partial` holds the model and the tokenizer and nothing else. `export` may change what is saved
    there; process 0 calls it, before the checkpoints are deleted, so that a death in it costs no training.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLines())
    metrics = trainer.train(resume_from_checkpoint=last_whole_checkpoint(stage.partial_folder)).metrics
    trainer.save_model(str(stage.partial_folder))
    if program.rank() == 0:
        export(stage.partial_folder)
        for leftover in (*stage.partial_folder.glob("checkpoint-*"), stage.partial_folder / "rows"):
            shutil.rmtree(leftover, ignore_errors=True)
        (stage.partial_folder / "training_args.bin").unlink(missing_ok=True)
    return metrics


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-N` that was written to its end; ones that a killed run left half-written are passed over.

    The trainer writes `trainer_state.json` last.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            step = orjson.loads((checkpoint / "trainer_state.json").read_bytes())["global_step"]
        except (FileNotFoundError, orjson.JSONDecodeError, KeyError):
            log.info("%s: half-written, passed over", checkpoint)
            continue
        log.info("going on from %s (step %d)", checkpoint, step)
        return str(checkpoint)
    return None
