"""OpenRLHF's names of settings that mean the same here, and those that something else decides."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from baton.errors import InputError
from baton.parallel import data_parallel
from baton.task import spelling

# Those that every program has, PPO too, whose own are in ppo/openrlhf.py.
NAMES = {
    "pretrain": "model_name_or_path",
    "input_key": "dataset_key",
    "save_path": "output_dir",
    "prompt_max_len": "max_prompt_length",
    "lr_scheduler": "lr_scheduler_type",
    "l2": "weight_decay",
    "max_norm": "max_grad_norm",
    "lora_rank": "lora_r",
}
# Settings that say what is done here anyway, where they have these values.
DONE_ANYWAY = {"apply_chat_template": True, "flash_attn": True, "packing_samples": True, "enable_prefix_caching": True}
ELSEWHERE = {
    "zero_stage": "`accelerate launch --config_file configs/zero2.yaml` decides how models are spread",
    "adam_offload": "`accelerate launch --config_file configs/zero2_offload.yaml` keeps the optimizer in RAM",
    "use_wandb": "`report_to: wandb`, with the key in WANDB_API_KEY",
}
# Those of the programs that are not PPO.
NOT_PPO_NAMES = NAMES | {
    "ref_pretrain": "ref_model",
    "dataset": "dataset_name_or_path",
    "output_path": "output_dir",
    "max_samples": "max_training_samples",
    "max_len": "max_length",
    "max_epochs": "num_train_epochs",
    "aux_loss_coef": "router_aux_loss_coef",
    "target_modules": "lora_target_modules",
    "best_of_n": "K",
    "tp_size": "tensor_parallel_size",
}
NOT_PPO_DONE_ANYWAY = DONE_ANYWAY | {"unpaired_preference": True, "ref_offload": True}
NOT_PPO_ELSEWHERE = ELSEWHERE | {
    "greedy_sampling": "`temperature: 0` with `K: 1`",
    "vanilla_loss": "the first version of KTO is not there: leave it out",
}
WHOLE, MICRO = "train_batch_size", "micro_train_batch_size"
FACTORS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def own_names(
    settings: dict[str, Any], known: Collection[str], before: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Settings of one source (a YAML file, or flags) by the names of a program, not PPO, that knows the settings `known`.

    A name that the program itself has is left alone, and so is one whose counterpart it does not have. `before` are the
    settings of the source before, as they were written, which these override. Raises InputError as `renamed`.
    """
    names = {name: own for name, own in NOT_PPO_NAMES.items() if name not in known and own in known}
    done_anyway = {name: value for name, value in NOT_PPO_DONE_ANYWAY.items() if name not in known}
    elsewhere = {name: advice for name, advice in NOT_PPO_ELSEWHERE.items() if name not in known}
    of_an_adapter = "lora_rank" in settings and "lora_rank" in names
    settings = renamed(settings, names, done_anyway, elsewhere)
    if of_an_adapter:
        _adapter(settings)
    if "ipo" in settings and "loss_type" in known and spelling(settings.pop("ipo")):
        if "loss_type" in settings:
            raise InputError("`ipo` and `loss_type` both name a loss: leave one out")
        settings["loss_type"] = "ipo"
    return _batch(settings, before) if FACTORS[0] in known else settings


def renamed(
    settings: dict[str, Any], names: Mapping[str, str], done_anyway: Mapping[str, Any], elsewhere: Mapping[str, str]
) -> dict[str, Any]:
    """Settings of one source by our `names`, without those that say what is done anyway.

    Raises InputError for what is decided `elsewhere`, and for two names of one thing.
    """
    settings = dict(settings)
    for name, own in names.items():
        if name in settings:
            if own in settings:
                raise InputError(f"`{name}` and `{own}` are two names of one setting: leave one out")
            settings[own] = settings.pop(name)
    for name, value in done_anyway.items():
        if name in settings and spelling(settings.pop(name)) != value:
            raise InputError(f"`{name}` is always {value} here: leave it out")
    for name, advice in elsewhere.items():
        if name in settings:
            raise InputError(f"`{name}` of OpenRLHF: here {advice}")
    return settings


def _adapter(settings: dict[str, Any]) -> None:
    """OpenRLHF trains an adapter where its rank is above 0."""
    if not spelling(settings["lora_r"]):
        del settings["lora_r"]
    else:
        settings.setdefault("use_peft", True)


def _batch(settings: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The batch of a step over all processes, `train_batch_size`, as the factors of which the trainer makes it.

    Flags override the file name by name. A single factor as a flag beside the file's `train_batch_size` is refused: it would
    be multiplied by the other factor, which nobody gave.
    """
    given, factors = ([name for name in names if name in settings] for names in ((WHOLE, MICRO), FACTORS))
    if factors and (given or (WHOLE in before and len(factors) < len(FACTORS))):
        raise InputError(f"`{(given or [WHOLE])[0]}` and `{factors[0]}` both say how large a batch is: leave one out")
    if not given:
        return settings
    values = {name: spelling(source[name]) for name in (WHOLE, MICRO) for source in (before, settings) if name in source}
    if WHOLE not in values:
        raise InputError(
            f"`{MICRO}` splits a batch: give `{WHOLE}` beside it, in the same place (file or flags), or `{FACTORS[0]}` and "
            f"`{FACTORS[1]}` instead"
        )
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"`{name}` must be a number from 1, got {value}")
    processes = data_parallel().size
    micro = values.get(MICRO) or values[WHOLE] // processes
    if not micro or values[WHOLE] % (micro * processes):
        raise InputError(
            f"`{WHOLE}`: {values[WHOLE]} is no multiple of {processes} processes"
            + (f" x `{MICRO}` {micro}" if MICRO in values else "")
        )
    rest = {name: value for name, value in settings.items() if name not in given}
    return rest | dict(zip(FACTORS, (micro, values[WHOLE] // (micro * processes)), strict=True))
