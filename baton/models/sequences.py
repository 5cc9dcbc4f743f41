"""What sequences of token ids have in common, and where they end: plain arithmetic, without torch."""

from collections.abc import Sequence

Tokens = Sequence[int]


def shared_tokens(sequences: Sequence[Tokens]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)  # what these two share, all between them do
    return next((place for place, both in enumerate(zip(first, last, strict=False)) if both[0] != both[1]), len(first))


def without_padding(sequence: Tokens, pad: int | None) -> Tokens:
    """A sequence up to its last token that is not the padding token; at least one token."""
    end = len(sequence)
    while end > 1 and sequence[end - 1] == pad:
        end -= 1
    return sequence[:end]
