"""A trained model as a plain folder: in the checkpoint's dtype or float32, tensor by tensor, and what rounding takes away.

Weights are trained in float32, and most checkpoints are bfloat16, whose neighbouring values differ by 2^-7 to 2^-8 of
themselves. Where training moves a weight of such a checkpoint by less than half of that, rounding moves it back.
"""

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson
import torch
from accelerate.utils import is_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from baton import program
from baton.training.arguments import ExportDtype

log = logging.getLogger("baton")

SHARD_BYTES = 2 << 30  # of a file of weights, so that no second model is in memory
CHUNK = 1 << 24  # weights that are compared at a time
LARGE_LOSS = 0.5  # share of the update's norm that sampling should not lose
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors


def export(trainer: Any, folder: Path, dtype: ExportDtype) -> dict[str, float]:
    """Write the trained model and its tokenizer to `folder`; all processes have to call this.

    An adapter is written as it is, in its own files. Returns the `Rounding.facts`, for the manifest, in process 0 alone.
    """
    if trainer.args.push_to_hub or is_peft_model(trainer.model):
        trainer.save_model(str(folder))
    facts: dict[str, float] = {}
    if not is_peft_model(trainer.model):
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        facts = write_model(model, trained_tensors(trainer), folder, model.name_or_path, dtype)
        if program.rank() == 0:
            trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    return facts


def write_model(
    model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], folder: Path, start: str, dtype: ExportDtype
) -> dict[str, float]:
    """Write `tensors`, those of `model` by name, to `folder` as a checkpoint; process 0 writes, the others read `tensors` only.

    What stands in the folder from an export that did not come to its end is replaced.

    Args:
        tensors: each whole, in the order of the model, so that those of one layer stand side by side.
        start: the folder or hub name of the checkpoint that training started from.
    Returns:
        `Rounding.facts`.
    """
    if program.rank() != 0:
        for _ in tensors:
            pass
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    shards, rounding = Shards(folder), Rounding()
    with Checkpoint(start) as checkpoint:
        usual = torch.float32 if dtype == "float32" else checkpoint.dtype
        for name, whole in in_checkpoint_format(model, tensors):
            before = checkpoint.tensor(name)
            written = as_written(whole, before, dtype, usual)
            shards.add(name, written)
            rounding.add(name, whole, written, before)
    shards.close()
    write_configuration(model, folder, usual)
    rounding.log(usual)
    return rounding.facts()


def recast(folder: Path, start: str, dtype: ExportDtype) -> None:
    """Give the weights in a model's folder the dtypes in which `write_model` writes them; `start` is as there."""
    with Checkpoint(str(folder)) as own, Checkpoint(start) as checkpoint:
        usual = torch.float32 if dtype == "float32" else checkpoint.dtype
        shards = Shards(folder)
        old = [Path(path) for path in weight_files(str(folder))]
        for name in own.files:
            shards.add(name, as_written(own.files[name].get_tensor(name), checkpoint.tensor(name), dtype, usual))
    for path in [*old, folder / SAFE_WEIGHTS_INDEX_NAME]:
        path.unlink(missing_ok=True)
    shards.close()
    path = folder / "config.json"
    settings = orjson.loads(path.read_bytes())
    name = str(usual).removeprefix("torch.")
    settings |= {key: name for key in ("dtype", "torch_dtype") if key in settings}
    path.write_bytes(orjson.dumps(settings, option=orjson.OPT_INDENT_2))


def as_written(tensor: Tensor, before: Tensor | None, dtype: ExportDtype, usual: torch.dtype) -> Tensor:
    """A trained tensor in the dtype in which it is written: with `checkpoint` that of the start's tensor `before`, if any."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(before.dtype if dtype == "checkpoint" and before is not None else usual)


def trained_tensors(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a trainer's model once, with its name, whole and unrounded, on every process; see `gathered`."""
    model = trainer.model
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        yield from trainer.accelerator.get_state_dict(model).items()  # FSDP1 gathers all tensors, on process 0 alone
        return
    copies = copies_without_zero(trainer.optimizer.optimizer) if trainer.is_deepspeed_enabled else {}
    yield from tensors_of(trainer.accelerator.unwrap_model(model, keep_torch_compile=False), copies)


@torch.no_grad()
def tensors_of(model: PreTrainedModel, copies: Mapping[int, Tensor] = MappingProxyType({})) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a model's state once, with its name, whole; what is tied has the first of its names.

    Args:
        copies: those of `copies_without_zero`, which are yielded instead of their weights.
    """
    seen, left_out = set(), set(model._keys_to_ignore_on_save or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and name not in left_out:
            seen.add(id(tensor))
            yield name, gathered(copies.get(id(tensor), tensor))


def copies_without_zero(optimizer: Any) -> dict[int, Tensor]:
    """The float32 copies that DeepSpeed trains without ZeRO in half precision, by the `id` of their weights; else none.

    Args:
        optimizer: DeepSpeed's. With ZeRO it ties each weight to its copy, which `gathered` and `start_from_files` find there.
    """
    if hasattr(optimizer, "fp32_groups_flat"):  # DeepSpeed's own fused Adam, which a ds_config can name
        pairs = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        groups = [_unflatten_dense_tensors(flat, halves) for flat, halves in pairs]
    elif hasattr(optimizer, "fp32_groups"):
        groups = optimizer.fp32_groups
    else:
        return {}
    return {
        id(half): single
        for halves, singles in zip(optimizer.fp16_groups, groups, strict=True)
        for half, single in zip(halves, singles, strict=True)
    }


def gathered(tensor: Tensor) -> Tensor:
    """A parameter or buffer, in the precision in which it is trained, gathered where it is spread over the processes.

    DeepSpeed trains a float32 copy of each weight and computes with another in half precision; the former counts.
    """
    if hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    if hasattr(tensor, "ds_id"):  # ZeRO-3 spreads weights that are not trained too
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor()
    return tensor.detach()


def in_checkpoint_format(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by the names and in the shapes that checkpoints of this architecture have, a layer at a time.

    Transformers renames tensors when it loads them, and joins those of a layer's experts.
    """
    for _, layer in groupby(tensors, key=lambda named: layer_of(named[0])):
        yield from revert_weight_conversion(model, dict(layer)).items()


def layer_of(name: str) -> str:
    """The part of a tensor's name that says its layer, such as `model.layers.3`; the whole name where there is none."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


class Checkpoint:
    """The tensors of a model's safetensors files, by name, read from disk one at a time. None where it has no such files.

    `dtypes` are those of its tensors; `dtype` is what most have, or without such files what its configuration says.
    """

    def __init__(self, model: str):
        self.model = model

    def __enter__(self) -> "Checkpoint":
        self.stack, self.files = ExitStack(), {}
        dtypes: Counter[torch.dtype | None] = Counter()
        for path in weight_files(self.model):
            file = self.stack.enter_context(safe_open(path, framework="pt"))
            for name in file.offset_keys():
                self.files[name] = file
                dtypes[DTYPES.get(file.get_slice(name).get_dtype())] += 1
        dtypes.pop(None, None)
        self.dtypes = set(dtypes)
        self.dtype = dtypes.most_common(1)[0][0] if dtypes else AutoConfig.from_pretrained(self.model).dtype or torch.float32
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of this name, on the CPU; None where there is none in one of `DTYPES`."""
        tensor = self.files[name].get_tensor(name) if name in self.files else None
        return tensor if tensor is not None and tensor.dtype in DTYPES.values() else None


def weight_files(model: str) -> list[str]:
    """Paths of the safetensors files of a folder or a hub name; empty where it has its weights in another form."""
    absent_is_none = {"_raise_exceptions_for_missing_entries": False}
    if single := cached_file(model, SAFE_WEIGHTS_NAME, **absent_is_none):
        return [single]
    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, **absent_is_none)
    if index is None:
        return []
    names = sorted(set(orjson.loads(Path(index).read_bytes())["weight_map"].values()))
    return [cached_file(model, name) for name in names]


class Shards:
    """Writes tensors to safetensors files of about `SHARD_BYTES` in `folder`, as Transformers names them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.names: list[list[str]] = []  # by file
        self.bytes = self.all_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, now or with those after it."""
        if self.tensors and self.bytes + tensor.nbytes > SHARD_BYTES:
            self._write()
        self.tensors[name] = tensor.cpu().contiguous()
        self.bytes += tensor.nbytes

    def _write(self) -> None:
        self.names.append(list(self.tensors))
        save_file(self.tensors, self._path(len(self.names)), metadata={"format": "pt"})
        self.all_bytes += self.bytes
        self.tensors, self.bytes = {}, 0

    def close(self) -> None:
        """Write what is left, and give all files their names."""
        self._write()
        if len(self.names) == 1:
            self._path(1).rename(self.folder / SAFE_WEIGHTS_NAME)
            return
        files = {}
        for number, names in enumerate(self.names, 1):
            file = f"model-{number:05}-of-{len(self.names):05}.safetensors"
            self._path(number).rename(self.folder / file)
            files |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.all_bytes}, "weight_map": files}
        (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_bytes(orjson.dumps(index, option=orjson.OPT_INDENT_2))

    def _path(self, number: int) -> Path:
        return self.folder / f"model-{number:05}.safetensors"


def write_configuration(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write a model's configurations, which say that its weights have this dtype."""
    configuration = copy.deepcopy(model.config)
    for part in (configuration, *(getattr(configuration, name, None) for name in configuration.sub_configs)):
        if part is not None:
            part.dtype = dtype
    configuration.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 makes a class of its own
    configuration.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


class Rounding:
    """What rounding takes away from an update: ||written - trained|| / ||trained - start||, over all weights.

    Tensors that the start does not have, such as a reward model's new head, are left out.
    """

    def __init__(self) -> None:
        self.update = self.lost = self.lost_in_16_bits = 0.0  # squared norms
        self.changed = self.weights = 0
        self.new: list[str] = []

    def add(self, name: str, trained: Tensor, written: Tensor, start: Tensor | None) -> None:
        """Count one tensor; `start` on the CPU."""
        if not trained.is_floating_point():
            return
        if start is None or start.shape != trained.shape:
            self.new.append(name)
            return
        for each in zip(*(tensor.flatten().split(CHUNK) for tensor in (trained, written, start)), strict=True):
            now, kept, before = (chunk.to(trained.device, torch.float32) for chunk in each)
            half = kept if written.dtype != torch.float32 else now.bfloat16().float()
            self.update += square(now - before)
            self.lost += square(kept - now)
            self.lost_in_16_bits += square(half - now)
            self.changed += int((kept != before).sum())
            self.weights += len(now)

    def facts(self) -> dict[str, float]:
        """Shares of the update's norm that the written files lose, and that a 16-bit copy of them does; of weights changed."""
        if not self.weights or not self.update:
            return {}
        return {
            "export_lost": math.sqrt(self.lost / self.update),
            "export_lost_in_16_bits": math.sqrt(self.lost_in_16_bits / self.update),
            "export_changed": self.changed / self.weights,
        }

    def log(self, dtype: torch.dtype) -> None:
        """Say it, of weights written in `dtype`."""
        name, facts = str(dtype).removeprefix("torch."), self.facts()
        if not facts:
            log.info("export: %s; no weight differs from one of the start that it could be compared with", name)
            return
        in_16_bits = facts["export_lost_in_16_bits"]
        if facts["export_lost"] == in_16_bits:
            loses = f"rounding takes away {in_16_bits:.1%} of the update's norm"
        else:
            loses = f"a 16-bit copy, as vLLM makes it, loses {in_16_bits:.1%} of the update's norm"
            if in_16_bits > LARGE_LOSS:
                loses += " (sample with --dtype float32; in a recipe, GENERATE_ARGS=(--dtype float32))"
        without = f"; not compared, as the start has none of their name and shape: {', '.join(self.new)}" if self.new else ""
        log.info("export: %s; %s; %.1f %% of the weights differ from the start's%s", name, loses,
                 100 * facts["export_changed"], without)  # fmt: skip


def square(tensor: Tensor) -> float:
    """The squared norm of a tensor, summed in float64."""
    return tensor.square().sum(dtype=torch.float64).item()
