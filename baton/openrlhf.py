"""OpenRLHF's names of settings that mean the same in the programs that are not PPO, and those that something else decides."""

from collections.abc import Collection
from typing import Any

from baton.errors import InputError
from baton.parallel import data_parallel
from baton.task import spelling

NAMES = {
    "pretrain": "model_name_or_path",
    "ref_pretrain": "ref_model",
    "dataset": "dataset_name_or_path",
    "input_key": "dataset_key",
    "save_path": "output_dir",
    "output_path": "output_dir",
    "max_samples": "max_training_samples",
    "max_len": "max_length",
    "prompt_max_len": "max_prompt_length",
    "max_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "l2": "weight_decay",
    "max_norm": "max_grad_norm",
    "aux_loss_coef": "router_aux_loss_coef",
    "lora_rank": "lora_r",
    "target_modules": "lora_target_modules",
    "best_of_n": "K",
    "tp_size": "tensor_parallel_size",
}
# Settings that say what is done here anyway, where they have these values.
DONE_ANYWAY = {
    "apply_chat_template": True, "flash_attn": True, "packing_samples": True, "enable_prefix_caching": True,
    "unpaired_preference": True, "ref_offload": True,
}  # fmt: skip
ELSEWHERE = {
    "zero_stage": "`accelerate launch --config_file configs/zero2.yaml` decides how models are spread",
    "adam_offload": "`accelerate launch --config_file configs/zero2_offload.yaml` keeps the optimizer in RAM",
    "use_wandb": "`report_to: wandb`, with the key in WANDB_API_KEY",
    "greedy_sampling": "`temperature: 0` with `K: 1`",
    "vanilla_loss": "the first version of KTO is not there: leave it out",
}
WHOLE, MICRO = "train_batch_size", "micro_train_batch_size"


def own_names(settings: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Settings of one source (a YAML file, or flags) by the names of a program that knows the settings `known`.

    A name that the program itself has is left alone, and so is one whose counterpart it does not have. Raises InputError for
    what is decided elsewhere, and for two names of one thing.
    """
    settings = dict(settings)
    for name, own in NAMES.items():
        if name not in settings or name in known or own not in known:
            continue
        if own in settings:
            raise InputError(f"`{name}` and `{own}` are two names of one setting: leave one out")
        settings[own] = settings.pop(name)
        if name == "lora_rank":
            _adapter(settings)
    for name, value in DONE_ANYWAY.items():
        if name in settings and name not in known and spelling(settings.pop(name)) != value:
            raise InputError(f"`{name}` is always {value} here: leave it out")
    for name, advice in ELSEWHERE.items():
        if name in settings and name not in known:
            raise InputError(f"`{name}` of OpenRLHF: here {advice}")
    if "ipo" in settings and "loss_type" in known and spelling(settings.pop("ipo")):
        if "loss_type" in settings:
            raise InputError("`ipo` and `loss_type` both name a loss: leave one out")
        settings["loss_type"] = "ipo"
    return _batch(settings) if "per_device_train_batch_size" in known else settings


def _adapter(settings: dict[str, Any]) -> None:
    """OpenRLHF trains an adapter where its rank is above 0."""
    if not spelling(settings["lora_r"]):
        del settings["lora_r"]
    else:
        settings.setdefault("use_peft", True)


def _batch(settings: dict[str, Any]) -> dict[str, Any]:
    """The batch of a step over all processes, `train_batch_size`, as the factors of which the trainer makes it."""
    given = [name for name in (WHOLE, MICRO) if name in settings]
    if not given:
        return settings
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if name in settings:
            raise InputError(f"`{given[0]}` and `{name}` both say how large a batch is: leave one out")
    values = {name: spelling(settings.pop(name)) for name in given}
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"`{name}` must be a number from 1, got {value}")
    processes = data_parallel().size
    if WHOLE not in values:
        return settings | {"per_device_train_batch_size": values[MICRO]}
    micro = values.get(MICRO) or values[WHOLE] // processes
    if not micro or values[WHOLE] % (micro * processes):
        raise InputError(
            f"`{WHOLE}`: {values[WHOLE]} is no multiple of {processes} processes"
            + (f" x `{MICRO}` {micro}" if MICRO in values else "")
        )
    steps = values[WHOLE] // (micro * processes)
    return settings | {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}
