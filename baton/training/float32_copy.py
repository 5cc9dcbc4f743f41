"""DeepSpeed's float32 copy of the weights that it trains: where it is without ZeRO, and how it gets what the start holds.

Under `bf16` and `fp16` DeepSpeed casts a model first and makes its float32 copy of what is left. A start in float32, such as
the policy of the round before, has bits that the cast drops: they are read from its files and put into the copy.
"""

import logging
from collections.abc import Collection, Mapping
from itertools import accumulate, groupby
from math import prod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from baton.training.export import Checkpoint, layer_of

log = logging.getLogger("baton")


@torch.no_grad()
def start_from_files(model: PreTrainedModel, copies: Mapping[int, Tensor], anew: Collection[str] = ()) -> None:
    """Set DeepSpeed's float32 copy of a model's trained weights from the files of the checkpoint that it was loaded from.

    To be called by every process before the first step. Weights whose dtype the files have already are left alone, and so
    are those that the files do not hold, such as a reward model's new head.

    Args:
        model: inside DeepSpeed's engine, in a half precision.
        copies: those of `copies_without_zero`.
        anew: names of modules whose weights are not those of the files any more.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    trained = [(name, weight) for name, weight in trained if not set(name.split(".")) & set(anew)]
    dtypes = {weight.dtype for _, weight in trained}
    if torch.float32 in dtypes:  # nothing was cast
        return
    count, found = sum(prod(shape_of(weight)) for _, weight in trained), 0
    with Checkpoint(model.name_or_path) as checkpoint:
        if checkpoint.dtypes <= dtypes:
            return
        for _, named in groupby(trained, key=lambda named: layer_of(named[0])):
            layer = dict(named)
            for name, value in layer_in_files(model, layer, checkpoint).items():
                set_copy(layer[name], value, copies)
                found += value.numel()
    log.info("DeepSpeed's float32 copy: %.1f %% of its weights are those of %s, unrounded", 100 * found / count,
             model.name_or_path)  # fmt: skip


def layer_in_files(model: PreTrainedModel, layer: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The values that a checkpoint's files have for some weights of a model, by name; without those that they do not hold.

    Transformers renames tensors when it loads them and joins those of a layer's experts. Where each number goes, the way back
    says: it is applied to the numbers' places.
    """
    shapes = {name: shape_of(weight) for name, weight in layer.items()}
    outline = revert_weight_conversion(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    tensors = ((name, checkpoint.tensor(name), part.shape) for name, part in outline.items())
    held = ((name, tensor) for name, tensor, shape in tensors if tensor is not None and tensor.shape == shape)
    if outline.keys() == shapes.keys():
        return dict(held)
    ends = list(accumulate(map(prod, shapes.values())))
    places = torch.arange(ends[-1]).tensor_split(ends[:-1])  # int64: a layer may have more weights than int32 counts
    places = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), places, strict=True)}
    places = revert_weight_conversion(model, places)
    values, read = torch.full((ends[-1],), torch.nan), 0
    for name, tensor in held:
        values[places[name].flatten()] = tensor.flatten().float()
        read += tensor.numel()
    parts = zip(shapes.items(), values.tensor_split(ends[:-1]), strict=True)
    found = {name: part.view(shape) for (name, shape), part in parts if not part.isnan().any()}
    if sum(value.numel() for value in found.values()) < read:
        names = ", ".join(sorted(shapes.keys() - found.keys()))
        log.warning("%s: its files hold a part of %s, whose float32 copy starts rounded", model.name_or_path, names)
    return found


def set_copy(weight: nn.Parameter, value: Tensor, copies: Mapping[int, Tensor]) -> None:
    """Set the float32 copy of a weight, or this process's part of it; `value` is the whole, on the CPU."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(weight, "ds_id"):  # ZeRO-3; DeepSpeed's own cutting takes no weights that the processes share unevenly
        size = weight.ds_tensor.numel()
        part = value.flatten()[weight.ds_zero_partition_rank * size :][:size].float()
        safe_set_local_fp32_param(weight, nn.functional.pad(part, (0, size - len(part))))
    elif id(weight) in copies:
        copies[id(weight)].copy_(value)
    else:
        safe_set_full_fp32_param(weight, value)


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of a weight, also where ZeRO-3 has spread it."""
    return getattr(weight, "ds_shape", weight.shape)
