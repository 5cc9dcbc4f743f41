"""Checkpoints of an online training: models, optimizer, and a small file that says how far it was.

A checkpoint is written beside its name and renamed when it is whole. The random numbers of a step come from seed and step, and
the learning rates from the step, so neither has a state.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from baton import program
from baton.errors import InputError
from baton.online.learner import Learner

log = logging.getLogger("baton")

STATE = "online.json"
UNFINISHED = "unfinished-checkpoint-"


def save(learner: Learner, folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `checkpoint-<step>` and delete older ones; all processes have to call this."""
    target = folder / f"checkpoint-{step}"
    unfinished = folder / f"{UNFINISHED}{step}"
    accelerator = learner.accelerator
    if program.rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if program.rank() == 0:
        counts = {"updates": learner.updates, "frozen_updates": learner.frozen_updates}
        whole = {"step": step, **counts, "spread": spread(accelerator), **state}
        (unfinished / STATE).write_text(json.dumps(whole), encoding="utf-8")
        write_through(unfinished)  # the older ones, which are on the disk, are deleted
        shutil.rmtree(target, ignore_errors=True)
        unfinished.replace(target)
        for older in folder.glob("*checkpoint-*"):
            if older != target:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()


def write_through(folder: Path) -> None:
    """Have the system write the files of a folder to the disk, so that none is empty after a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def load(learner: Learner, folder: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint in `folder`, and return its state; None where there is none.

    Raises InputError for one whose parts fit another layout of processes alone.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not found:
        return None
    state = json.loads((found[-1] / STATE).read_text(encoding="utf-8"))
    there, here = state.get("spread"), spread(learner.accelerator)
    if there not in (None, here):
        raise InputError(f"{found[-1]}: written {there}, and this run is {here}: go on as it was, or --overwrite")
    learner.accelerator.load_state(str(found[-1]))
    learner.updates, learner.frozen_updates = state["updates"], state.get("frozen_updates", 0)
    log.info("going on from %s (step %d)", found[-1], state["step"])
    return state


def spread(accelerator: Accelerator) -> str:
    """How models and optimizer are spread over processes, as far as a checkpoint depends on it."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return f"under ZeRO-{plugin.zero_stage} in {accelerator.num_processes} processes"
    return "under FSDP" if accelerator.distributed_type == DistributedType.FSDP else "without ZeRO and FSDP"
