"""Log-probabilities of the reference model, computed once, packed, on any number of processes, and kept in a file.

The file is named by a hash of everything that decides its numbers, so that later epochs, restarts and reruns
find it and another reference model, tokenizer or data set does not.
"""

import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from baton import program
from baton.fingerprint import fingerprint
from baton.models.attention import NAME
from baton.models.forward import TOKENS_PER_ROW, attention, obstacle, score
from baton.models.trees import Tokens
from baton.parallel import data_parallel, model_parallel_size
from baton.partial import PartialRecords, part_files
from baton.progress import Progress

log = logging.getLogger("baton")

# One preference pair: prompt, chosen, rejected.
Pair = tuple[Tokens, Tokens, Tokens]


@contextmanager
def unsharded(config: Any) -> Iterator[None]:
    """Context in which a model that is not trained loads whole, and is taken to be whole, in a run under ZeRO-3 as well.

    `config` is a TrainingArguments; while it is alive, Transformers shards every model that it loads.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    sharding = getattr(config, "hf_deepspeed_config", None) or config.deepspeed_plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(sharding)


class DatasetPairs(Sequence[Pair]):
    """The pairs in a datasets.Dataset's columns `prompt_ids` and `responses`, two names, read from disk on access.

    One pair comes as lists, iteration gives int64 arrays.
    """

    def __init__(self, dataset: Any, responses: tuple[str, str] = ("chosen_ids", "rejected_ids")):
        self.responses = responses
        self.dataset = dataset.select_columns(list(dict.fromkeys(["prompt_ids", *responses])))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place):
        return self._pair(self.dataset[place])

    def __iter__(self) -> Iterator[Pair]:
        return map(self._pair, self.dataset.with_format("numpy"))

    def _pair(self, row: dict[str, Tokens]) -> Pair:
        first, second = self.responses
        return row["prompt_ids"], row[first], row[second]


def load(model: str, config: Any, quantization: Any = None) -> PreTrainedModel:
    """A causal language model as TRL loads it, all of it on this process's device.

    Args:
        config: a DPOConfig or KTOConfig, for its `model_init_kwargs` and device.
        quantization: a BitsAndBytesConfig.
    """
    from trl.trainer.utils import create_model_from_path  # the rest of this file also runs where TRL is not installed

    settings = dict(config.model_init_kwargs or {})
    if quantization is not None:
        settings["quantization_config"] = quantization
    if config.device.type == "cuda":
        settings["device_map"] = {"": config.device}  # TRL's default spreads a model over all GPUs
    return create_model_from_path(model, **settings).to(config.device)


def dataset_reference_logps(
    dataset: Any, responses: tuple[str, str], reference: str, config: Any, folder: Path, quantization: Any = None
) -> np.ndarray:
    """`kept_reference_logps` of a tokenised data set under the model `reference`, in the precision of the training.

    Args:
        responses: the columns of the two responses of each row.
        config, quantization: as for `load`.
    Returns:
        float32 (rows, 2).
    """
    # Process 0's key counts, and so it alone reads the whole model, or asks the hub, for its fingerprint.
    model = fingerprint(reference)["hash"] if program.rank() == 0 else ""
    precision = f"bf16={config.bf16} fp16={config.fp16} {config.model_init_kwargs} {quantization}"
    dtype = torch.float16 if config.fp16 else torch.bfloat16
    with unsharded(config), torch.autocast(config.device.type, dtype, enabled=config.bf16 or config.fp16):
        return kept_reference_logps(
            DatasetPairs(dataset, responses),
            lambda: load(reference, config, quantization),
            folder,
            [model, precision],
            parts_in=Path(config.output_dir),
            ld_alpha=getattr(config, "ld_alpha", None),
        )


def kept_reference_logps(
    pairs: Sequence[Pair],
    load_reference: Callable[[], PreTrainedModel],
    folder: Path,
    key: Sequence[str],
    parts_in: Path | None = None,
    tokens_per_row: int = TOKENS_PER_ROW,
    ld_alpha: float | None = None,
) -> np.ndarray:
    """`reference_logps` of all pairs from the file in `folder`, which is written first where there is none.

    Every process of a distributed run scores its share of the batches and gets all of them. Until all are scored, they
    stand in parts, so that after a death any number of processes goes on with the batches that no part holds. Batches
    do not depend on the number of processes, and so neither do the numbers.

    Args:
        load_reference: called only where a batch is missing; the model on its device, the whole of it in each process.
        key: what else decides the numbers: the reference model's fingerprint, the dtype; process 0's counts.
        parts_in: the folder of the parts, which no other run may use at the same time; default: `folder`.
        tokens_per_row, ld_alpha: as for `reference_logps`.
    Returns:
        float32 (pairs, 2): chosen, rejected.
    """
    state = PartialState()
    decided = [None]
    if state.is_main_process:  # the others may see another key or, on a shared file system, not yet the file
        path = Path(folder) / f"reference-logps-{_digest(pairs, [*key, f'ld_alpha={ld_alpha}'])}.npy"
        decided = [(path, path.exists())]
    path, done = broadcast_object_list(decided)[0]
    parts = Path(parts_in or folder) / f"{path.stem}-{tokens_per_row}"
    if not done:
        batches = list(_batches(pairs, tokens_per_row))
        _score_missing(batches, pairs, load_reference, parts, ld_alpha)
        if state.is_main_process:
            _assemble(batches, parts, path)
    state.wait_for_everyone()
    if state.is_main_process:
        for part in part_files(parts):
            part.unlink()
    return np.load(path, allow_pickle=False)


def _score_missing(
    batches: Sequence[list[int]],
    pairs: Sequence[Pair],
    load_reference: Callable[[], PreTrainedModel],
    parts: Path,
    ld_alpha: float | None,
) -> None:
    """Score this process's share of the batches that no part of `parts` holds, each on disk as soon as it is done.

    A record is one batch, by its number: `{"logps": the bytes of little-endian float32 (pairs, 2), in hexadecimal}`.
    """
    state, share = PartialState(), data_parallel()
    writes = program.rank() % model_parallel_size() == 0  # the others of a model-parallel group compute the same
    parts.parent.mkdir(parents=True, exist_ok=True)
    records = PartialRecords(parts, len(batches))
    state.wait_for_everyone()  # so that all see the same batches as missing before one of them is appended
    mine = [number for number in range(len(batches)) if number not in records][share.rank :: share.size]
    if records.done:
        log.info("reference log-probabilities: %d of %d batches are done, going on", records.done, len(batches))
    if mine:
        progress = Progress(len(mine), "batches of reference log-probabilities")
        scored = _score(load_reference(), pairs, (batches[number] for number in mine), ld_alpha)
        for number, logps in zip(mine, scored, strict=True):
            if writes:
                records.append(number, {"logps": logps.astype("<f4").tobytes().hex()})
            progress.update()
        progress.close()
    records.close()
    state.wait_for_everyone()


def _assemble(batches: Sequence[list[int]], parts: Path, path: Path) -> None:
    """Write the parts, which together hold all batches, to `path`, atomically. Raises RuntimeError where they do not."""
    records = PartialRecords(parts, len(batches))
    if missing := len(batches) - records.done:
        raise RuntimeError(
            f"{parts}: {missing} of {len(batches)} batches of reference log-probabilities are missing from its parts; run the "
            "same command again"
        )
    logps = np.empty((sum(map(len, batches)), 2), dtype=np.float32)
    for number, record in records.records():
        logps[batches[number]] = np.frombuffer(bytes.fromhex(record["logps"]), dtype="<f4").reshape(-1, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(".writing")
    with open(writing, "wb") as file:
        np.save(file, logps, allow_pickle=False)
    os.replace(writing, path)


def reference_logps(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    tokens_per_row: int = TOKENS_PER_ROW,
    ld_alpha: float | None = None,
) -> Tensor:
    """Summed log-probabilities of chosen and rejected responses under `model`, float32 (pairs, 2).

    Pairs are scored about `tokens_per_row` tokens at a time, prompts shared; by an architecture that cannot take
    packed trees, one sequence at a time.

    Args:
        ld_alpha: weight of the tokens past the shorter response's length (LD-DPO, arXiv 2409.06411); None: 1.
    """
    batches = list(_batches(pairs, tokens_per_row))
    logps = np.empty((len(pairs), 2), dtype=np.float32)
    for members, scored in zip(batches, _score(model, pairs, batches, ld_alpha), strict=True):
        logps[members] = scored
    return torch.from_numpy(logps).to(model.device)


@torch.no_grad()
def _score(
    model: PreTrainedModel, pairs: Sequence[Pair], batches: Iterable[list[int]], ld_alpha: float | None
) -> Iterator[np.ndarray]:
    """Yield the summed log-probabilities of each batch of pairs, float32 (members, 2)."""
    token_logps = _packed if obstacle(model) is None else _one_by_one
    training = model.training
    model.eval()
    for members in batches:
        sequences = [(prompt, response) for prompt, *both in (pairs[i] for i in members) for response in both]
        scored = token_logps(model, sequences)
        sums = [_sums(chosen, rejected, ld_alpha) for chosen, rejected in zip(scored[::2], scored[1::2], strict=True)]
        yield torch.stack(sums).float().cpu().numpy()
    model.train(training)


def _packed(model: PreTrainedModel, sequences: Sequence[tuple[Tokens, Tokens]]) -> list[Tensor]:
    with attention(model, NAME):
        scores, slices = score(model, sequences, None)
    return [scores.log_probs[part] for part in slices]


def _one_by_one(model: PreTrainedModel, sequences: Sequence[tuple[Tokens, Tokens]]) -> list[Tensor]:
    logps = []
    for prompt, response in sequences:
        ids = torch.tensor([[*prompt, *response]], device=model.device)
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logps.append(logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1))
    return logps


def _sums(chosen: Tensor, rejected: Tensor, ld_alpha: float | None) -> Tensor:
    """The weighted sums of two responses' token log-probabilities, (2,)."""
    shared = min(len(chosen), len(rejected))
    return torch.stack([_weighted_sum(logps, shared, ld_alpha) for logps in (chosen, rejected)])


def _weighted_sum(token_logps: Tensor, shared: int, ld_alpha: float | None) -> Tensor:
    if ld_alpha is None:
        return token_logps.sum()
    return token_logps[:shared].sum() + ld_alpha * token_logps[shared:].sum()


def _batches(pairs: Sequence[Pair], tokens: int) -> Iterator[list[int]]:
    """Yield indices of pairs in groups of at most `tokens` tokens; pairs of one prompt side by side.

    Holds 32 bytes a pair, not its tokens.
    """
    lengths, prompts, sizes = array("q"), array("Q"), array("q")
    for pair in pairs:
        lengths.append(len(pair[0]))
        digest = hashlib.blake2b(np.asarray(pair[0], dtype=np.int64).tobytes(), digest_size=8).digest()
        prompts.append(int.from_bytes(digest, "little"))
        sizes.append(sum(len(part) for part in pair))
    order = np.lexsort((prompts, lengths))
    start, room = 0, tokens
    for end, i in enumerate(order):
        if end > start and sizes[i] > room:
            yield order[start:end].tolist()
            start, room = end, tokens
        room -= sizes[i]
    if len(order):
        yield order[start:].tolist()


def _digest(pairs: Sequence[Pair], key: Sequence[str]) -> str:
    """Hash of the token ids of all pairs, in order, and of the key."""
    hasher = hashlib.sha256("\0".join(key).encode())
    for pair in pairs:
        for part in pair:
            hasher.update(len(part).to_bytes(8, "little"))
            hasher.update(np.asarray(part, dtype="<i8").tobytes())
    return hasher.hexdigest()[:16]
