"""Settings and data that DPO and KTO cannot train on, refused before a model is loaded. What all refuse comes first."""

from typing import Any

from baton.errors import InputError
from baton.parallel import data_parallel
from baton.training.checks import check_kept, check_order, check_settings
from baton.training.compiling import obstacle
from baton.training.memory import Sharding


def check_training(arguments: Any, config: Any, sharding: Sharding) -> None:
    """Raise InputError for a combination of settings that cannot train.

    Args:
        arguments: those of run_dpo.py.
        config: a DPOConfig.
    """
    check_settings(config, sharding, arguments, evaluates=bool(arguments.eval_dir or arguments.eval_every))
    check_kept(arguments, config, sharding)
    if arguments.compile == "on":
        reason = obstacle(config, sharding, arguments.load_in_4bit)
        if arguments.forward == "trl":
            reason = "`forward`: trl stays TRL's own"
        if reason:
            raise InputError(f"`compile`: on, but {reason}; set it to auto or off")
    if "exo_pair" in config.loss_type and not config.label_smoothing:
        raise InputError("`loss_type` exo_pair needs `label_smoothing` above 0, such as 0.001")
    if arguments.forward == "packed":
        check_order(config, "leave it out, or add --forward trl")
        check_noise(config, "leave it out, or add --forward trl")
    if config.sync_ref_model and arguments.forward == "packed":
        raise InputError("`sync_ref_model` changes the reference, whose log-probabilities are computed once; add --forward trl")
    if config.sync_ref_model and arguments.use_peft:
        raise InputError("`sync_ref_model` does not go with `use_peft`, whose reference is the model without the adapter")


def check_noise(config: Any, remedy: str) -> None:
    """Raise InputError for NEFTune's noise, which Transformers divides by the length of a row, as if it were one text."""
    if config.neftune_noise_alpha:
        raise InputError(f"`neftune_noise_alpha` would take a packed row for one text: {remedy}")


def check_count(count: int, config: Any, dealt: bool, what: str = "pairs") -> None:
    """Raise InputError where there are too few pairs for one step, or, where they are not `dealt`, for one batch on every rank.

    Accelerate would give some ranks pairs of the others, which then count twice; with `dataloader_drop_last` there would be
    no step at all. `what` they are is said in the message.
    """
    ranks, size = data_parallel().size, config.per_device_train_batch_size
    batch, says = ranks * size, f"{ranks} processes x `per_device_train_batch_size` {size}"
    if dealt:
        batch *= config.gradient_accumulation_steps
        says += f" x `gradient_accumulation_steps` {config.gradient_accumulation_steps}"
    if count < batch and (config.dataloader_drop_last or (ranks > 1 and not dealt)):
        raise InputError(f"{count} {what} are fewer than one batch: {says}; use fewer processes or a smaller batch")
