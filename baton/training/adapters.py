"""LoRA and QLoRA: their settings, and an adapter merged into a plain model folder.

The names are those of TRL's ModelConfig. Nothing heavy is imported with this file, since arguments are read from it.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from baton.arguments import option
from baton.errors import InputError
from baton.training.arguments import ExportDtype, TrainingProgramArguments

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class LoraArguments(TrainingProgramArguments):
    """Arguments of a program that can train an adapter instead of the whole model."""

    use_peft: bool = option(
        False, "train a LoRA adapter; the model itself stays as it is, and is the reference where there is one"
    )
    lora_r: int = option(16, "rank of the adapter's matrices", ge=1)
    lora_alpha: int = option(32, "the adapter's output is multiplied by lora_alpha / lora_r", ge=1)
    lora_dropout: float = option(
        0.0, "dropout in the adapter, a share; where the trainer has `disable_dropout` it needs to be false", ge=0, lt=1
    )
    lora_target_modules: str | list[str] | None = option(
        None, "names of the modules that get an adapter, or `all-linear`; default: PEFT's choice for the architecture"
    )
    load_in_4bit: bool = option(False, "QLoRA: the frozen model in 4 bits (NF4); needs a CUDA GPU and bitsandbytes")
    merge_adapter: bool = option(False, "write the model with the adapter merged in, a plain folder, not the adapter alone")
    export_dtype: ExportDtype | None = option(
        None,
        "dtype of the finished model's weights: `checkpoint`, that of the model that training started from, or `float32`, "
        "which keeps updates that bfloat16 rounds away and takes twice the disk; default: checkpoint, but float32 with "
        "merge_adapter, since an adapter changes each weight so little that bfloat16 loses part of it; an adapter that is not "
        "merged stays as it was trained",
    )

    @model_validator(mode="after")
    def _keep_what_is_merged(self) -> "LoraArguments":
        if self.export_dtype is None:
            self.export_dtype = "float32" if self.merge_adapter else "checkpoint"
        return self


def check_lora(arguments: LoraArguments) -> None:
    """Raise InputError for a setting that would be ignored without `use_peft`, or a missing part of QLoRA."""
    names = LoraArguments.model_fields.keys() - TrainingProgramArguments.model_fields.keys() - {"use_peft"}
    default = {name: field.default for name, field in LoraArguments.model_fields.items()}
    for name in sorted(names):
        if not arguments.use_peft and getattr(arguments, name) != default[name]:
            raise InputError(f"`{name}` acts with `use_peft` only: add --use_peft, or leave it out")
    if not arguments.load_in_4bit:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("`load_in_4bit` needs bitsandbytes in the training environment: pip install bitsandbytes")
    from transformers.utils import is_torch_cuda_available

    if not is_torch_cuda_available():
        raise InputError("`load_in_4bit` needs a CUDA GPU, and this machine has none; LoRA without it runs anywhere")


def adapter_config(arguments: LoraArguments, task: str = "CAUSAL_LM") -> Any:
    """PEFT's configuration of the adapter, or None where the whole model is trained.

    With the `task` SEQ_CLS, a reward model's, the score head is trained too, and stands in the adapter.
    """
    from trl import ModelConfig, get_peft_config

    names = ("use_peft", "lora_r", "lora_alpha", "lora_dropout")
    settings = ModelConfig(**{name: getattr(arguments, name) for name in names}, lora_task_type=task)
    modules = arguments.lora_target_modules
    # Set after ModelConfig's own check, which makes a list of one name a text, and so a pattern for PEFT.
    settings.lora_target_modules = "all-linear" if modules == ["all-linear"] else modules
    return get_peft_config(settings)


def quantization_config(arguments: LoraArguments, config: Any) -> Any:
    """Transformers' 4-bit configuration, computing in the precision of the training `config`, or None."""
    from trl import ModelConfig, get_quantization_config

    from baton.training.config import computing_dtype

    return get_quantization_config(ModelConfig(load_in_4bit=arguments.load_in_4bit, dtype=computing_dtype(config)))


def merge_adapter(
    model: str,
    folder: Path,
    config: Any,
    dtype: ExportDtype,
    pad_token_id: int | None = None,
    outputs: Sequence[str] | None = None,
) -> dict[str, float]:
    """Replace the adapter in `folder` by `model` with the adapter merged in, a plain Hugging Face folder.

    The model is loaded on the CPU and merged in float32, and not in 4 bits: QLoRA's merged policy differs from the trained one
    by the rounding to 4 bits. Returns what the rounding to `dtype` takes away of the update (`export.Rounding.facts`). To be
    called by process 0, when `folder` is complete.

    Args:
        pad_token_id: of a reward model, a sequence classifier; None: a causal language model.
        outputs: names of the reward model's outputs; None: it has one without a name.
    """
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.utils import create_model_from_path

    from baton.training.export import tensors_of, write_model
    from baton.training.sharding import unsharded

    given, architecture = {**(config.model_init_kwargs or {}), "device_map": None, "dtype": "float32"}, None
    if pad_token_id is not None:
        given, architecture = given | settings_of_outputs(outputs), AutoModelForSequenceClassification
    with unsharded(config):
        base = create_model_from_path(model, architecture, **given)
        if pad_token_id is not None:
            base.config.get_text_config().pad_token_id = pad_token_id
        merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload(safe_merge=True)
        facts = write_model(merged, tensors_of(merged), folder, model, dtype)
    for name in ADAPTER_FILES:
        (folder / name).unlink()
    return facts


def settings_of_outputs(outputs: Sequence[str] | None) -> dict[str, Any]:
    """The settings of a classifier's configuration that give it these outputs; None: one without a name."""
    if outputs is None:
        return {"num_labels": 1}
    numbers = {name: number for number, name in enumerate(outputs)}
    return {"num_labels": len(outputs), "id2label": dict(enumerate(outputs)), "label2id": numbers}
