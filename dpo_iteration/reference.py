"""Log-probabilities of the reference model, computed once, packed, and kept in a file.

The file is named by a hash of everything that decides its numbers, so that later epochs, restarts and reruns
find it and another reference model, tokenizer or data set does not.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from dpo_iteration.attention import NAME
from dpo_iteration.forward import TOKENS_PER_ROW, attention, obstacle, score
from dpo_iteration.trees import Tokens

# One preference pair: prompt, chosen, rejected.
Pair = tuple[Tokens, Tokens, Tokens]


def kept_reference_logps(
    pairs: Sequence[Pair],
    load_reference: Callable[[], PreTrainedModel],
    folder: Path,
    key: Sequence[str],
    **settings,
) -> np.ndarray:
    """`reference_logps` of all pairs from the file in `folder`, which is written first where there is none.

    Every process of a distributed run scores its share of the pairs and gets all of them.

    Args:
        load_reference: called only when there is no file; the model on its device, the whole of it in each
            process.
        key: what else decides the numbers: the reference model's fingerprint, the tokenizer's, the dtype.
        settings: `tokens_per_row` and `ld_alpha` of `reference_logps`.
    Returns:
        float32 (pairs, 2): chosen, rejected.
    """
    state = PartialState()
    name = _digest(pairs, [*key, f"ld_alpha={settings.get('ld_alpha')}"])
    path = Path(folder) / f"reference-logps-{name}.npy"
    state.wait_for_everyone()
    if path.exists():
        return np.load(path, allow_pickle=False)
    ranks = state.num_processes
    mine = reference_logps(load_reference(), pairs[state.process_index :: ranks], **settings).cpu().numpy()
    logps = np.empty((len(pairs), 2), dtype=np.float32)
    for rank, share in enumerate(gather_object([mine])):
        logps[rank::ranks] = share
    if state.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.save(file, logps, allow_pickle=False)
        os.replace(partial, path)
    state.wait_for_everyone()
    return logps


@torch.no_grad()
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
    token_logps = _packed if obstacle(model) is None else _one_by_one
    logps = torch.empty(len(pairs), 2, device=model.device)
    training = model.training
    model.eval()
    for members in _batches(pairs, tokens_per_row):
        sequences = [(pairs[i][0], response) for i in members for response in pairs[i][1:]]
        scored = token_logps(model, sequences)
        for i, chosen, rejected in zip(members, scored[::2], scored[1::2], strict=True):
            shared = min(len(chosen), len(rejected))
            logps[i, 0] = _weighted_sum(chosen, shared, ld_alpha)
            logps[i, 1] = _weighted_sum(rejected, shared, ld_alpha)
    model.train(training)
    return logps


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


def _weighted_sum(token_logps: Tensor, shared: int, ld_alpha: float | None) -> Tensor:
    if ld_alpha is None:
        return token_logps.sum()
    return token_logps[:shared].sum() + ld_alpha * token_logps[shared:].sum()


def _batches(pairs: Sequence[Pair], tokens: int) -> list[list[int]]:
    """Indices of pairs in groups of at most `tokens` tokens; pairs of one prompt side by side."""
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), tuple(pairs[i][0])))
    batches: list[list[int]] = []
    room = 0
    for i in order:
        size = sum(len(part) for part in pairs[i])
        if size > room:
            batches.append([])
            room = tokens
        batches[-1].append(i)
        room -= size
    return batches


def _digest(pairs: Sequence[Pair], key: Sequence[str]) -> str:
    """Hash of the token ids of all pairs, in order, and of the key."""
    hasher = hashlib.sha256("\0".join(key).encode())
    for pair in pairs:
        for part in pair:
            hasher.update(np.asarray([len(part), *part], dtype=np.int64).tobytes())
    return hasher.hexdigest()[:16]
