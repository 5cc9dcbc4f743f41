"""KTO: responses labelled desirable or undesirable in, the next policy out, on TRL's KTOTrainer.

    python dpo_iteration/run_kto.py configs/kto.yaml                                                  # one process
    accelerate launch --config_file configs/zero2.yaml dpo_iteration/run_kto.py configs/kto.yaml      # eight GPUs

Responses need no partner: {"prompt", "completion", "label"} with label true or false, as texts or messages. Annotated
responses ({"prompt", "responses", "rewards"}) are desirable above one threshold of the reward and undesirable below
another, by default above and below the mean of their prompt; preference pairs are one of each. KTO is of Ethayarajh et al.,
2024, arXiv 2402.01306. Every field of TRL's KTOConfig is accepted in the YAML file and as a flag (`beta`,
`desirable_weight`, `undesirable_weight`, …). The reference policy's log-probabilities are computed once, before the policy
is loaded, and kept beside the output.
"""

import logging
from collections import Counter
from functools import partial
from pathlib import Path

from baton import jsonl, program
from baton.arguments import StageArguments, option, parse_with_rest
from baton.drops import Drops
from baton.errors import InputError
from baton.labels import LabelSettings, check_both_kinds, labelled_examples
from baton.launch.check import check_processes
from baton.models.templates import load_tokenizer
from baton.prompts import read_records
from baton.sources import check_model_path, template_input
from baton.stage import Stage
from dpo_iteration.rows import Rows, log_rows

log = logging.getLogger("baton")


class Arguments(StageArguments):
    """What this program adds to KTOConfig."""

    model_name_or_path: str = option(..., "the policy to start from", changes_result=False)
    ref_model: str | None = option(None, "the reference policy; default: the starting policy", changes_result=False)
    dataset_name_or_path: str = option(
        ..., "labelled (`completion`, `label`), annotated (`responses`, `rewards`) or paired (`chosen`, `rejected`) responses",
        changes_result=False,
    )  # fmt: skip
    dataset_split: str = option("train", "split of a Hugging Face dataset")
    output_dir: str = option(..., "folder of the finished policy", changes_result=False)
    examples_path: str | None = option(
        None, "file for the labelled examples; default: <output_dir>.examples.jsonl", changes_result=False
    )
    desirable_above: float | None = option(
        None, "annotated responses with a reward above this are desirable; default: the mean of the prompt's rewards"
    )
    undesirable_below: float | None = option(
        None, "annotated responses with a reward below this are undesirable; default: the mean of the prompt's rewards"
    )
    drop_truncated: bool = option(False, "leave out responses that were cut off by length")
    max_length: int = option(2048, "longest prompt and response together, in tokens; responses are cut to fit", ge=2)
    max_prompt_length: int = option(1024, "longest prompt, in tokens; longer ones are dropped and counted", ge=1)
    chat_template: str | None = option(None, "Jinja file that replaces the tokenizer's chat template", changes_result=False)
    seed: int = option(42, "seed of the training and of the order of the examples")
    tokens_per_row: int = option(4096, "most tokens of a packed row; a step runs as many rows as its examples fill", ge=1)


def config_class() -> type:
    from trl import KTOConfig

    return KTOConfig


def main() -> None:
    arguments, settings = parse_with_rest(Arguments, __doc__, config_class)
    labelling = LabelSettings(arguments.desirable_above, arguments.undesirable_below, arguments.drop_truncated)
    if arguments.max_prompt_length >= arguments.max_length:
        raise InputError("`max_prompt_length` must be smaller than `max_length`: no token would be left for the response")
    source, reference = arguments.dataset_name_or_path, arguments.ref_model or arguments.model_name_or_path
    for model in (arguments.model_name_or_path, reference):
        check_model_path(model)
    inputs = {"model": arguments.model_name_or_path, "reference": reference, "data": source}
    inputs |= template_input(arguments.chat_template)
    output = Path(arguments.output_dir)
    stage = Stage.begin("kto", arguments, output, inputs, settings)
    if stage is None:
        return
    check_processes()

    examples_path = Path(arguments.examples_path or f"{output}.examples.jsonl")
    drops: Drops = Drops()
    counted: Counter[str] = Counter()
    if program.rank() == 0:
        examples = labelled_examples(read_records(source, arguments.dataset_split), labelling, drops, counted)
        jsonl.write(examples_path, examples)
        check_both_kinds(counted.pop("desirable", 0), counted.pop("undesirable", 0), source, drops)

    from baton.training.checkpoints import train
    from baton.training.config import log_training, trainer_config
    from baton.training.rows import rows_on_disk
    from dpo_iteration import kto

    settings |= {"max_length": arguments.max_length, "seed": arguments.seed, "precompute_ref_log_probs": True}
    config = trainer_config(config_class(), settings, Arguments.model_fields, stage)
    kto.check_config(config)
    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)

    rows = Rows(tokenizer, arguments.max_length, arguments.max_prompt_length, drops, counted)

    def token_ids():
        labels: Counter[bool] = Counter()
        for row in rows.of_examples(jsonl.read(examples_path)):
            labels[row["label"]] += 1
            yield row
        check_both_kinds(labels[True], labels[False], examples_path, drops)

    dataset = rows_on_disk(token_ids, config, "examples")
    desirable = sum(dataset["label"])
    undesirable = len(dataset) - desirable
    if program.rank() == 0:
        log_rows(dataset, tokenizer, drops, counted)
        log.info("%d desirable and %d undesirable examples", desirable, undesirable)
    if advice := kto.balance_advice(desirable, undesirable, config):
        log.warning("%s", advice)
    dataset = rows_on_disk(partial(kto.in_training_order, dataset, config, arguments.max_length), config, "in_order")
    trainer = kto.PackedKTOTrainer(
        arguments.model_name_or_path,
        args=config,
        train_dataset=kto.with_reference_logps(dataset, reference, config, examples_path.parent),
        processing_class=tokenizer,
        tokens_per_row=arguments.tokens_per_row,
    )
    log_training(trainer)
    metrics = train(trainer, stage)
    if program.rank() == 0:
        records_in = counted.pop("in")
        examples = {"desirable": desirable, "undesirable": undesirable, **counted}
        stage.finish(records_in=records_in, records_out=len(dataset), drops=drops, examples=examples, metrics=metrics)


if __name__ == "__main__":
    program.run(main)
