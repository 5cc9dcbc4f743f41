"""Which sampling settings change the policy's distribution, so that a sample is none of the policy; and seeds of samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

# A setting by its name among the arguments of generation, how it is called, and whether a value changes nothing.
NEUTRAL = (
    ("temperature", "temperature", lambda value: value == 1),
    ("top_p", "top-p", lambda value: value == 1),
    ("top_k", "top-k", lambda value: value <= 0),
    ("min_new_tokens", "min-new-tokens", lambda value: value <= 0),
)

# What else changes the distribution, switched off. Where a request leaves one out, vLLM takes the model's own, of its
# generation_config.json.
SWITCHED_OFF = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def changes(settings: Mapping[str, Any]) -> list[str]:
    """The settings that change the distribution, such as `temperature 0.7`; none where the policy itself was sampled."""
    values = [(words, settings[name], neutral) for name, words, neutral in NEUTRAL if settings.get(name) is not None]
    return [f"{words} {value:g}" for words, value, neutral in values if not neutral(value)]


def words(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([part for part in (", ".join(parts[:-1]), *parts[-1:]) if part])


def seed_from(*parts: object) -> int:
    """A seed within 0 … 2^31-1 that differs, in all likelihood, whenever one of `parts` does."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode()) >> 33
