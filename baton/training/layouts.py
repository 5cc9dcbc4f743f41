"""A checkpoint made loadable by another number of processes than wrote it, or refused where it does not suit the run."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from baton import program
from baton.errors import InputError
from baton.training.waiting import in_process_0

log = logging.getLogger("baton")

UNSHARDED, DEEPSPEED, ZERO_1_2, ZERO_3, FSDP = "no sharding", "DeepSpeed without ZeRO", "ZeRO-1 or ZeRO-2", "ZeRO-3", "FSDP"


def fit_layout(trainer: Any, checkpoint: Path) -> None:
    """Make `checkpoint` loadable by this run's processes, which may be others than those that wrote it.

    A whole model and FSDP's shards load in any number of processes, ZeRO's shards in the same number. For another number
    they are converted once into DeepSpeed's universal checkpoint, which takes as much disk again until the next checkpoint. So
    is the best checkpoint at the end of the training, where it is to be loaded.

    Any layout of the same global batch trains on the same rows in the same step. Where steps are not dealt (`steps.py`), the
    last step of an epoch whose rows are no multiple of it is another: there Accelerate gives several processes rows of the
    epoch's start again, so that all have as many, and micro-batches of unequal size count equally.

    Raises InputError where the run is sharded in a way that the checkpoint does not suit.
    """
    if _loads_universal(trainer, checkpoint):
        trainer.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
        if _sharding(trainer) == ZERO_3:
            trainer.add_callback(MendOptimizer())
    if trainer.is_deepspeed_enabled:
        trainer._load_best_model = partial(_load_best_model, trainer, trainer._load_best_model)


def _load_best_model(trainer: Any, load: Callable[[], None]) -> None:
    """Load the best checkpoint of a training that went on; it may have been written in another layout than the last one."""
    universal = _loads_universal(trainer, Path(trainer.state.best_model_checkpoint))
    trainer.model_wrapped.load_universal_checkpoint = lambda: universal  # DeepSpeed's engine asks itself
    load()


def _loads_universal(trainer: Any, checkpoint: Path) -> bool:
    """Whether this run loads a checkpoint in DeepSpeed's universal form, which it then has, or as it was written.

    Raises InputError where it can do neither.
    """
    (before, processes), now = _layout_of(checkpoint), _sharding(trainer)
    if before == now and (processes is None or processes == program.world_size()):
        return False
    if before == now and before in (ZERO_1_2, ZERO_3) and _has_universal(checkpoint):
        return True
    again = f"{before} in {processes} processes" if processes else before
    raise InputError(
        f"{checkpoint}: written with {again}, and cannot be loaded with {now} in {program.world_size()} processes; "
        f"go on with {again} again, or start afresh with --overwrite"
    )


class MendOptimizer(TrainerCallback):
    """Sets right what DeepSpeed does to the optimizer when it loads a universal checkpoint under ZeRO-3.

    All groups of weights then share one tensor that counts their steps, so that each step would count several times, and
    all have the first group's weight decay.
    """

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        inner = optimizer.optimizer.optimizer  # in Accelerate's wrapper and DeepSpeed's
        for values in inner.state.values():
            if torch.is_tensor(values.get("step")):
                values["step"] = values["step"].clone()
        # Transformers makes two groups: weights that decay, then biases and norms, which do not.
        for group, decay in zip(inner.param_groups, (args.weight_decay, 0.0), strict=False):
            group["weight_decay"] = decay


def _sharding(trainer: Any) -> str:
    """How this run spreads the model."""
    if trainer.is_deepspeed_enabled:
        return (DEEPSPEED, ZERO_1_2, ZERO_1_2, ZERO_3)[trainer.accelerator.state.deepspeed_plugin.zero_stage]
    return FSDP if trainer.is_fsdp_enabled else UNSHARDED


def _layout_of(checkpoint: Path) -> tuple[str, int | None]:
    """How the run that wrote a checkpoint spread the model, and in how many processes where that limits who can load it."""
    if (checkpoint / "latest").exists():
        states = checkpoint / (checkpoint / "latest").read_text().strip()
        shards = len(list(states.glob("*_optim_states.pt")))
        if not shards:
            return DEEPSPEED, None
        return ZERO_3 if any(states.glob("*zero_pp_rank_*_model_states.pt")) else ZERO_1_2, shards
    return FSDP if any(checkpoint.glob("pytorch_model_fsdp*")) else UNSHARDED, None


def _has_universal(checkpoint: Path) -> bool:
    """Whether a ZeRO checkpoint is there in DeepSpeed's universal form; process 0 converts it first, for as long as it takes.

    DeepSpeed writes `latest_universal` last.
    """
    in_process_0(partial(convert, checkpoint))
    return (checkpoint / "latest_universal").exists()


def convert(checkpoint: Path) -> None:
    """Convert a ZeRO checkpoint into a universal one beside it, once; where that fails the log says why."""
    if (checkpoint / "latest_universal").exists():
        return
    log.info("%s: converting to a universal checkpoint, for %d processes", checkpoint, program.world_size())
    states = checkpoint / (checkpoint / "latest").read_text().strip()
    target = states.with_name(f"{states.name}_universal")
    shutil.rmtree(target, ignore_errors=True)
    folders = ["--input_folder", str(states), "--output_folder", str(target)]
    command = [sys.executable, "-m", "baton.training.universal", *folders, "--inject_missing_state"]
    environment = os.environ | {program.PARENT: str(os.getpid())}
    converted = subprocess.run(command, env=environment, capture_output=True, text=True)
    if converted.returncode:
        log.error("DeepSpeed could not convert the checkpoint: %s", converted.stderr[-2000:])
