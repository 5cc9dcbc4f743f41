"""A weighted sum of models of one shape: a reference that follows the policy, an extrapolation, a merge of several rounds.

    python dpo_iteration/mix_models.py --models NEW OLD --weights 0.6 0.4 --output_dir MIXED

- TR-DPO's soft update of the reference (arXiv 2404.09656): `--models POLICY REFERENCE --weights 0.6 0.4`.
- ExPO's extrapolation of an alignment (arXiv 2404.16792): `--models TRAINED START --weights 1.3 -0.3`.
- A merge of rounds: `--models ROUND1 ROUND2 ROUND3 --weights 0.3 0.3 0.4`.

The weights sum to 1. Sums are made in float32, a tensor at a time, so memory holds one file of weights (2 GiB) and no model.
Configuration, tokenizer and whatever is no floating-point number are those of the first model. `--output_dir` is a folder.
"""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from baton import program
from baton.arguments import StageArguments, option, parse
from baton.errors import InputError
from baton.sources import check_hub, check_start, loading
from baton.stage import Stage
from baton.training.arguments import ExportDtype

log = logging.getLogger("baton")

NEAR_1 = 1e-6
NAMED = 3  # tensors that a message names


class Arguments(StageArguments):
    models: list[str] = option(..., "folders or hub names of models of one shape", min_length=1, changes_result=False)
    weights: list[float] = option(..., "the weight of each model; together 1, some may be negative", min_length=1)
    output_dir: str = option(..., "folder of the mixed model", changes_result=False)
    export_dtype: ExportDtype = option(
        "checkpoint", "dtype that is written: `checkpoint`, that of the first model, or `float32`"
    )


def check(arguments: Arguments) -> None:
    """Raise InputError for what can be refused before anything is read."""
    models, weights = arguments.models, arguments.weights
    if len(models) != len(weights):
        raise InputError(f"`weights`: {len(weights)} for {len(models)} models; give one for each")
    if not abs(sum(weights) - 1) <= NEAR_1:
        raise InputError(f"`weights` must sum to 1, not {sum(weights):g}")
    for model in models:
        check_start(model)
        check_hub(model, ahead=arguments.check)


def mix(models: list[str], weights: list[float], folder: Path, dtype: ExportDtype) -> int:
    """Write the weighted sum of the models to `folder`, whose files of weights are replaced; returns the number of tensors.

    Raises InputError for models without safetensors files, or of other tensors than the first.
    """
    import torch

    from baton.training.export import Checkpoint, Shards

    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoint(model)) for model in models]
        first = checkpoints[0]
        check_tensors(checkpoints)
        shards = Shards(folder)
        for name in first.files:
            value = first.files[name].get_tensor(name)
            if value.is_floating_point():
                total = weights[0] * value.float()
                for checkpoint, weight in zip(checkpoints[1:], weights[1:], strict=True):
                    total += weight * checkpoint.files[name].get_tensor(name).float()
                value = total if dtype == "float32" else total.to(value.dtype)
            shards.add(name, value)
        shards.close()
    write_rest(models[0], folder, torch.float32 if dtype == "float32" else first.dtype)
    return len(first.files)


def check_tensors(checkpoints: list[Any]) -> None:
    """Raise InputError where the checkpoints do not hold tensors of the same names and shapes."""
    first = checkpoints[0]
    for checkpoint in checkpoints:
        if not checkpoint.files:
            raise InputError(f"{checkpoint.model}: has no safetensors files; load it with Transformers and save it again")
        if other := sorted(first.files.keys() ^ checkpoint.files.keys()):
            raise InputError(f"{checkpoint.model}: has other tensors than {first.model}: {named(other)} stand in one alone")
        if other := [name for name in first.files if shape_of(first, name) != shape_of(checkpoint, name)]:
            raise InputError(f"{checkpoint.model}: has other shapes than {first.model}: {named(other)}")


def shape_of(checkpoint: Any, name: str) -> list[int]:
    return checkpoint.files[name].get_slice(name).get_shape()


def named(names: list[str]) -> str:
    """The first few of the names as a text."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def write_rest(model: str, folder: Path, dtype: Any) -> None:
    """Write what a model has beside its weights: configurations, which say that the weights have this dtype, and tokenizer."""
    from transformers import AutoConfig, GenerationConfig

    from baton.models.templates import load_tokenizer

    configuration = AutoConfig.from_pretrained(model)
    for part in (configuration, *(getattr(configuration, name, None) for name in configuration.sub_configs)):
        if part is not None:
            part.dtype = dtype
    configuration.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    try:
        generation = GenerationConfig.from_pretrained(model)
    except OSError:  # not every model has one
        return
    generation.save_pretrained(folder)


def main() -> None:
    arguments = parse(Arguments, __doc__ or "")
    check(arguments)
    inputs = {f"model {number}": model for number, model in enumerate(arguments.models, 1)}
    stage = Stage.begin("mix", arguments, Path(arguments.output_dir), inputs)
    if stage is None:
        return
    program.log_what_runs(device="cpu", dtype="float32", models=len(arguments.models))
    with loading(*arguments.models):
        tensors = mix(arguments.models, arguments.weights, stage.partial_folder, arguments.export_dtype)
    stage.finish(records_in=tensors, records_out=tensors)


if __name__ == "__main__":
    program.run(main)
