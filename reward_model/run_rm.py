"""Train a Bradley-Terry reward model from preference pairs, on TRL's RewardTrainer.

    python reward_model/run_rm.py configs/rm.yaml                                                     # one process
    accelerate launch --config_file configs/zero2.yaml reward_model/run_rm.py configs/rm.yaml         # eight GPUs

Pairs are {"prompt", "chosen", "rejected"} in any of the common shapes. The loss is -log sigmoid(r_chosen - r_rejected)
(Bradley and Terry, 1952; Ouyang et al., 2022, arXiv 2203.02155, equation 1). The held-out accuracy and the mean rewards of
chosen and rejected responses go into the manifest. Every field of TRL's RewardConfig is accepted too.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from baton import program
from baton.arguments import option
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.launch.check import check_processes
from baton.mixing import parse_probs
from baton.models.templates import load_tokenizer
from baton.preferences import preference_records
from baton.prompts import mixed_records, source_inputs, split_sources
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.training.arguments import TrainingProgramArguments, metrics_file, parse_training
from baton.training.reports import check_outside, place_reports
from reward_model.rows import rows_of_preferences

log = logging.getLogger("baton")

POOR_ACCURACY = 0.6

IMPORTS = ("trl.trainer.reward_trainer", "baton.training.checkpoints", "baton.training.rows")


class Arguments(TrainingProgramArguments):
    """What this program adds to RewardConfig."""

    model_name_or_path: str = option(..., "the model to start from: a folder or a Hugging Face name", changes_result=False)
    dataset_name_or_path: str = option(
        ..., "preference pairs to train on; several files or datasets with commas between", changes_result=False
    )
    dataset_probs: str | None = option(None, "draw from several datasets at these rates, such as 0.7,0.3, until one is used up")
    dataset_split: str = option("train", "split of a Hugging Face dataset")
    dataset_key: str | None = option(None, "key of the prompt, if it is an unusual one (docs/data.md)")
    chosen_key: str | None = option(None, "key of the better response, if it is not `chosen`")
    rejected_key: str | None = option(None, "key of the worse response, if it is not `rejected`")
    score_key: str | None = option(None, "key of the score of a response in data sets such as UltraFeedback (docs/data.md)")
    max_samples: int | None = option(None, "use only the first N records of the training pairs", ge=1)
    max_pairs_per_prompt: int | None = option(
        None, "most pairs of a record with several answers; default: all of ReaL's, one of scored responses", ge=1
    )
    eval_dataset_name_or_path: str | None = option(
        None, "held-out pairs; default: one in `eval_every` of the training pairs", changes_result=False
    )
    eval_dataset_split: str = option("test", "split of a held-out Hugging Face dataset")
    eval_every: int = option(20, "hold out one pair in so many where no held-out file is given", ge=2)
    output_dir: str = option(
        ...,
        "folder of the finished reward model (in generation/ and annotate_data/ this flag names a file)",
        changes_result=False,
    )
    max_length: int = option(2048, "longest conversation, in tokens; pairs with a longer one are dropped and counted", ge=2)
    chat_template: str | None = option(None, "Jinja file that replaces the tokenizer's chat template", changes_result=False)


def training_pairs(arguments: Arguments, count: int) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of each pair that is trained on, of a file of `count` pairs."""
    for number, pair in enumerate(all_pairs(arguments)):
        if arguments.eval_dataset_name_or_path or not _is_held_out(number, arguments, count):
            yield pair


def held_out_pairs(arguments: Arguments, count: int) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of each held-out pair: all of the held-out file, else some of the `count` of the training file."""
    if arguments.eval_dataset_name_or_path:
        records = mixed_records(arguments.eval_dataset_name_or_path, arguments.eval_dataset_split, None)
        yield from _preferences(records, arguments)
        return
    for number, pair in enumerate(all_pairs(arguments)):
        if _is_held_out(number, arguments, count):
            yield pair


def all_pairs(arguments: Arguments, drops: Drops | None = None) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of the training files; `drops` gets what makes no pair."""
    split, probs, most = arguments.dataset_split, dataset_probs(arguments), arguments.max_samples
    records = mixed_records(arguments.dataset_name_or_path, split, probs, max_samples=most)
    return _preferences(records, arguments, drops)


def dataset_probs(arguments: Arguments) -> tuple[float, ...] | None:
    """The rate of each dataset, or None. Raises InputError where there are not as many rates as datasets."""
    return parse_probs(arguments.dataset_probs, len(split_sources(arguments.dataset_name_or_path)))


def _preferences(
    records: Iterable[tuple[str, Record]], arguments: Arguments, drops: Drops | None = None
) -> Iterator[tuple[str, Record]]:
    keys = {"prompt": arguments.dataset_key, "chosen": arguments.chosen_key, "rejected": arguments.rejected_key}
    most, score = arguments.max_pairs_per_prompt, arguments.score_key
    return preference_records(with_usual_keys(records, keys), most, score, drops)


def _is_held_out(number: int, arguments: Arguments, count: int) -> bool:
    """Whether a pair of the training file is held out: the last of every `eval_every`, at least one where there are fewer."""
    every = min(arguments.eval_every, count)
    return number % every == every - 1


def rows_of(pairs: Iterable[tuple[str, Record]], name: str, tokenizer: Any, config: Any) -> tuple[Any, Drops]:
    """The token ids of pairs, a dataset called `name`, and what was dropped: in process 0, which alone reads the pairs."""
    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    drops = Drops()
    make = partial(rows_of_preferences, tokenizer, config.max_length)
    return rows_on_disk(lambda: tokenised(make, pairs, drops, Counter()), config, name), drops


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


def count_pairs(arguments: Arguments) -> tuple[int, Drops]:
    """How many pairs the training files hold, and what of them makes no pair. Raises InputError where there are too few."""
    drops = Drops()
    count = sum(1 for _ in all_pairs(arguments, drops))
    if count < 2:
        raise InputError(f"{arguments.dataset_name_or_path}: holds {count} pairs, at least 2 are needed; dropped: {drops}")
    if drops.counts:
        log.info("%s: %d pairs; what makes none: %s", arguments.dataset_name_or_path, count, drops)
    return count, drops


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's RewardConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, [arguments.model_name_or_path], ahead=arguments.check)
    from baton.training.checks import check_settings
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of

    settings = settings | {"max_length": arguments.max_length}
    config = trainer_config(config_class(), settings, Arguments.model_fields, stage)
    check_settings(config, sharding_of(config), evaluates=True)
    return config


def log_quality(quality: dict[str, float]) -> None:
    """Log the `held_out_metrics`, and a warning where they say that the reward model is of no use."""
    log.info("held out: %s", ", ".join(f"{name} {value:.3f}" for name, value in quality.items()))
    if quality["accuracy"] < POOR_ACCURACY:
        log.warning(
            "held-out accuracy %.2f is little better than chance: a policy trained on these rewards learns noise. "
            "Check the pairs' labels, the learning rate and the chat template",
            quality["accuracy"],
        )


def main() -> None:
    arguments, settings = parse_training("reward_model/run_rm.py", Arguments, __doc__, config_class)
    check_start(arguments.model_name_or_path)
    dataset_probs(arguments)
    held_out = arguments.eval_dataset_name_or_path
    inputs = {"model": arguments.model_name_or_path, **source_inputs("pairs", arguments.dataset_name_or_path)}
    inputs |= source_inputs("held-out pairs", held_out) if held_out else {}
    inputs |= template_input(arguments.chat_template)
    metrics_path = metrics_file(arguments.output_dir, arguments.metrics_path)
    refuse_input(metrics_path, inputs, "--metrics_path", arguments.output_dir)
    checked = partial(checked_config, arguments, settings)
    stage = Stage.begin("reward model", arguments, Path(arguments.output_dir), inputs, settings, config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    count, no_pairs = count_pairs(arguments)
    config = checked(stage)

    from transformers import set_seed
    from trl import RewardTrainer

    from baton.training.checkpoints import SCRATCH, train
    from baton.training.config import log_training

    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)
    rows, drops = rows_of(training_pairs(arguments, count), "train", tokenizer, config)
    held_out_rows, held_out_drops = rows_of(held_out_pairs(arguments, count), "held out", tokenizer, config)
    place_reports(settings, metrics_path)
    set_seed(config.seed)  # the head's random weights are drawn before the trainer does this
    with loading(arguments.model_name_or_path):
        trainer = RewardTrainer(
            model=arguments.model_name_or_path,
            args=config,
            train_dataset=rows,
            eval_dataset=held_out_rows,
            processing_class=tokenizer,
        )
    log_training(trainer)
    records_in = count if held_out else count - len(held_out_rows) - held_out_drops.counts.total()
    counts = {"in": records_in, "out": len(rows), "dropped": dict(drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts)
    log.info("evaluating on %d held-out pairs", len(held_out_rows))
    quality = held_out_metrics(trainer.evaluate())
    trainer.create_model_card()
    if program.rank() == 0:
        log_quality(quality)
        held_out_facts = quality | {"pairs": len(held_out_rows), "dropped": dict(held_out_drops.counts)}
        counts = {"records_in": records_in, "records_out": len(rows), "drops": drops}
        stage.finish(**counts, no_pairs=dict(no_pairs.counts), held_out=held_out_facts, metrics=metrics, scratch=SCRATCH)


if __name__ == "__main__":
    program.run(main)
