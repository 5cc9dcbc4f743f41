"""The end of an online training: the finished policy, and the critic where it is wanted, as plain folders."""

import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn

from baton import program
from baton.drops import Drops
from baton.manifest import remove
from baton.online.arguments import OnlineArguments
from baton.online.checkpoints import UNFINISHED
from baton.online.learner import Learner
from baton.online.models import merged, plain
from baton.online.prompts import Prompts
from baton.records import prompt_of
from baton.stage import Stage
from baton.training.arguments import ExportDtype
from baton.training.checkpoints import stop_at_end_of_turn
from baton.training.export import copies_without_zero, tensors_of, write_model

SCRATCH = ("checkpoint-*", f"{UNFINISHED}*", "rows")
KEPT = ("rollouts", "heldout")  # folders that stay, beside the policy


def finish(
    arguments: OnlineArguments,
    learner: Learner,
    stage: Stage,
    tokenizer: Any,
    prompts: Prompts,
    drops: Drops,
    metrics: dict[str, float],
    critic: str | None = None,
) -> None:
    """Write the policy, and the critic that started from the model `critic`, and finish the stage; all processes call this."""
    folder, dtype = stage.partial_folder, arguments.export_dtype
    start = arguments.model_name_or_path
    models = learner.models
    facts = write_trained(learner, models.actor, folder, start, dtype)
    if critic is not None:
        write_trained(learner, models.critic, folder / "critic", critic, dtype)
    learner.accelerator.wait_for_everyone()
    if program.rank() != 0:
        return
    tokenizer.save_pretrained(folder)
    if critic is not None:
        tokenizer.save_pretrained(folder / "critic")
    first = prompts.first(0)
    conversation = [*prompt_of(first, first["id"]), {"role": "assistant", "content": "A response."}]
    stop_at_end_of_turn(folder, tokenizer, conversation, first["id"])
    for name in KEPT:
        target = Path(f"{stage.output}.{name}")
        if (folder / name).exists():
            remove(target)
            shutil.move(folder / name, target)
    records = len(prompts) + drops.counts.total()
    stage.finish(records_in=records, records_out=len(prompts), drops=drops, metrics=metrics | facts, scratch=SCRATCH)


def write_trained(learner: Learner, model: nn.Module, folder: Path, start: str, dtype: ExportDtype) -> dict[str, float]:
    """Write a trained model, adapters merged, as a checkpoint; returns what rounding takes away of the update."""
    if is_peft_model(model):
        return write_model(plain(model), merged(model), folder, start, dtype)
    zero = learner.accelerator.state.deepspeed_plugin is not None
    copies = copies_without_zero(learner.optimizer.optimizer) if zero else {}
    return write_model(model, tensors_of(model, copies), folder, start, dtype)
