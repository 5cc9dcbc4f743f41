"""What the teacher says of each learnt token: its likeliest tokens, computed once, packed, on any number of processes.

They are kept in a folder `teacher-<hash>-<hash>`. The first hash is that of what decides the numbers beside the rows: the
teacher, its precision, how many tokens are kept; the second that of the rows. So restarts, reruns and other trainings on the
same rows find them. A file holds some rows; those that are there stay, so that after a death any number of processes goes on.
"""

import copy
import functools
import gc
import hashlib
import logging
import types
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from baton import program
from baton.errors import InputError
from baton.fingerprint import fingerprint
from baton.models.agreement import check_packed
from baton.models.attention import NAME
from baton.models.forward import TOKENS_PER_ROW, attention, from_hidden, hidden_states, obstacle
from baton.models.logps import top_logps
from baton.models.trees import Row
from baton.parallel import data_parallel, model_parallel_size
from baton.progress import Progress
from baton.training import sharding
from baton.training.config import computing_dtype
from baton.training.learnt import Cut, Outline, cut, flat_batches, learnt_rows
from baton.training.reference import load_as_policy, write_array

log = logging.getLogger("baton")

CHUNK = 65_536  # learnt tokens of a file, unless a single row has more: at 64 kept tokens 34 MB
LEAST_LOGP = -100.0  # a teacher that rules a token out gives it -inf, which would make 0 * inf of a divergence
OPEN_FILES = 256

REMEDY = "Distillation has no other forward pass: use another GPU, driver or version of torch"

PROBE = "Ein Maß, naïve café: 12,345.67 €\n\n\tdef f(x):  return x ** 2  # ±½ «да» 你好 🙂"


class Kept:
    """The teacher's tokens of all rows, read from their files on access.

    Args:
        folder: where the files are.
        learnt: learnt tokens of each row, int64 (rows,).
    """

    def __init__(self, folder: Path, learnt: np.ndarray):
        self.folder = folder
        self.starts = np.concatenate([[0], np.cumsum(learnt)])  # (rows + 1,)
        self.chunks = chunks_of(learnt)  # (files + 1,): the first row of each

    def of(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of the learnt tokens of `rows`, in their order: token ids int64 (N, K), log-probabilities in nats float32 (N, K)."""
        parts = [self._of_row(row) for row in rows]
        ids, logps = (np.concatenate([part[name] for part in parts]) for name in ("ids", "logps"))
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logps)

    def path(self, number: int) -> Path:
        """The file of this number."""
        return self.folder / f"{number:06}.npy"

    def _of_row(self, row: int) -> np.ndarray:
        number = int(np.searchsorted(self.chunks, row, side="right")) - 1
        before = self.starts[self.chunks[number]]
        return _opened(self.path(number))[self.starts[row] - before : self.starts[row + 1] - before]


@functools.lru_cache(OPEN_FILES)
def _opened(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def chunks_of(learnt: np.ndarray) -> np.ndarray:
    """The first row of each file, and the number of rows; (files + 1,)."""
    firsts, room = [0], CHUNK
    for row, tokens in enumerate(learnt.tolist()):
        if tokens > room and row > firsts[-1]:
            firsts.append(row)
            room = CHUNK
        room -= tokens
    return np.array([*firsts, len(learnt)])


def kept_dtype(top: int) -> np.dtype:
    """What a file holds of each learnt token."""
    return np.dtype([("ids", "<i4", (top,)), ("logps", "<f4", (top,))])


def check_tokenizers(student: Any, teacher: Any, names: tuple[str, str]) -> None:
    """Raise InputError where two tokenizers are not the same, naming the first difference; `names`: of their models."""
    vocabularies = student.get_vocab(), teacher.get_vocab()
    advice = "distillation compares the two models token by token, so they need the same tokenizer"
    if different := dict(vocabularies[0].items() ^ vocabularies[1].items()):
        token = min(different, key=lambda name: (different[name], name))
        ids = [str(vocabulary.get(token, "none")) for vocabulary in vocabularies]
        raise InputError(f"the token {token!r} has id {ids[0]} in {names[0]} and {ids[1]} in the teacher {names[1]}: {advice}")
    pieces = [tokenizer(PROBE, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)]
    if pieces[0] != pieces[1]:
        raise InputError(f"{names[0]} and the teacher {names[1]} have the same tokens, but split a text differently: {advice}")


def teacher_tokenizer(teacher: str) -> Any:
    """The teacher's tokenizer, which needs no chat template. Raises InputError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(teacher)
    except (OSError, ValueError) as error:
        raise InputError(f"{teacher}: its tokenizer cannot be loaded: {error}") from None


def teacher_config(config: Any) -> Any:
    """The trainer's configuration with the dtype in which the teacher is loaded: the one that computes."""
    changed = copy.copy(config)
    changed.model_init_kwargs = {**(config.model_init_kwargs or {}), "dtype": computing_dtype(config)}
    return changed


def kept_teacher(
    rows: Any,
    outlined: Outline,
    teacher: str,
    config: Any,
    folder: Path,
    top: int,
    vocabulary: int,
    tokens_per_row: int = TOKENS_PER_ROW,
    check_first_batch: bool | None = None,
) -> Kept:
    """The `top` likeliest tokens of `teacher` at each learnt token of `rows`; those that no file in `folder` has are computed.

    The target of a position is always among them: where it is not likely enough, it replaces the last one
    (`logps.top_logps`).

    Args:
        rows: a Dataset of `input_ids` and `labels`; `outlined`, its outline.
        config: a TrainingArguments, for its `model_init_kwargs`, precision, device and sharding.
        vocabulary: tokens from this one on are left out.
        tokens_per_row: most tokens of a packed row.
        check_first_batch: compare the first packed row with the model's own forward pass; None: on a GPU, whose kernels no test
            has seen.
    Raises:
        InputError: the teacher cannot take packed rows, or the first one's log-probabilities differ.
    """
    config = teacher_config(config)
    state, wanted = PartialState(), config.device.type == "cuda" if check_first_batch is None else check_first_batch
    decided = [None]
    if state.is_main_process:  # it alone reads the whole model for its fingerprint, and on a shared disk sees all files
        precision = f"bf16={config.bf16} fp16={config.fp16} {config.model_init_kwargs} cast={sharding.weights_are_cast(config)}"
        key = [fingerprint(teacher)["hash"], precision, str(top), str(vocabulary), str(CHUNK)]
        hashes = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in ("\0".join(key), digest(rows))]
        kept = Kept(Path(folder, "-".join(["teacher", *hashes])), outlined.learnt)
        kept.folder.mkdir(parents=True, exist_ok=True)
        missing = [number for number in range(len(kept.chunks) - 1) if not kept.path(number).exists()]
        decided = [(str(kept.folder), missing)]
    path, missing = broadcast_object_list(decided)[0]
    kept = Kept(Path(path), outlined.learnt)
    log.info(
        "%s: the teacher's tokens, %d of %d files are there", path, len(kept.chunks) - 1 - len(missing), len(kept.chunks) - 1
    )
    if missing:
        with sharding.autocast(config):
            model = load_as_policy(teacher, config)
            check = (sharding.half_dtype(config) or next(model.parameters()).dtype) if wanted else None
            _score_missing(model, rows, kept, missing, top, vocabulary, tokens_per_row, check)
            sharding.free(model)
        del model
        gc.collect()  # models refer to themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    state.wait_for_everyone()
    return kept


def digest(rows: Any) -> str:
    """A hash of all `input_ids` and `labels` of a Dataset."""
    whole = hashlib.sha256()
    for batch in flat_batches(rows, 10_000):
        for values in batch:
            whole.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
    return whole.hexdigest()


@torch.no_grad()
def _score_missing(
    model: nn.Module,
    rows: Any,
    kept: Kept,
    missing: Sequence[int],
    top: int,
    vocabulary: int,
    tokens_per_row: int,
    check: torch.dtype | None,
) -> None:
    """Compute this process's share of the `missing` files, each on disk as soon as it is done.

    Where the model is sharded, all processes run equally many forward passes. With `check`, the dtype of the matrix products,
    the first row is checked.
    """
    answer_with_top(getattr(model, "module", model), top, vocabulary)
    model.eval()
    share, sharded = data_parallel(), sharding.is_sharded(model)
    writes = program.rank() % model_parallel_size() == 0  # the others of a model-parallel group compute the same
    progress = Progress(len(missing[share.rank :: share.size]), "files of the teacher's tokens")
    for first in range(0, len(missing), share.size):
        turn = missing[first : first + share.size]
        own = share.rank < len(turn)
        if not (own or sharded or check):
            continue
        number = turn[share.rank] if own else turn[0]
        cuts = [cut(row["input_ids"], row["labels"]) for row in rows.select(range(*kept.chunks[number : number + 2].tolist()))]
        scored = np.empty(sum(len(each.learnt) for each in cuts), dtype=kept_dtype(top))
        starts = np.cumsum([0, *(len(each.learnt) for each in cuts)])
        for row, members, (ids, logps) in _scored_rows(model, cuts, tokens_per_row, sharded):
            at = np.concatenate([np.arange(starts[member], starts[member + 1]) for member in members])
            scored["ids"][at], scored["logps"][at] = ids.cpu().numpy(), logps.clamp_min(LEAST_LOGP).cpu().numpy()
            if check:
                _check_row(model, row, [cuts[member] for member in members], ids, logps, check)
                check = None
        if not np.isfinite(scored["logps"]).all():
            raise InputError(
                "the teacher's log-probabilities are not all numbers: its weights are damaged, or fp16 is too small "
                "for them; try `bf16: true`, or neither"
            )
        if own and writes:
            write_array(kept.path(number), scored)
        if own:
            progress.update()
    progress.close()


def _scored_rows(
    model: nn.Module, cuts: Sequence[Cut], tokens_per_row: int, sharded: bool
) -> Iterator[tuple[Row, list[int], tuple[Tensor, Tensor]]]:
    """Yield the packed rows of `cuts`, the members of each, and what the model says of its learnt tokens."""
    packed = list(learnt_rows(cuts, tokens_per_row))
    for row, members in packed:
        yield row, members, model(row=row)
    if sharded and torch.distributed.is_initialized():
        most = torch.tensor(len(packed), device=next(model.parameters()).device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        for _ in range(int(most) - len(packed)):
            model(row=packed[0][0])


def answer_with_top(model: Any, top: int, vocabulary: int) -> None:
    """Make `model(row=…)` give `logps.top_logps` of a packed row's scored tokens; every other call is untouched.

    Raises InputError where the architecture cannot take packed rows.
    """
    check_packable(model)
    own = model.forward
    function = partial(top_logps, top=top, vocabulary=vocabulary)

    def forward(self, *args: Any, row: Row | None = None, **kwargs: Any) -> Any:
        if row is None:
            return own(*args, **kwargs)
        with attention(self, NAME):
            return from_hidden(function, self, hidden_states(self, row, row.predictors), row.targets)

    model.forward = types.MethodType(forward, model)


def check_packable(model: Any) -> None:
    """Raise InputError where a causal language model cannot take packed rows."""
    if reason := obstacle(model):
        raise InputError(f"{type(model).__name__} cannot be distilled: {reason}, so it cannot take packed rows")


def _check_row(model: nn.Module, row: Row, cuts: Sequence[Cut], ids: Tensor, logps: Tensor, dtype: torch.dtype) -> None:
    """Compare a packed row with the model's own forward pass; of each response up to its first token that is not learnt."""
    of_targets = logps[ids == row.targets.to(ids.device)[:, None]].split([len(each.learnt) for each in cuts])
    sequences, packed = [], []
    for each, values in zip(cuts, of_targets, strict=True):
        run = int((each.learnt == torch.arange(len(each.learnt))).sum())
        sequences.append((each.prompt, each.response[:run]))
        packed.append(values[:run])
    check_packed(model, sequences, packed, dtype, REMEDY)
