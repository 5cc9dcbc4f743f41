"""Train a Bradley-Terry reward model from preference pairs, on TRL's RewardTrainer.

    python reward_model/run_rm.py configs/rm.yaml                                                     # one process
    accelerate launch --config_file configs/zero2.yaml reward_model/run_rm.py configs/rm.yaml         # eight GPUs

Pairs are {"prompt", "chosen", "rejected"} in any of the common shapes. The loss is -log sigmoid(r_chosen - r_rejected)
(Bradley and Terry, 1952; Ouyang et al., 2022, arXiv 2203.02155, equation 1). The held-out accuracy and the mean rewards of
chosen and rejected responses go into the manifest. Every field of TRL's RewardConfig is accepted too.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from baton import program
from baton.arguments import StageArguments, option, parse_with_rest
from baton.drops import Drops
from baton.errors import InputError
from baton.launch.check import check_processes
from baton.models.templates import conversation_token_ids, load_tokenizer
from baton.preferences import preference_records
from baton.prompts import read_records
from baton.sources import check_model_path, template_input
from baton.stage import Stage

log = logging.getLogger("baton")

POOR_ACCURACY = 0.6


class Arguments(StageArguments):
    """What this program adds to RewardConfig."""

    model_name_or_path: str = option(..., "the model to start from: a folder or a Hugging Face name", changes_result=False)
    dataset_name_or_path: str = option(..., "preference pairs to train on", changes_result=False)
    dataset_split: str = option("train", "split of a Hugging Face dataset")
    eval_dataset_name_or_path: str | None = option(
        None, "held-out pairs; without it every `eval_every`-th pair is held out", changes_result=False
    )
    eval_dataset_split: str = option("test", "split of a held-out Hugging Face dataset")
    eval_every: int = option(20, "hold out every so many-th pair where no held-out file is given", ge=2)
    output_dir: str = option(..., "folder of the finished reward model", changes_result=False)
    max_length: int = option(2048, "longest conversation, in tokens; pairs with a longer one are dropped and counted", ge=2)
    chat_template: str | None = option(None, "Jinja file that replaces the tokenizer's chat template", changes_result=False)


def tokenised(
    source: str, split: str, keep: Callable[[int], bool], tokenizer: Any, max_length: int, drops: Drops
) -> Iterator[dict[str, list[int]]]:
    """Yield a row `chosen_ids`, `rejected_ids` for each pair whose number `keep` accepts."""
    for number, (where, record) in enumerate(preference_records(read_records(source, split))):
        if not keep(number):
            continue
        row = {}
        for side in ("chosen", "rejected"):
            conversation = [*record["prompt"], {"role": "assistant", "content": record[side]}]
            row[f"{side}_ids"] = conversation_token_ids(tokenizer, conversation, where)
        if max(map(len, row.values())) > max_length:
            drops.add(f"longer than max_length {max_length} tokens", where)
        else:
            yield row


def held_out_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """The reward model's quality on held-out pairs, from RewardTrainer's evaluation (means over batches)."""
    mean, margin = metrics["eval_mean_reward"], metrics["eval_margin"]
    return {
        "accuracy": metrics["eval_accuracy"],
        "mean_chosen_reward": mean + margin / 2,
        "mean_rejected_reward": mean - margin / 2,
        "loss": metrics["eval_loss"],
    }


def config_class() -> type:
    from trl import RewardConfig

    return RewardConfig


def main() -> None:
    arguments, settings = parse_with_rest(Arguments, __doc__, config_class)
    check_model_path(arguments.model_name_or_path)
    source, held_out = arguments.dataset_name_or_path, arguments.eval_dataset_name_or_path
    inputs = {"model": arguments.model_name_or_path, "pairs": source} | ({"held-out pairs": held_out} if held_out else {})
    inputs |= template_input(arguments.chat_template)
    stage = Stage.begin("reward model", arguments, Path(arguments.output_dir), inputs, settings)
    if stage is None:
        return
    check_processes()
    count = sum(1 for _ in preference_records(read_records(source, arguments.dataset_split)))
    if count < 2:
        raise InputError(f"{source}: holds {count} pairs, at least 2 are needed")

    from trl import RewardTrainer

    from baton.training.checkpoints import train
    from baton.training.config import log_training, trainer_config
    from baton.training.rows import rows_on_disk

    settings |= {"max_length": arguments.max_length}
    config = trainer_config(config_class(), settings, Arguments.model_fields, stage)
    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)
    every = min(arguments.eval_every, count)
    splits = {
        "train": (source, arguments.dataset_split, lambda number: held_out is not None or number % every != every - 1),
        "held out": (
            (held_out, arguments.eval_dataset_split, lambda number: True)
            if held_out
            else (source, arguments.dataset_split, lambda number: number % every == every - 1)
        ),
    }
    drops = {name: Drops() for name in splits}
    rows = {
        name: rows_on_disk(
            lambda split=split, name=name: tokenised(*split, tokenizer, arguments.max_length, drops[name]), config, name
        )
        for name, split in splits.items()
    }
    trainer = RewardTrainer(
        model=arguments.model_name_or_path,
        args=config,
        train_dataset=rows["train"],
        eval_dataset=rows["held out"],
        processing_class=tokenizer,
    )
    log_training(trainer)
    metrics = train(trainer, stage)
    quality = held_out_metrics(trainer.evaluate())
    if program.rank() == 0:
        log.info("held out: %s", ", ".join(f"{name} {value:.3f}" for name, value in quality.items()))
        if quality["accuracy"] < POOR_ACCURACY:
            log.warning(
                "held-out accuracy %.2f is little better than chance: a policy trained on these rewards learns noise. "
                "Check the pairs' labels, the learning rate and the chat template",
                quality["accuracy"],
            )
        in_training = count if held_out else len(rows["train"]) + drops["train"].counts.total()
        stage.finish(
            records_in=in_training,
            records_out=len(rows["train"]),
            drops=drops["train"],
            held_out=quality | {"pairs": len(rows["held out"]), "dropped": dict(drops["held out"].counts)},
            metrics=metrics,
        )


if __name__ == "__main__":
    program.run(main)
