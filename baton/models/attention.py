"""Attention over packed trees: a prompt sees itself, a response sees its prompt and itself.

Registered with transformers as the attention implementation `shared_prefix`; every model that goes through
transformers' attention interface passes its keyword arguments on to it, the row's `Layout` among them. On a
GPU it is FlashAttention for sequences of different lengths (`by_sequences`), in float32 and with a soft cap FlexAttention
with a block mask (`by_blocks`); elsewhere it goes tree by tree and block by block, which computes hardly a pair of tokens
that do not see each other (`by_trees`).

What of the GPU's paths runs on a CPU, and so in every test: which keys belong to which sequence, the block mask, and
FlexAttention's compiled forward pass without gradients. What does not: FlashAttention, the Triton kernels, their limits
(shared memory), and FlexAttention's backward pass. For those there is `agreement.py`, which a training on a GPU runs before
its first step, for the forward pass, and tests/models/test_flex.py, which also runs on a GPU where there is one, gradients
included.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from baton.models.blockwise import causal_attention, for_each_head
from baton.models.trees import Layout

NAME = "shared_prefix"

# Tokens of a block of FlexAttention's mask. Rows are padded to a multiple of it on a GPU (`padded_length`).
FLEX_BLOCK = 128

# Triton multiplies matrices of at least this width, so narrower heads get zeros.
LEAST_HEAD_DIM = 16

# The widest heads that FlashAttention takes.
MOST_FLASH_HEAD_DIM = 256

# FlexAttention is compiled once for each combination of dtype, head shape, soft cap and gradients on or off; beyond this
# many, torch raises an error. (Its default is 8, and then it computes length x length scores.)
MOST_COMPILATIONS = 64


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention of one row of trees.

    Args:
        query: (1, heads, T, D); key, value: (1, key heads, T, D). T may exceed the layout's length: what
            follows it is padding, whose output is meaningless.
        layout: where the trees lie. `attention_mask` is ignored, it says nothing of trees.
        sliding_window: a token sees the `sliding_window` positions up to its own (Gemma, Mistral).
        softcap: `softcap * tanh(score / softcap)` on the scores (Gemma 2).
    Returns:
        (1, T, heads, D) and None, as transformers expects.
    Raises:
        ValueError: called without a layout, that is by another forward pass than `forward.py`'s.
    """
    if layout is None:
        raise ValueError(f"the {NAME!r} attention needs the layout of a packed row; use model.forward(fused_lm_head=True)")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if takes_sequences(query, value, dropout, softcap):
        output = by_sequences(query, key, value, layout, scaling, sliding_window)
    elif query.is_cuda and not dropout:  # FlexAttention has no dropout
        output = by_blocks(query, key, value, layout, scaling, sliding_window, softcap)
    else:
        output = by_trees(query, key, value, layout, scaling, dropout, sliding_window, softcap)
    return output.transpose(1, 2).contiguous(), None  # which some models take a view of


def by_trees(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The attention, (1, heads, T, D), one prompt or response at a time; arguments as in `shared_prefix_attention`."""
    key, value = for_each_head(key, value, query.shape[1] // key.shape[1])
    attend = functools.partial(_attend, scaling=scaling, dropout=dropout, window=window, softcap=softcap)
    # A prompt with one response is one causal sequence: the work of two calls in one, which counts where texts are short
    trees = [(prompt + sum(parts), []) if len(parts) == 1 else (prompt, parts) for prompt, parts in layout.trees]
    lengths = [length for prompt, responses in trees for length in (prompt, *responses)]
    lengths.append(query.shape[2] - layout.length)
    queries, keys, values = (iter(states.split(lengths, dim=2)) for states in (query, key, value))
    outputs = []
    for _, responses in trees:
        prompt_key, prompt_value = next(keys), next(values)
        outputs.append(attend(next(queries), prompt_key, prompt_value))
        for length in responses:
            own_query, own_key, own_value = next(queries), next(keys), next(values)
            if length:
                own_key = torch.cat([prompt_key, own_key], dim=2)
                own_value = torch.cat([prompt_value, own_value], dim=2)
                outputs.append(attend(own_query, own_key, own_value))
    outputs.append(next(queries))
    return torch.cat(outputs, dim=2)


def _attend(query, key, value, *, scaling, dropout, window, softcap) -> Tensor:
    """Causal attention of the last Q positions to all K; query (1, heads, Q, D), key, value (1, heads, K, D)."""
    # Under autocast the rotary embedding leaves queries and keys in float32, while values are in the lower precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if softcap is None and not dropout:
        return causal_attention(query, key, value, scaling, window)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(_unseen(query.shape[2], key.shape[2], window, query.device), -math.inf)
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32), dropout).to(query.dtype)
    return weights @ value


def _unseen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """What each of the last `queries` positions must not see, bool (queries, keys): later keys, those out of its window."""
    positions = torch.arange(keys, device=device)
    distance = positions[keys - queries :, None] - positions
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def takes_sequences(query: Tensor, value: Tensor, dropout: float, softcap: float | None) -> bool:
    """Whether FlashAttention computes this: in half precision, without soft cap, on a GPU from compute capability 8.0 on."""
    return (
        value.is_cuda
        and value.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
        and value.shape[-1] % 8 == 0
        and value.shape[-1] <= MOST_FLASH_HEAD_DIM
        and not dropout
        and softcap is None
        and torch.cuda.get_device_capability(value.device) >= (8, 0)
    )


def by_sequences(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None) -> Tensor:
    """The attention, (1, heads, T, D), by FlashAttention; arguments as in `shared_prefix_attention`.

    Each prompt and each response is a sequence of queries. A response's keys are those of its prompt and its own: the prompt's
    are copied, which costs less than any mask.
    """
    length = query.shape[2]
    if ("sequences", length) not in layout.masks:
        layout.masks["sequences", length] = sequences_of_keys(layout, length, query.device)
    sequences = layout.masks["sequences", length]
    # Under autocast the rotary embedding leaves queries and keys in float32.
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))  # (T, heads, D)
    key, value = (_Copied.apply(states, sequences) for states in (key, value))  # (keys, key heads, D)
    return _flash(query, key, value, sequences, scaling, window).transpose(0, 1)[None]


class Sequences(NamedTuple):
    """A row's prompts, responses and padding as sequences of queries, each with the keys that it sees; on one device.

    `query_ends` and `key_ends`, int32 (sequences + 1,), say where each sequence begins and ends; `most_queries` and `most_keys`
    are the longest's. Key k is that of the row's token `sources[k]`, int64 (keys,). `own`, int64 (T,), is where each token's
    own key is. A prompt's keys are copied for each of its responses: token `copied[i]` has further keys at `copies[i]`,
    int64 (prompt tokens, most responses), the number of keys where there are fewer.
    """

    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int
    sources: Tensor
    own: Tensor
    copied: Tensor
    copies: Tensor


def sequences_of_keys(layout: Layout, length: int, device: torch.device) -> Sequences:
    """The `Sequences` of a row of `length` tokens; padding is one of them, which sees itself."""
    queries, keys, prompts = [], [], []  # of each sequence: its tokens, the keys that it sees, where its prompt begins
    copied, copies = [], []
    start = seen = 0  # tokens and keys so far
    most_responses = max((sum(map(bool, responses)) for _, responses in layout.trees), default=0)
    for prompt, responses in [*layout.trees, (length - layout.length, [])]:
        root, lengths = start, [response for response in responses if response]
        places = []
        for size, before in [(prompt, 0), *((response, prompt) for response in lengths)]:
            if not size:
                continue
            queries.append(size)
            keys.append(before + size)
            prompts.append((root, before, start))
            places += [seen] if before else []
            start, seen = start + size, seen + before + size
        if places:
            copied.append(torch.arange(root, root + prompt))
            table = torch.arange(prompt)[:, None] + torch.tensor(places)
            copies.append(F.pad(table, (0, most_responses - len(places)), value=-1))
    own_ends = torch.tensor(keys).cumsum(0)
    sources = torch.cat(
        [torch.cat([torch.arange(r, r + b), torch.arange(s, s + q)]) for (r, b, s), q in zip(prompts, queries, strict=True)]
    )
    own = torch.cat([torch.arange(end - q, end) for end, q in zip(own_ends.tolist(), queries, strict=True)])
    copies = torch.cat([*copies, torch.empty(0, most_responses, dtype=torch.int64)])
    return Sequences(
        F.pad(torch.tensor(queries).cumsum(0), (1, 0)).int().to(device),
        F.pad(own_ends, (1, 0)).int().to(device),
        max(queries),
        max(keys),
        sources.to(device),
        own.to(device),
        torch.cat([*copied, torch.empty(0, dtype=torch.int64)]).to(device),
        copies.where(copies >= 0, seen).to(device),
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float, window: int | None) -> Tensor:
    """FlashAttention of sequences, (T, heads, D): one's queries are the last of its keys, and see those up to their own."""
    # torch.nn.attention.varlen calls the same, with other arguments in each version of torch
    output, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        sequences.query_ends,
        sequences.key_ends,
        sequences.most_queries,
        sequences.most_keys,
        0.0,  # dropout
        True,  # causal
        False,  # no debug mask
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return output


class _Copied(torch.autograd.Function):
    """Keys or values (T, heads, D) as `Sequences` wants them, (keys, heads, D).

    The gradient of a token is the sum over its copies, read one after another: torch's own adds them in any order, and slowly.
    """

    @staticmethod
    def forward(ctx, states, sequences):
        ctx.sequences = sequences
        return states[sequences.sources]

    @staticmethod
    def backward(ctx, grad):
        _, _, _, _, _, own, copied, copies = ctx.sequences
        total = grad[own]
        if len(copied):
            grad = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
            total[copied] += grad[copies].sum(dim=1)
        return total, None


def by_blocks(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """The attention, (1, heads, T, D), by FlexAttention; arguments as in `shared_prefix_attention`.

    On a CPU it has no gradients, and needs a C++ compiler.
    """
    length, head_dim = query.shape[2:]
    if (window, length) not in layout.masks:
        layout.masks[window, length] = block_mask(layout, length, window, query.device)
    # Under autocast the rotary embedding leaves queries and keys in float32; FlexAttention takes one dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if head_dim < LEAST_HEAD_DIM:
        query, key, value = (F.pad(states, (0, LEAST_HEAD_DIM - head_dim)) for states in (query, key, value))
    for states in (query, key, value):
        # Else torch takes a number of blocks that happens to be one of these for the same thing, and compiles again.
        torch._dynamo.mark_static(states, (0, 1, 3))
    # Numbers that vary would become arguments of the kernel; FlexAttention refuses a soft cap that is one.
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=MOST_COMPILATIONS):
        output = _compiled_flex()(
            query,
            key,
            value,
            score_mod=None if softcap is None else _softcap(softcap),
            block_mask=layout.masks[window, length],
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output[..., :head_dim]


@functools.cache
def _compiled_flex():
    # fullgraph: to fall back on uncompiled code would take length x length memory without a word.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@functools.cache
def _softcap(softcap: float):
    return lambda score, batch, head, q, k: softcap * torch.tanh(score / softcap)


def padded_length(length: int) -> int:
    """How long FlexAttention wants a row of `length` tokens: whole blocks, and two at least.

    torch compiles another kernel for sizes of 1.
    """
    return max(-(-length // FLEX_BLOCK), 2) * FLEX_BLOCK


def block_mask(layout: Layout, length: int, window: int | None, device: torch.device) -> BlockMask:
    """FlexAttention's mask of a row of `length` tokens, padding included.

    Takes time and memory for `length` tokens and for each pair of blocks, not for each pair of tokens. What a token
    sees is in tensors, not in the code of `sees`, so that all layouts and windows share one compiled kernel.
    """
    bounds = visible_keys(layout, length, window)
    touched, covered = (_blocks_of(bounds, length, whole) for whole in (False, True))
    full = covered == FLEX_BLOCK  # all queries of the block see all its keys
    partial = (touched > 0) & ~full
    bounds = bounds.to(device)
    torch._dynamo.mark_static(bounds, 0)

    def sees(batch, head, q, k):
        return ((k >= bounds[0, q]) & (k < bounds[1, q])) | ((k >= bounds[2, q]) & (k <= q))

    return BlockMask.from_kv_blocks(
        *_listed(partial, device),
        *_listed(full, device),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def visible_keys(layout: Layout, length: int, window: int | None) -> Tensor:
    """The keys that each token of a row sees, as two intervals, on the CPU: int32 (3, length).

    Token q sees the keys from `[0, q]` up to but not including `[1, q]`, of its prompt, and those from `[2, q]` to q,
    of what it is part of itself. The two do not touch; where they would, the second is all. Padding, which nobody
    reads, sees the padding before it and itself: every token sees some key, so none has a softmax of nothing.
    """
    sizes, prompts, roots = [], [], []  # of prompts, responses and the padding: tokens, tokens of its prompt, where that begins
    root = 0
    for prompt, responses in layout.trees:
        sizes += [prompt, *responses]
        prompts += [0] + [prompt] * len(responses)
        roots += [root] * (1 + len(responses))
        root += prompt + sum(responses)
    size = torch.tensor([*sizes, length - root])
    start = size.cumsum(0) - size
    prompt, prompt_from, own_from = (
        part.repeat_interleave(size) for part in (torch.tensor([*prompts, 0]), torch.tensor([*roots, root]), start)
    )  # (length,) each
    token = torch.arange(length)
    prompt_to = prompt_from + prompt
    if window is not None:
        out_of_window = prompt + token - own_from - window + 1  # this many positions, from the prompt's first on
        prompt_from = prompt_from + out_of_window.clamp(min=0).minimum(prompt)
        own_from = own_from.maximum(token - window + 1)
    joined = prompt_to == own_from
    own_from = torch.where(joined, prompt_from, own_from)
    prompt_to = torch.where(joined, prompt_from, prompt_to)
    return torch.stack([prompt_from, prompt_to, own_from]).int()


def _blocks_of(bounds: Tensor, length: int, whole: bool) -> Tensor:
    """How many queries of each block see some key, or the `whole`, of each block of keys: int64 (blocks, blocks).

    A query that sees keys of a block in both of its intervals counts twice. (It never sees all keys of it that way.)
    """
    prompt_from, prompt_to, own_from = bounds.long()
    token = torch.arange(length)
    blocks = -(-length // FLEX_BLOCK)
    count = 0
    for first, end in ((prompt_from, prompt_to), (own_from, token + 1)):
        first_block = -(-first // FLEX_BLOCK) if whole else first // FLEX_BLOCK
        end_block = end // FLEX_BLOCK if whole else -(-end // FLEX_BLOCK)
        some = (first < end) & (first_block < end_block)
        row = token[some] // FLEX_BLOCK * (blocks + 1)
        starts, ends = (
            torch.bincount(row + block[some], minlength=blocks * (blocks + 1)) for block in (first_block, end_block)
        )
        count = count + (starts - ends).view(blocks, blocks + 1).cumsum(1)[:, :-1]
    return count


def _listed(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of bool (blocks, blocks), how many are chosen in each row, int32 (1, 1, blocks), and which, those first."""
    numbers = chosen.sum(dim=1, dtype=torch.int32)
    indices = chosen.int().argsort(dim=1, descending=True, stable=True).int()
    return numbers[None, None].to(device), indices[None, None].to(device)


AttentionInterface.register(NAME, shared_prefix_attention)
