"""The settings of Online-RLHF's files: those that have another name here, and those that cannot be followed."""

from typing import Any

from baton.errors import InputError
from baton.task import spelling

SANITY_CHECK = 100  # pairs


def own_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of one source (a YAML file, or flags) by the names of run_dpo.py.

    `train_dir` is `dataset_name_or_path`; `sanity_check` is `max_training_samples: 100`. What says only what is done here
    anyway is left out. Raises InputError for what cannot be done, and for two names of one thing with different values.
    """
    settings = dict(settings)
    if "train_dir" in settings:
        train_dir = settings.pop("train_dir")
        if settings.setdefault("dataset_name_or_path", train_dir) != train_dir:
            raise InputError(
                f"`train_dir` ({train_dir}) and `dataset_name_or_path` ({settings['dataset_name_or_path']}) are two names of "
                "one setting: leave one out"
            )
        if "margin_scale" in settings:
            raise InputError(
                "`margin_scale` beside `train_dir`: Online-RLHF scales its column `margin` by it, and here it is the weight of "
                "the reward margin in the loss: leave it out, or name the data with `dataset_name_or_path`"
            )
    if spelling(settings.pop("sanity_check", False)):
        if "max_training_samples" in settings:
            raise InputError(f"`sanity_check` trains on {SANITY_CHECK} pairs, `max_training_samples` on others: leave one out")
        settings["max_training_samples"] = SANITY_CHECK
    settings.pop("mask_prompt", None)  # the loss never reads a prompt's tokens; those of a pair would cancel out
    if not spelling(settings.pop("eos_padding", True)):
        raise InputError("`eos_padding: false` adds a padding token to the vocabulary, and none is needed here: leave it out")
    if spelling(settings.pop("eot_token", "")):
        raise InputError(
            "`eot_token`: a response ends with the token that was sampled, or else with that of the chat template: leave it "
            "out, or give another template with --chat_template"
        )
    if spelling(settings.pop("ignore_bias_buffers", False)):
        raise InputError("`ignore_bias_buffers`: DDP sends all buffers here: leave it out")
    if "do_train" in settings and not spelling(settings["do_train"]):
        raise InputError("`do_train: false`: this program does nothing else: leave it out")
    return settings
