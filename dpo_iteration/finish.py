"""The end of run_dpo.py and run_kto.py, by process 0: from a training that is done to the policy's folder and its manifest."""

import logging
from typing import Any

from baton.models.templates import template_warning
from baton.records import Messages
from baton.stage import Stage
from baton.training.checkpoints import SCRATCH, finish_policy, last_evaluation
from dpo_iteration.account import IN, Account

log = logging.getLogger("baton")


def finish(
    trainer: Any,
    stage: Stage,
    arguments: Any,
    learnt: tuple[Messages, str],
    account: Account,
    held_out: Account,
    metrics: dict[str, float],
    **facts: dict[str, int],
) -> None:
    """Merge the adapter, keep checkpoints, and finish the stage.

    Args:
        arguments: those of the program.
        learnt: (a conversation that was trained on, "file:line"), whose end says what ends a response.
        account, held_out: what became of the records that were trained on, and of those that were held out.
        metrics: of the training.
        facts: what the manifest says of the rows, under one name: `pairs` or `examples`.
    """
    (what,) = facts
    metrics |= finish_policy(trainer, arguments, stage.partial_folder, learnt)
    if trainer.eval_dataset is not None:
        metrics |= last_evaluation(trainer)
        facts["held_out"] = {what: len(trainer.eval_dataset), "dropped": dict(held_out.drops.counts)}
    counts = {"records_in": account.counted[IN], "records_out": len(trainer.train_dataset), "drops": account.drops}
    stage.finish(**counts, **facts, metrics=metrics, scratch=SCRATCH)
    if warning := template_warning(account.counted, trainer.processing_class):
        log.warning("%s", warning)
