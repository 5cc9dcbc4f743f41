"""Token sequences that share a prompt become trees, and trees become rows: no prompt twice, no padding.

A tree is one prompt and the distinct responses to it. In a row the trees lie one after another, each as
`prompt | response 1 | response 2 | …`; the positions of every response go on from the end of its prompt, and
attention (`attention.py`) lets a response see its prompt and itself only, so that a row's numbers are those
of each sequence alone (arXiv 2410.20305). The last token of a response is no input where nothing is read at it: none
is predicted from it. Of `whole` sequences it is one: a reward is read there.
"""

from bisect import bisect_left, insort
from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baton.models.sequences import Tokens, shared_tokens


@dataclass
class Layout:
    """Where the trees of one row lie, in tokens: all that attention needs to know.

    `trees` holds, in row order, `(prompt length, [input length of each response])`; every length counts
    tokens of the row. `masks` keeps what attention derives from it, shared by all layers of a forward pass. It is no dict,
    since FSDP gives each layer a copy of those.
    """

    trees: list[tuple[int, list[int]]]
    masks: UserDict = field(default_factory=UserDict)

    @property
    def length(self) -> int:
        return sum(prompt + sum(responses) for prompt, responses in self.trees)


class Left:
    """What a forward pass leaves behind: the router's logits of each layer, of a mixture of experts (`router.py`).

    No dataclass, of which FSDP gives the model a copy.
    """

    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class Row:
    """One packed row of T tokens with N scored response tokens.

    `input_ids` and `position_ids` are int64 (T,). Scored token n is `targets[n]`, predicted from the hidden
    state at `predictors[n]`; both int64 (N,). With `counts`, float32 (T,), a forward pass leaves the router's logits in `left`.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    layout: Layout
    counts: Tensor | None = None
    left: Left = field(default_factory=Left)


@dataclass(frozen=True)
class Place:
    """Where a sequence is scored: in `rows[row]`, its scored tokens `start` to `start + length`.

    Its last input is the row's token `last`; of `whole` sequences, that is their last token.
    """

    row: int
    start: int
    length: int
    last: int


def with_prompts(sequences: Sequence[Tokens]) -> list[tuple[Tokens, Tokens]]:
    """Cut sequences after the longest beginning that all of them share, their prompt; a sequence may be all prompt.

    Sequences that share no beginning are a prompt each.
    """
    return cut_after(sequences, shared_tokens(sequences))


def cut_after(sequences: Sequence[Tokens], shared: int) -> list[tuple[Tokens, Tokens]]:
    """Sequences as prompt and response, the prompt being the tokens that they share, or all of each where that is none."""
    return [(ids[: shared or len(ids)], ids[shared or len(ids) :]) for ids in sequences]


def pack(
    sequences: Sequence[tuple[Tokens, Tokens]], tokens_per_row: int | None, whole: bool = False
) -> tuple[list[Row], list[Place]]:
    """Pack `(prompt, response)` token sequences into rows of at most `tokens_per_row` tokens (None: one row).

    Sequences with the same prompt share it, equal sequences share everything. A tree that alone is longer
    than a row is split between responses, its prompt repeated; one prompt with one response is never split,
    so a row is longer than `tokens_per_row` where a single sequence is.

    Args:
        sequences: prompts of at least 1 token; responses of any length, 0 included (then nothing is scored).
        whole: the last token of a response is an input as well.
    Returns:
        the rows, and for each sequence, in order, where it is scored.
    Raises:
        ValueError: an empty prompt (the first response token would have nothing to be predicted from).
    """
    branches: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for index, (prompt, response) in enumerate(sequences):
        if not len(prompt):
            raise ValueError(f"sequence {index} has an empty prompt; a prompt needs at least one token")
        branches.setdefault(tuple(prompt), {}).setdefault(tuple(response), []).append(index)

    trees = [
        (prompt, responses)
        for prompt, all_responses in branches.items()
        for responses in _split(len(prompt), list(all_responses), tokens_per_row, whole)
    ]
    places: list[Place | None] = [None] * len(sequences)
    rows = []
    for members in _fit([_size(len(prompt), responses, whole) for prompt, responses in trees], tokens_per_row):
        rows.append(_row([trees[member] for member in members], whole))
        start = end = 0  # of the scored tokens, of the inputs
        for prompt, responses in (trees[member] for member in members):
            end += len(prompt)
            prompt_end = end
            for response in responses:
                inputs = _inputs(response, whole)
                end += inputs
                for index in branches[prompt][response]:
                    places[index] = Place(len(rows) - 1, start, len(response), (end if inputs else prompt_end) - 1)
                start += len(response)
    return rows, places


def distinct_tokens(sequences: Sequence[tuple[Tokens, Tokens]]) -> int:
    """Tokens that rows of these `(prompt, response)` sequences need at least: each prompt once, each response to it once."""
    distinct = {(tuple(prompt), tuple(response)) for prompt, response in sequences}
    prompts = {prompt for prompt, _ in distinct}
    return sum(map(len, prompts)) + sum(_size(0, [response], whole=False) for _, response in distinct)


def _inputs(response: Tokens, whole: bool) -> int:
    """How many of a response's tokens are inputs."""
    return len(response) if whole else max(len(response) - 1, 0)


def _size(prompt: int, responses: Sequence[Tokens], whole: bool) -> int:
    """Tokens that a tree takes in a row."""
    return prompt + sum(_inputs(response, whole) for response in responses)


def _split(prompt: int, responses: list[tuple[int, ...]], limit: int | None, whole: bool) -> list[list[tuple[int, ...]]]:
    """Cut a tree's responses into groups that fit a row together with the prompt."""
    groups = [[responses[0]]]
    for response in responses[1:]:
        if limit is not None and _size(prompt, [*groups[-1], response], whole) > limit:
            groups.append([])
        groups[-1].append(response)
    return groups


def _fit(sizes: list[int], limit: int | None) -> list[list[int]]:
    """Best-fit decreasing: the members of each bin, as indices into `sizes`. O(n log n) comparisons."""
    if limit is None:
        return [list(range(len(sizes)))] if sizes else []
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(room, (sizes[index], -1))
        left, target = room.pop(at) if at < len(room) else (limit, len(bins))
        if target == len(bins):
            bins.append([])
        bins[target].append(index)
        insort(room, (left - sizes[index], target))
    return bins


def _row(trees: list[tuple[tuple[int, ...], list[tuple[int, ...]]]], whole: bool) -> Row:
    """Lay trees one after another."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    lengths: list[tuple[int, list[int]]] = []
    for prompt, responses in trees:
        input_ids += prompt
        position_ids += range(len(prompt))
        prompt_end = len(input_ids) - 1
        for response in responses:
            if response:
                predictors += [prompt_end, *range(len(input_ids), len(input_ids) + len(response) - 1)]
                targets += response
            inputs = _inputs(response, whole)
            input_ids += response[:inputs]
            position_ids += range(len(prompt), len(prompt) + inputs)
        lengths.append((len(prompt), [_inputs(response, whole) for response in responses]))
    ids = (torch.tensor(values, dtype=torch.int64) for values in (input_ids, position_ids, predictors, targets))
    return Row(*ids, Layout(lengths))
