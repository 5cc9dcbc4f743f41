"""Log-probabilities of the reference model: of a pair once over all rounds, packed, on any number of processes.

They are kept in files `reference-logps-<hash>-<hash>.npy`. The first hash is that of what decides the numbers beside the pair:
the reference, its precision, `ld_alpha`; the second that of the file's pairs. So restarts, reruns, later rounds and other sets
of pairs find the pairs that they have in common, and another reference finds none.
"""

import gc
import hashlib
import logging
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel

from baton import program
from baton.fingerprint import fingerprint
from baton.models.agreement import check_packed
from baton.models.attention import NAME
from baton.models.forward import TOKENS_PER_ROW, attention, computes_on, obstacle, score
from baton.models.trees import Tokens
from baton.parallel import data_parallel, model_parallel_size
from baton.partial import PartialRecords, part_files
from baton.progress import Progress
from baton.training import sharding
from baton.training.memory import sharding_of

log = logging.getLogger("baton")

# One preference pair: prompt, chosen, rejected.
Pair = tuple[Tokens, Tokens, Tokens]

# What a file keeps of each pair, sorted: a digest of its token ids, and the log-probabilities of chosen and rejected.
KEPT = np.dtype([("pair", "<u8"), ("logps", "<f4", 2)])

# Compares packed log-probabilities of a batch's sequences with those of the model's own forward pass.
Check = Callable[[nn.Module, Sequence[tuple[Tokens, Tokens]], Sequence[Tensor]], None]


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
    """A causal language model as TRL loads it, on this process's device: the whole of it, or under ZeRO-3 and FSDP its shards.

    Args:
        config: a DPOConfig or KTOConfig, for its `model_init_kwargs`, device and sharding.
        quantization: a BitsAndBytesConfig.
    """
    from trl.trainer.utils import create_model_from_path  # the rest of this file also runs where TRL is not installed

    settings = dict(config.model_init_kwargs or {})
    if quantization is not None:
        settings["quantization_config"] = quantization
    if sharding_of(config).stage == 3:
        settings["device_map"] = None
    elif config.device.type == "cuda":
        settings["device_map"] = {"": config.device}  # TRL's default spreads a model over all GPUs
    read = partial(create_model_from_path, model, **settings)
    return sharding.spread_by_fsdp(read, config) if sharding.uses_fsdp(config) else read().to(config.device)


def load_as_policy(model: str, config: Any, quantization: Any = None) -> nn.Module:
    """`load`, so that under DeepSpeed as well its forward pass computes in the precision of the policy's."""
    loaded = load(model, config, quantization)
    return loaded if config.deepspeed_plugin is None else sharding.with_engine(loaded, config)


def dataset_reference_logps(
    dataset: Any,
    responses: tuple[str, str],
    reference: str,
    config: Any,
    folder: Path,
    quantization: Any = None,
    *,
    remedy: str,
    check_first_batch: bool | None = None,
) -> np.ndarray:
    """`kept_reference_logps` of a tokenised data set under the model `reference`, computed as the policy's would be.

    Args:
        responses: the columns of the two responses of each row.
        config, quantization: as for `load`.
        remedy: ends the message where the first batch's log-probabilities differ: what to do.
        check_first_batch: compare the first batch's packed log-probabilities with those of the model's own forward
            pass; None: on a GPU, whose kernels no test has seen.
    Returns:
        float32 (rows, 2).
    Raises:
        InputError: the first batch's log-probabilities differ.
    """
    wanted = config.device.type == "cuda" if check_first_batch is None else check_first_batch

    def check(model: nn.Module, sequences: Sequence[tuple[Tokens, Tokens]], packed: Sequence[Tensor]) -> None:
        dtype = sharding.half_dtype(config) or next(model.parameters()).dtype
        check_packed(model, sequences, packed, dtype, remedy)

    # Process 0's key counts, and so it alone reads the whole model, or asks the hub, for its fingerprint.
    model = fingerprint(reference)["hash"] if program.rank() == 0 else ""
    precision = f"bf16={config.bf16} fp16={config.fp16} {config.model_init_kwargs} {quantization}"
    if sharding.weights_are_cast(config):
        precision += " weights cast"
    with sharding.autocast(config):
        return kept_reference_logps(
            DatasetPairs(dataset, responses),
            partial(load_as_policy, reference, config, quantization),
            folder,
            [model, precision],
            parts_in=Path(config.output_dir),
            ld_alpha=getattr(config, "ld_alpha", None),
            check=check if wanted else None,
        )


def kept_reference_logps(
    pairs: Sequence[Pair],
    load_reference: Callable[[], nn.Module],
    folder: Path,
    key: Sequence[str],
    parts_in: Path | None = None,
    tokens_per_row: int = TOKENS_PER_ROW,
    ld_alpha: float | None = None,
    check: Check | None = None,
) -> np.ndarray:
    """`reference_logps` of all pairs: those that no file has are computed, and kept in a new file in `folder`.

    A pair is looked up in the files of `folder` and, where its name is `round<i>`, of the rounds beside it. Every process of a
    distributed run scores its share of the batches and gets all of them. Until all are scored, they stand in parts, so that
    after a death any number of processes goes on with the batches that no part holds. Batches do not depend on the number of
    processes, and so neither do the numbers.

    Args:
        load_reference: called in all processes where a batch is missing; the model on its device, whole or in shards, or
            DeepSpeed's engine around it. It is freed afterwards.
        key: what else decides the numbers: the reference model's fingerprint, the dtype; process 0's counts.
        parts_in: the folder of the parts, which no other run may use at the same time; default: `folder`.
        tokens_per_row, ld_alpha: as for `reference_logps`.
        check: called by every process after its first batch, where that is packed, in all or in none; what it raises ends
            the scoring before that batch is kept.
    Returns:
        float32 (pairs, 2): chosen, rejected.
    """
    state = PartialState()
    decided = [None]
    if state.is_main_process:  # the others may see another key or, on a shared file system, not yet all files
        key = [*key, f"ld_alpha={ld_alpha}"]
        decided = [(key, [path for place in _folders(Path(folder)) for path in sorted(place.glob(f"{_name(key)}-*.npy"))])]
    key, files = broadcast_object_list(decided)[0]
    outline = _outline(pairs)
    logps, found = _look_up(files, outline.pair)
    _, first = np.unique(outline.pair[~found], return_index=True)
    missing = np.flatnonzero(~found)[np.sort(first)]  # each pair once
    if len(missing):
        if found.any():
            log.info("reference log-probabilities: %d of %d pairs are known, %d left", found.sum(), len(found), len(missing))
        path = Path(folder) / f"{_name(key, outline.pair[missing])}.npy"
        parts = Path(parts_in or folder) / f"{path.stem}-{tokens_per_row}"
        batches = list(_batches(outline, tokens_per_row, missing))
        _score_missing(batches, pairs, load_reference, parts, ld_alpha, check)
        if state.is_main_process:
            _assemble(batches, parts, outline.pair, path)
        state.wait_for_everyone()
        if state.is_main_process:
            for part in part_files(parts):
                part.unlink()
        logps[~found] = _look_up([path], outline.pair[~found])[0]
    return logps


def _name(key: Sequence[str], digests: np.ndarray | None = None) -> str:
    """What the name of a file of these pairs begins with; without `digests`, that of all files with this key."""
    hashed = [b"\0".join(part.encode() for part in key), *([] if digests is None else [digests.tobytes()])]
    return "-".join(["reference-logps", *(hashlib.sha256(part).hexdigest()[:16] for part in hashed)])


def _folders(folder: Path) -> list[Path]:
    """The folders whose files may hold pairs of `folder`'s run: it, and the other rounds where it is one."""
    folder = folder.absolute()
    if not re.fullmatch(r"round[0-9]+", folder.name):
        return [folder]
    return [folder, *sorted(place for place in folder.parent.glob("round[0-9]*") if place != folder)]


def _look_up(files: Iterable[Path], wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the pairs with the digests `wanted`, float32 (pairs, 2), and which were found, bool (pairs,)."""
    logps, found = np.zeros((len(wanted), 2), dtype=np.float32), np.zeros(len(wanted), dtype=bool)
    for path in files:
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
        place = np.searchsorted(kept["pair"], wanted).clip(max=len(kept) - 1)
        here = ~found & (kept["pair"][place] == wanted)
        logps[here] = kept["logps"][place[here]]
        found |= here
    return logps, found


def _score_missing(
    batches: Sequence[list[int]],
    pairs: Sequence[Pair],
    load_reference: Callable[[], nn.Module],
    parts: Path,
    ld_alpha: float | None,
    check: Check | None,
) -> None:
    """Score this process's share of the batches that no part of `parts` holds, each on disk as soon as it is done.

    A record is one batch, by its number: `{"logps": the bytes of little-endian float32 (pairs, 2), in hexadecimal}`.
    """
    state, share = PartialState(), data_parallel()
    writes = program.rank() % model_parallel_size() == 0  # the others of a model-parallel group compute the same
    parts.parent.mkdir(parents=True, exist_ok=True)
    records = PartialRecords(parts, len(batches))
    state.wait_for_everyone()  # so that all see the same batches as missing before one of them is appended
    # Process 0's list counts, since sharded models need as many turns in each.
    missing = broadcast_object_list([[number for number in range(len(batches)) if number not in records]])[0]
    if records.done:
        log.info("reference log-probabilities: %d of %d batches are done, going on", records.done, len(batches))
    if missing:
        scored = _score_turns(load_reference(), pairs, batches, missing, ld_alpha, check)
        progress = Progress(len(missing[share.rank :: share.size]), "batches of reference log-probabilities")
        for number, logps in scored:
            if writes:
                records.append(number, {"logps": logps.astype("<f4").tobytes().hex()})
            progress.update()
        progress.close()
        del scored
        gc.collect()  # models refer to themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    records.close()
    state.wait_for_everyone()


def _score_turns(
    model: nn.Module,
    pairs: Sequence[Pair],
    batches: Sequence[list[int]],
    missing: Sequence[int],
    ld_alpha: float | None,
    check: Check | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield number and summed log-probabilities of this process's share of the `missing` batches; then free the model."""
    turns = list(_turns(missing, batches, *data_parallel(), in_step=sharding.is_sharded(model), checked=check is not None))
    scored = _score(model, pairs, ((batches[turn.batch], turn.passes) for turn in turns), ld_alpha, check)
    for turn, logps in zip(turns, scored, strict=True):
        if turn.own:
            yield turn.batch, logps
    sharding.free(model)


class Turn(NamedTuple):
    """A batch that a process scores, by its number: its own, or another's, since all must run as many forward passes.

    `passes` are those of the processes' largest batch, for models that take one sequence at a time.
    """

    batch: int
    own: bool
    passes: int


def _turns(
    missing: Sequence[int], batches: Sequence[list[int]], rank: int, size: int, in_step: bool, checked: bool
) -> Iterator[Turn]:
    """Yield a process's share of the `missing` batches; with `in_step` as many turns in each of the `size` processes.

    With `checked` each process has one turn or more.
    """
    for start in range(0, len(missing), size):
        turn = missing[start : start + size]
        passes = 2 * max(len(batches[number]) for number in turn) if in_step else 0
        if rank < len(turn):
            yield Turn(turn[rank], True, passes)
        elif in_step or (checked and start == 0):
            yield Turn(turn[0], False, passes)


def _assemble(batches: Sequence[list[int]], parts: Path, digests: np.ndarray, path: Path) -> None:
    """Write the parts, which together hold all batches, to `path`, atomically. Raises RuntimeError where they do not.

    `digests` are those of all pairs, uint64 (pairs,).
    """
    records = PartialRecords(parts, len(batches))
    if missing := len(batches) - records.done:
        raise RuntimeError(
            f"{parts}: {missing} of {len(batches)} batches of reference log-probabilities are missing from its parts; run the "
            "same command again"
        )
    kept = np.empty(sum(map(len, batches)), dtype=KEPT)
    start = 0
    for number, record in records.records():
        rows = kept[start : start + len(batches[number])]
        rows["pair"] = digests[batches[number]]
        rows["logps"] = np.frombuffer(bytes.fromhex(record["logps"]), dtype="<f4").reshape(-1, 2)
        start += len(rows)
    kept.sort(order="pair")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_array(path, kept)


def write_array(path: Path, values: np.ndarray) -> None:
    """Write a `.npy` file atomically: it is on the disk, whole, before it gets its name."""
    writing = path.with_suffix(f".{os.getpid()}.writing")
    with open(writing, "wb") as file:
        np.save(file, values, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
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
    batches = list(_batches(_outline(pairs), tokens_per_row, np.arange(len(pairs))))
    logps = np.empty((len(pairs), 2), dtype=np.float32)
    for members, scored in zip(batches, _score(model, pairs, ((members, 0) for members in batches), ld_alpha), strict=True):
        logps[members] = scored
    return torch.from_numpy(logps).to(model.device)


@torch.no_grad()
def _score(
    model: nn.Module,
    pairs: Sequence[Pair],
    batches: Iterable[tuple[list[int], int]],
    ld_alpha: float | None,
    check: Check | None = None,
) -> Iterator[np.ndarray]:
    """Yield the summed log-probabilities of each batch of pairs, float32 (members, 2).

    With each batch comes the least number of forward passes to run where each takes one sequence. The first is checked, where
    it is packed.
    """
    causal = getattr(model, "module", model)  # inside DeepSpeed's engine
    token_logps = _packed if obstacle(causal) is None else _one_by_one
    if token_logps is _one_by_one:
        check = None
    training = model.training
    model.eval()
    for members, passes in batches:
        sequences = [(prompt, response) for prompt, *both in (pairs[i] for i in members) for response in both]
        scored = token_logps(model, causal, sequences, passes)
        if check is not None:
            check(model, sequences, scored)
            check = None
        sums = [_sums(chosen, rejected, ld_alpha) for chosen, rejected in zip(scored[::2], scored[1::2], strict=True)]
        yield torch.stack(sums).float().cpu().numpy()
    model.train(training)


def _packed(model: nn.Module, causal: PreTrainedModel, sequences: Sequence[tuple[Tokens, Tokens]], passes: int) -> list[Tensor]:
    """One forward pass in any case, since a batch is one row."""
    with attention(causal, NAME), _forward(causal, partial(score, causal, sequences, None)):
        scores, slices = model()
    return [scores.log_probs[part] for part in slices]


@contextmanager
def _forward(model: nn.Module, function: Callable[[], Any]) -> Iterator[None]:
    """Context in which a call of `model` is one of `function`, within the hooks that gather sharded weights."""
    before = vars(model).get("forward")
    model.forward = function
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def _one_by_one(
    model: nn.Module, causal: PreTrainedModel, sequences: Sequence[tuple[Tokens, Tokens]], passes: int
) -> list[Tensor]:
    logps = []
    for prompt, response in [*sequences, *[sequences[0]] * (passes - len(sequences))]:
        ids = torch.tensor([[*prompt, *response]], device=computes_on(causal))
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logps.append(logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1))
    return logps[: len(sequences)]


def _sums(chosen: Tensor, rejected: Tensor, ld_alpha: float | None) -> Tensor:
    """The weighted sums of two responses' token log-probabilities, (2,)."""
    shared = min(len(chosen), len(rejected))
    return torch.stack([_weighted_sum(logps, shared, ld_alpha) for logps in (chosen, rejected)])


def _weighted_sum(token_logps: Tensor, shared: int, ld_alpha: float | None) -> Tensor:
    if ld_alpha is None:
        return token_logps.sum()
    return token_logps[:shared].sum() + ld_alpha * token_logps[shared:].sum()


class Outline(NamedTuple):
    """What is held of all pairs: digests of pair and of prompt, tokens of the prompt and of all three parts; (pairs,) each."""

    pair: np.ndarray  # uint64
    prompt: np.ndarray  # uint64
    prompt_length: np.ndarray  # int64
    size: np.ndarray  # int64


def _outline(pairs: Sequence[Pair]) -> Outline:
    """The outline of all pairs: 32 bytes of each."""
    digests, prompts, lengths, sizes = array("Q"), array("Q"), array("q"), array("q")
    for pair in pairs:
        prompt = hashlib.blake2b(digest_size=8)
        for number, part in enumerate(pair):
            prompt.update(len(part).to_bytes(8, "little"))
            prompt.update(np.asarray(part, dtype="<i8").tobytes())
            if number == 0:
                prompts.append(int.from_bytes(prompt.digest(), "little"))
        digests.append(int.from_bytes(prompt.digest(), "little"))
        lengths.append(len(pair[0]))
        sizes.append(sum(len(part) for part in pair))
    return Outline(*(np.asarray(values) for values in (digests, prompts, lengths, sizes)))


def _batches(outline: Outline, tokens: int, members: np.ndarray) -> Iterator[list[int]]:
    """Yield the pairs `members`, by number, in groups of at most `tokens` tokens; pairs of one prompt side by side."""
    order = members[np.lexsort((outline.prompt[members], outline.prompt_length[members]))]
    start, room = 0, tokens
    for end, i in enumerate(order):
        if end > start and outline.size[i] > room:
            yield order[start:end].tolist()
            start, room = end, tokens
        room -= outline.size[i]
    if len(order):
        yield order[start:].tolist()
