"""One round of DPO: annotated responses (or offline preferences) in, pairs and the next policy out.

    python dpo_iteration/run_dpo.py configs/training.yaml                                             # one process
    accelerate launch --config_file configs/zero2.yaml dpo_iteration/run_dpo.py configs/training.yaml # eight GPUs

Several input files may be mixed, and the pairs of earlier rounds (`history`); <pairs_path> holds this round's own alone.
Every field of TRL's DPOConfig is accepted in the YAML file and as a flag (`beta`, `loss_type`, `label_smoothing`, …). The
reference policy's log-probabilities are computed once, before the policy is loaded, and kept beside the output. With `eval_dir`
the policy is evaluated on other pairs, at `eval_steps` and at the end. The names of Online-RLHF's files are understood. With
`--use_peft` an adapter is trained; `--merge_adapter` writes it merged into the policy, as the next round needs it.
"""

import copy
import logging
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from baton import jsonl, program
from baton.ahead import check_there, note_adapter
from baton.arguments import option
from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.launch.check import check_processes
from baton.models.templates import load_tokenizer, template_warning
from baton.pairs import PairSettings
from baton.prompts import mixed_records, read_records, source_inputs, split_sources
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.task import spelling
from baton.training.adapters import LoraArguments, adapter_config, check_lora, merge_adapter, quantization_config
from baton.training.arguments import (
    Compile,
    compile_option,
    early_stopping_option,
    keep_checkpoints_option,
    metrics_file,
    parse_training,
    tokens_per_row_option,
)
from baton.training.data import DataArguments, dataset_probs
from baton.training.reports import check_outside, place_reports
from dpo_iteration.account import IN, Account, in_words
from dpo_iteration.choose import NO_MARGIN, at_least_one, choose_pairs, earlier_pairs, extra_responses, pairs_again, write_pairs
from dpo_iteration.losses import OF_MARGINS, LossNumbers, check_loss_types, is_reference_free, loss_types, split_that_decides
from dpo_iteration.online_rlhf import own_names
from dpo_iteration.pair_arguments import PairArguments, pair_settings
from dpo_iteration.rows import log_rows, rows_of_pairs

log = logging.getLogger("baton")

IMPORTS = ("dpo_iteration.trainer", "baton.training.checkpoints", "baton.training.reference")

HELD_OUT_PAIRS = 100  # of `eval_dir`, as in Online-RLHF


class Arguments(DataArguments, PairArguments, LoraArguments):
    """What this program adds to DPOConfig."""

    model_name_or_path: str = option(..., "the policy that this round starts from", changes_result=False)
    ref_model: str | None = option(None, "the reference policy; default: the starting policy", changes_result=False)
    dataset_name_or_path: str = option(
        ...,
        "annotated responses (`prompt`, `responses`, `rewards`), preferences (`chosen`, `rejected`) or Baton's own pairs: "
        "a .jsonl, .jsonl.gz, .json or .parquet file, or a Hugging Face dataset; several with commas between; `train_dir` too",
        changes_result=False,
    )
    chosen_key: str | None = option(None, "key of the better response, if it is not `chosen`")
    rejected_key: str | None = option(None, "key of the worse response, if it is not `rejected`")
    score_key: str | None = option(None, "key of the score of a response in data sets such as UltraFeedback (docs/data.md)")
    history: int = option(0, "train also on the pairs of so many earlier rounds; needs folders round1, round2, …", ge=0)
    eval_dir: str | None = option(
        None,
        f"evaluate on the first {HELD_OUT_PAIRS} pairs of this file or dataset, of annotated responses two random ones, at "
        "`eval_steps` and at the end",
        changes_result=False,
    )
    max_training_samples: int = option(-1, "train on the first so many pairs of the data; -1: on all", ge=-1)
    output_dir: str = option(
        ..., "folder of the finished policy (in generation/ and annotate_data/ this flag names a file)", changes_result=False
    )
    pairs_path: str | None = option(None, "file for the chosen pairs; default: <output_dir>.pairs.jsonl", changes_result=False)
    min_edit_distance: float = option(
        0.0, "least edit distance of a pair's texts, as a share of the longer one's characters", ge=0, le=1
    )
    extra_responses: str | None = option(
        None,
        "annotated responses of another model, or the data set's own, to the same prompts (joined by `id`): pairs are chosen "
        "among them and those of the data",
        changes_result=False,
    )
    margin_scale: float = option(0.0, "weight of the reward margin as an offset in the sigmoid loss", ge=0)
    length_alpha: float = option(0.0, "what a token of difference in length counts in the sigmoid loss, in nats", ge=0)
    simpo_gamma: float = option(0.5, "loss_type simpo: margin that chosen keeps from rejected, in nats, after beta", ge=0)
    orpo_lambda: float = option(0.1, "loss_type orpo: weight of the odds ratio beside the likelihood of the chosen", ge=0)
    dpop_lambda: float = option(50.0, "loss_type dpop: weight of what the chosen lost against the reference", ge=0)
    rebel_eta: float = option(1.0, "loss_type rebel: nats of log-ratio that a unit of reward comes to", gt=0)
    max_length: int = option(2048, "longest prompt and response together, in tokens; responses are cut to fit", ge=2)
    max_prompt_length: int = option(1024, "longest prompt, in tokens; longer ones are dropped and counted", ge=1)
    seed: int = option(42, "seed of the training and of random pairs")
    forward: Literal["packed", "trl"] = option("packed", "packed rows that share prefixes, or TRL's own padded batches")
    tokens_per_row: int = tokens_per_row_option("pair")
    compile: Compile = compile_option()
    keep_checkpoints: int = keep_checkpoints_option()
    early_stopping: int | None = early_stopping_option()


def loss_numbers(arguments: Arguments) -> LossNumbers:
    return LossNumbers(**{name: getattr(arguments, name) for name in LossNumbers.__dataclass_fields__})


def config_class() -> type:
    from trl import DPOConfig

    return DPOConfig


def check(arguments: Arguments, settings: dict[str, Any]) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    pair_settings(arguments)
    check_loss_types(settings, loss_numbers(arguments))
    if arguments.max_prompt_length >= arguments.max_length:
        raise InputError("`max_prompt_length` must be smaller than `max_length`: no token would be left for the response")
    check_lora(arguments)
    for model in models_of(arguments, settings).values():
        check_start(model)
    dataset_probs(arguments)
    asked = [name for name in ("do_eval", "eval_strategy") if spelling(settings.get(name)) not in (None, False, "no")]
    if asked and not arguments.eval_dir:
        raise InputError(f"`{asked[0]}` needs pairs to evaluate on: name a file of them with --eval_dir, or leave it out")
    source = held_out_source(arguments, settings)
    if asked and not source:
        raise InputError("`eval_strategy` asks for what `do_eval: false` leaves out: leave one of them out")
    if source:
        check_there(source, "held-out data")
    if arguments.extra_responses:
        check_there(arguments.extra_responses, "extra responses")


def models_of(arguments: Arguments, settings: dict[str, Any]) -> dict[str, str]:
    """The starting policy, `model`, and where the loss has one the `reference`."""
    policy = {"model": arguments.model_name_or_path}
    if is_reference_free(map(str, loss_types(settings))):
        return policy
    return policy | {"reference": arguments.ref_model or arguments.model_name_or_path}


def held_out_source(arguments: Arguments, settings: dict[str, Any]) -> str | None:
    """Where the pairs to evaluate on are, or None; `do_eval: false` leaves them alone."""
    return None if spelling(settings.get("do_eval")) is False else arguments.eval_dir


def records_of(arguments: Arguments) -> Iterator[tuple[str, Record]]:
    """("file:line", record) of every dataset, mixed at their rates."""
    split, probs = arguments.dataset_split, dataset_probs(arguments)
    return with_usual_keys(mixed_records(arguments.dataset_name_or_path, split, probs, arguments.seed), keys_of(arguments))


def keys_of(arguments: Arguments) -> dict[str, str | None]:
    """The names that the data gives to what is read of it."""
    return {"prompt": arguments.dataset_key, "chosen": arguments.chosen_key, "rejected": arguments.rejected_key}


def inputs_of(
    arguments: Arguments, models: dict[str, str], held_out: str | None, pairs_path: Path, metrics_path: Path,
    earlier: list[Path],
) -> dict[str, str | Path]:  # fmt: skip
    """What the run reads, its `models` among it, by name, for the manifest.

    Raises InputError where a file that it writes would replace one.
    """
    inputs: dict[str, str | Path] = {**models}
    inputs |= source_inputs("data", arguments.dataset_name_or_path) | template_input(arguments.chat_template)
    inputs |= {"held-out data": held_out} if held_out else {}
    inputs |= {"extra responses": arguments.extra_responses} if arguments.extra_responses else {}
    refuse_input(pairs_path, inputs, "--pairs_path", arguments.output_dir)
    refuse_input(metrics_path, inputs | {"pairs_path": pairs_path}, "--metrics_path", arguments.output_dir)
    return inputs | {f"pairs of {path.parent.name}": path for path in earlier}


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's DPOConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, list(models_of(arguments, settings).values()), ahead=arguments.check)
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of
    from dpo_iteration.checks import check_training
    from dpo_iteration.margin import check_offset
    from dpo_iteration.own_losses import check_own_losses

    settings = settings | {"max_length": arguments.max_length, "seed": arguments.seed}
    adapter, kept = arguments.use_peft, arguments.keep_checkpoints
    config = trainer_config(config_class(), settings, Arguments.model_fields, stage, adapter, kept)
    check_training(arguments, config, sharding_of(config))
    for name in ("margin_scale", "length_alpha"):
        check_offset(config, name, getattr(arguments, name))
    check_own_losses(config, loss_numbers(arguments), arguments.margin_scale)
    return config


def rows_of(
    arguments: Arguments, pairs_path: Path, earlier: list[Path], chosen: Account, tokenizer: Any, config: Any
) -> tuple[Any, Account]:
    """The token ids of the pairs in `pairs_path` and `earlier`, a dataset, and the account of `chosen` continued by them.

    Raises InputError if no pair is left.
    """
    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    account = copy.deepcopy(chosen)
    make = partial(rows_of_pairs, tokenizer, arguments.max_length, arguments.max_prompt_length)

    def token_ids():
        pairs = chain(jsonl.read(pairs_path), pairs_again(earlier, account.counted))
        total = None if earlier else account.counted[IN] - account.drops.counts.total()
        return at_least_one(tokenised(make, pairs, account.drops, account.counted, total), str(pairs_path), account.drops)

    return rows_on_disk(token_ids, config, "pairs", pair_features()), account


def held_out_rows(arguments: Arguments, source: str, tokenizer: Any, config: Any) -> tuple[Any, Account]:
    """The token ids of the pairs to evaluate on, a dataset, and their account. Raises InputError if there is no pair.

    They are not filtered, so that their difficulty does not depend on how pairs are chosen for the training.
    """
    from baton.training.rows import rows_on_disk

    account = Account()
    make = partial(rows_of_pairs, tokenizer, arguments.max_length, arguments.max_prompt_length)

    def token_ids():
        settings = PairSettings(choose_type="random", seed=arguments.seed)
        records = with_usual_keys(read_records(source, arguments.dataset_split), keys_of(arguments))
        pairs = choose_pairs(records, settings, account.drops, account.counted, arguments.score_key)
        first = ((source, pair) for pair in islice(pairs, HELD_OUT_PAIRS))
        return at_least_one(make(first, account.drops, account.counted), source, account.drops)

    rows = rows_on_disk(token_ids, config, "held_out", pair_features())
    if program.rank() == 0 and source in split_sources(arguments.dataset_name_or_path):
        log.warning("`eval_dir` is data that is trained on, so what is evaluated is not held out")
    log.info("evaluating on %d pairs, dropped: %s", len(rows), account.drops)
    return rows, account


def pair_features() -> Any:
    """The columns of `rows_of_pairs`: not every pair has a margin."""
    from datasets import Features, List, Value

    token_ids = {name: List(Value("int64")) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return Features({**token_ids, "margin": Value("float64")})


def check_margins(without: int, margin_scale: float, losses: list[str]) -> None:
    """Raise InputError where a loss needs margins and so many pairs are `without` one."""
    needs = "`margin_scale`" if margin_scale else ", ".join(name for name in losses if name in OF_MARGINS)
    if needs and without:
        raise InputError(
            f"{needs} needs the margin of every pair, but {without} pairs have neither `margin` nor `chosen_reward` and "
            "`rejected_reward`; leave them out, or choose another loss"
        )


def make_trainer(
    arguments: Arguments, config: Any, tokenizer: Any, dataset: Any, held_out: Any | None, reference: str | None, folder: Path
) -> Any:
    """The trainer, its models loaded: the reference first, and alone, for its log-probabilities, which are kept in `folder`.

    Logs the memory that this takes, before anything is loaded. `held_out` are rows to evaluate on. Without a `reference` the
    loss has none.
    """
    from datasets import concatenate_datasets

    from baton.training.memory import check_memory, estimate, estimate_reference, largest_batch, outline, sharding_of
    from baton.training.reference import dataset_reference_logps, load
    from dpo_iteration.checks import check_pairs
    from dpo_iteration.trainer import REMEDY, PackedDPOTrainer, needs_whole_batches, why_padded

    packed, free = arguments.forward == "packed", reference is None
    if free:
        log.info("loss_type %s: no reference is loaded", ", ".join(config.loss_type))
    adapter, quantization = adapter_config(arguments), quantization_config(arguments, config)
    # With an adapter, TRL's own forward pass gets the reference by switching the adapter off.
    in_memory = not packed and not free and not (adapter and reference == arguments.model_name_or_path)
    outlined, in_4_bit = outline(arguments.model_name_or_path, adapter), quantization is not None
    by_rows = packed and not why_padded(outlined) and not needs_whole_batches(outlined, config)
    check_pairs(len(dataset), config, by_rows)
    tokens = largest_batch(dataset, config, packed, arguments.tokens_per_row if by_rows else None)
    needs = estimate(outlined, config, sharding_of(config), tokens, in_4_bit=in_4_bit, reference=in_memory)
    first = estimate_reference(outlined, config, sharding_of(config), in_4_bit=in_4_bit) if packed and not free else None
    check_memory(needs, config, first)
    if packed and not free:
        columns = ("chosen_ids", "rejected_ids")
        every = dataset if held_out is None else concatenate_datasets([dataset, held_out])
        logps = dataset_reference_logps(every, columns, reference, config, folder, quantization, remedy=REMEDY)
        dataset, rest = with_logps(dataset, logps), logps[len(dataset) :]
        held_out = None if held_out is None else with_logps(held_out, rest)
    return PackedDPOTrainer(
        model=arguments.model_name_or_path,
        ref_model=load(reference, config, quantization) if in_memory else None,
        peft_config=adapter,
        quantization_config=quantization,
        args=config,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=tokenizer,
        packed=packed,
        margin_scale=arguments.margin_scale,
        numbers=loss_numbers(arguments),
        tokens_per_row=arguments.tokens_per_row,
        compile_layers=arguments.compile,
    )


def with_logps(rows: Any, logps: Any) -> Any:
    """Rows with the first of the reference's log-probabilities (…, 2) as columns."""
    chosen, rejected = logps[: len(rows)].T
    return rows.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)


def main() -> None:
    arguments, settings = parse_training("dpo_iteration/run_dpo.py", Arguments, __doc__, config_class, rewrite=own_names)
    check(arguments, settings)
    output = Path(arguments.output_dir)
    pairs_path = Path(arguments.pairs_path or f"{output}.pairs.jsonl")
    metrics_path = metrics_file(output, arguments.metrics_path)
    earlier = earlier_pairs(pairs_path, arguments.history)
    source = held_out_source(arguments, settings)
    models = models_of(arguments, settings)
    inputs = inputs_of(arguments, models, source, pairs_path, metrics_path, earlier)
    checked = partial(checked_config, arguments, settings)
    if arguments.use_peft and not arguments.merge_adapter:
        note_adapter(output)
    deciding = settings | split_that_decides(settings, arguments.forward == "packed")
    stage = Stage.begin("dpo", arguments, output, inputs, deciding, config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    config = checked(stage)

    from baton.training.checkpoints import SCRATCH, keep_checkpoints, last_evaluation, stop_at_end_of_turn, train
    from baton.training.config import log_training

    chosen = Account()
    if program.rank() == 0:  # with the process group there, or another machine would not notice that this fails
        data, most = arguments.dataset_name_or_path, arguments.max_training_samples
        extra = extra_responses(arguments.extra_responses, arguments.dataset_split)
        how, least, score = pair_settings(arguments), arguments.min_edit_distance, arguments.score_key
        chosen = write_pairs(pairs_path, records_of(arguments), data, how, most, score, least, extra)
    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)
    dataset, account = rows_of(arguments, pairs_path, earlier, chosen, tokenizer, config)
    held_out, held_out_account = held_out_rows(arguments, source, tokenizer, config) if source else (None, Account())
    if program.rank() == 0:
        log_rows(dataset, tokenizer, account.drops, account.counted)
        without = account.counted[NO_MARGIN] + held_out_account.counted[NO_MARGIN]
        check_margins(without, arguments.margin_scale, config.loss_type)
    place_reports(settings, metrics_path)
    with loading(*models.values()):
        trainer = make_trainer(arguments, config, tokenizer, dataset, held_out, models.get("reference"), pairs_path.parent)
    log_training(trainer)
    counts = {"in": account.counted[IN], "out": len(dataset), "dropped": dict(account.drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    if program.rank() == 0:
        if arguments.merge_adapter:
            metrics |= merge_adapter(arguments.model_name_or_path, stage.partial_folder, config, arguments.export_dtype)
        where, first = next(chain(jsonl.read(pairs_path), *map(jsonl.read, earlier)))
        conversation = [*first["prompt"], {"role": "assistant", "content": first["chosen"]}]
        finish = partial(stop_at_end_of_turn, tokenizer=tokenizer, messages=conversation, where=where)
        finish(stage.partial_folder)
        keep_checkpoints(trainer, arguments, stage.partial_folder, finish)
        log.info("pairs: %s", in_words(account.counted))
        if held_out is not None:
            metrics |= last_evaluation(trainer)
        counts = {"records_in": account.counted[IN], "records_out": len(dataset), "drops": account.drops}
        stage.finish(**counts, pairs=account.facts, metrics=metrics, scratch=SCRATCH)
        if warning := template_warning(account.counted, tokenizer):
            log.warning("%s", warning)


if __name__ == "__main__":
    program.run(main)
