"""One round of DPO: annotated responses (or offline preferences) in, pairs and the next policy out.

    python dpo_iteration/run_dpo.py configs/training.yaml                                             # one process
    accelerate launch --config_file configs/zero2.yaml dpo_iteration/run_dpo.py configs/training.yaml # eight GPUs

Every field of TRL's DPOConfig is accepted in the YAML file and as a flag (`beta`, `loss_type`, `label_smoothing`, …). The
reference policy's log-probabilities are computed once, before the policy is loaded, and kept beside the output. With
`--use_peft` an adapter is trained; `--merge_adapter` writes it merged into the policy, as the next round needs it.
"""

import logging
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from baton import jsonl, program
from baton.arguments import option, parse_with_rest
from baton.errors import InputError
from baton.fingerprint import fingerprint
from baton.pairs import ChooseType, PairSettings
from baton.stage import Drops, Stage
from baton.templates import check_model_path, load_tokenizer
from dpo_iteration.lora import LoraArguments, adapter_config, check_lora, merge_adapter, quantization_config
from dpo_iteration.rows import choose_pairs, token_rows

log = logging.getLogger("baton")


class Arguments(LoraArguments):
    """What this program adds to DPOConfig."""

    model_name_or_path: str = option(..., "the policy that this round starts from", changes_result=False)
    ref_model: str | None = option(None, "the reference policy; default: the starting policy", changes_result=False)
    dataset_name_or_path: str = option(
        ..., "annotated responses (`prompt`, `responses`, `rewards`) or preferences (`chosen`, …)", changes_result=False
    )
    dataset_split: str = option("train", "split of a Hugging Face dataset")
    output_dir: str = option(..., "folder of the finished policy", changes_result=False)
    pairs_path: str | None = option(None, "file for the chosen pairs; default: <output_dir>.pairs.jsonl", changes_result=False)
    choose_type: ChooseType = option("max_min", "which two responses of a prompt make a pair")
    len_penalty: float = option(0.0, "subtracted from the reward per character, with choose_type max_min_p", ge=0)
    pairs_per_prompt: int = option(1, "most pairs of one prompt; each response is in at most one", ge=1)
    min_margin: float = option(0.0, "smallest difference of rewards that makes a pair", ge=0)
    max_length_ratio: float | None = option(None, "longest over shortest response of a pair, in characters", ge=1)
    drop_truncated: bool = option(False, "leave out responses that were cut off by length")
    margin_scale: float = option(0.0, "weight of the reward margin as an offset in the sigmoid loss", ge=0)
    max_length: int = option(2048, "longest prompt and response together, in tokens; responses are cut to fit", ge=2)
    max_prompt_length: int = option(1024, "longest prompt, in tokens; longer ones are dropped and counted", ge=1)
    chat_template: str | None = option(None, "Jinja file that replaces the tokenizer's chat template")
    seed: int = option(42, "seed of the training and of random pairs")
    forward: Literal["packed", "trl"] = option("packed", "packed rows that share prefixes, or TRL's own padded batches")
    tokens_per_row: int = option(4096, "most tokens of a packed row; a step runs as many rows as its pairs fill", ge=1)


def pair_settings(arguments: Arguments) -> PairSettings:
    """How pairs are chosen, checked. Raises InputError on a combination that makes no sense."""
    names = PairSettings.__dataclass_fields__
    return PairSettings(**{name: getattr(arguments, name) for name in names})


def config_class() -> type:
    from trl import DPOConfig

    return DPOConfig


def load(model: str, config: Any, quantization: Any) -> Any:
    """A causal language model as TRL loads it, all of it on this process's device."""
    from trl.trainer.utils import create_model_from_path

    settings = dict(config.model_init_kwargs or {})
    if quantization is not None:
        settings["quantization_config"] = quantization
    if config.device.type == "cuda":
        settings["device_map"] = {"": config.device}  # TRL's default spreads a model over all GPUs
    return create_model_from_path(model, **settings).to(config.device)


def with_reference_logps(dataset: Any, reference: str, config: Any, quantization: Any, folder: Path) -> Any:
    """The rows with the columns `ref_chosen_logps` and `ref_rejected_logps`, in the precision of the training."""
    import torch

    from dpo_iteration.reference import kept_reference_logps, unsharded

    pairs = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in dataset]
    key = [fingerprint(reference)["hash"], f"bf16={config.bf16} fp16={config.fp16} {config.model_init_kwargs} {quantization}"]
    dtype = torch.float16 if config.fp16 else torch.bfloat16
    with unsharded(config), torch.autocast(config.device.type, dtype, enabled=config.bf16 or config.fp16):
        logps = kept_reference_logps(
            pairs, lambda: load(reference, config, quantization), folder, key, ld_alpha=config.ld_alpha
        )
    return dataset.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])


def main() -> None:
    arguments, settings = parse_with_rest(Arguments, __doc__, config_class)
    choosing = pair_settings(arguments)
    if arguments.max_prompt_length >= arguments.max_length:
        raise InputError("`max_prompt_length` must be smaller than `max_length`: no token would be left for the response")
    check_lora(arguments)
    reference = arguments.ref_model or arguments.model_name_or_path
    for model in (arguments.model_name_or_path, reference):
        check_model_path(model)
    inputs = {"model": arguments.model_name_or_path, "reference": reference, "data": arguments.dataset_name_or_path}
    output = Path(arguments.output_dir)
    stage = Stage.begin("dpo", arguments, output, inputs, settings)
    if stage is None:
        return
    program.check_processes()

    pairs_path = Path(arguments.pairs_path or f"{output}.pairs.jsonl")
    drops: Drops = Drops()
    counted: Counter[str] = Counter()
    if program.rank() == 0:
        pairs = choose_pairs(arguments.dataset_name_or_path, arguments.dataset_split, choosing, drops, counted)
        if jsonl.write(pairs_path, pairs) == 0:
            raise InputError(f"{arguments.dataset_name_or_path}: no pair is left; dropped: {drops}")

    from baton import training
    from dpo_iteration.checks import check_pairs, check_training
    from dpo_iteration.memory import check_memory, estimate, largest_batch, outline, sharding_of
    from dpo_iteration.trainer import PackedDPOTrainer

    settings |= {"max_length": arguments.max_length, "seed": arguments.seed}
    config = training.trainer_config(config_class(), settings, Arguments.model_fields, stage)
    sharding = sharding_of(config)
    check_training(arguments, config, sharding)
    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)

    def rows():
        return token_rows(pairs_path, tokenizer, arguments.max_length, arguments.max_prompt_length, drops, counted)

    dataset = training.rows_on_disk(rows, config, "pairs")
    if len(dataset) == 0:
        raise InputError(f"{pairs_path}: no pair is left; dropped: {drops}")
    check_pairs(len(dataset), config)
    packed = arguments.forward == "packed"
    adapter, quantization = adapter_config(arguments), quantization_config(arguments, config)
    # With an adapter, TRL's own forward pass gets the reference by switching the adapter off.
    in_memory = not packed and not (adapter and reference == arguments.model_name_or_path)
    needs = estimate(
        outline(arguments.model_name_or_path, adapter), config, sharding, largest_batch(dataset, config, packed),
        in_4_bit=quantization is not None, reference=in_memory,
    )  # fmt: skip
    check_memory(needs, config)
    if packed:
        dataset = with_reference_logps(dataset, reference, config, quantization, pairs_path.parent)
    trainer = PackedDPOTrainer(
        model=arguments.model_name_or_path,
        ref_model=load(reference, config, quantization) if in_memory else None,
        peft_config=adapter,
        quantization_config=quantization,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        packed=packed,
        margin_scale=arguments.margin_scale,
        tokens_per_row=arguments.tokens_per_row,
    )
    training.log_training(trainer)

    def export(folder: Path) -> None:
        if arguments.merge_adapter:
            merge_adapter(arguments.model_name_or_path, folder, config)

    metrics = training.train(trainer, stage, export)
    if program.rank() == 0:
        log.info("pairs: %s", ", ".join(f"{count} {name}" for name, count in counted.items() if name != "in"))
        stage.finish(records_in=counted.pop("in"), records_out=len(dataset), drops=drops, pairs=dict(counted), metrics=metrics)


if __name__ == "__main__":
    program.run(main)
