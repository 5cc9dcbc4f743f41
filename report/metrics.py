"""What a round's held-out responses say: scores, win rate, KL, length, distinctness, and how sure that is.

Prompts are the independent units: the K responses to one prompt share its difficulty. So each number is first
averaged within a prompt, and a 95 % interval is Student's t interval of the mean over prompts (Student 1908),
from n - 1 degrees of freedom and the sample standard deviation. There is none for fewer than two prompts, and
it is too narrow where nearly all prompts have the same value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from baton import jsonl
from baton.errors import InputError
from baton.jsonl import Record
from baton.prompts import with_ids
from baton.records import prompt_of, rewards_of

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Evaluated:
    """One held-out prompt of one round. Arrays are float64, shape (K,); None where the file has no values."""

    where: str  # file:line
    prompt: str  # the last turn of the conversation
    responses: list[str]
    proxy: np.ndarray
    gold: np.ndarray | None
    tokens: np.ndarray | None
    words: np.ndarray
    log_ratio: np.ndarray | None  # log policy(response) - log initial(response), nats
    by_sampler: bool  # the policy's log-probabilities are those that sampling kept


Round = dict[str, Evaluated]  # by prompt id


def read_round(path: Path) -> Round:
    """The evaluated prompts of one round. Raises InputError, naming file:line, for a bad record."""
    prompts: Round = {}
    for where, record in with_ids(jsonl.read(path)):
        id_ = str(record["id"])
        if id_ in prompts:
            raise InputError(f"{where}: the id {id_} was already on {prompts[id_].where}")
        prompts[id_] = _evaluated(record, where)
    if not prompts:
        raise InputError(f"{path}: holds no records")
    return prompts


def summarize(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One summary for each round; round 0 is the model that the others are compared with.

    gold_mean, proxy_mean   mean score of a response, with `…_ci`
    win_rate                against round 0, see `win_rates`, with `win_rate_ci`; by `win_rate_by`: gold, or
                            proxy where a round has no gold scores
    kl                      KL(policy || initial) in nats per response, from the policy's own samples y at
                            temperature 1: mean of log policy(y) - log initial(y), the unbiased estimator k1
                            of Schulman 2020, «Approximating KL Divergence»; with `kl_ci`. Sampler and scorer
                            round differently, so round 0, whose true value is 0, shows the method's error
    length_mean             of a response, with `…_ci`, in `length_unit`: tokens, or words where a round has
                            no ids
    distinct                distinct responses / all responses of the round. It falls both when the samples of
                            one prompt become equal and when all prompts get the same answer, so it shows any
                            collapse; but it depends on how many prompts there are
    distinct_within         the same within each prompt's K samples, then averaged: how often two samples can
                            still make a preference pair. It depends on K alone, and is blind to one answer
                            for all prompts

    What the files do not hold is None. Raises InputError where rounds do not hold the same prompts.
    """
    for prompts in rounds[1:]:
        _check_same_prompts(rounds[0], prompts)
    everything = [prompt for prompts in rounds for prompt in prompts.values()]
    judge = "proxy" if any(prompt.gold is None for prompt in everything) else "gold"
    unit = "words" if any(prompt.tokens is None for prompt in everything) else "tokens"
    return [{"round": n, **_summarize(prompts, rounds[0], judge, unit)} for n, prompts in enumerate(rounds)]


def win_rates(scores: Sequence[np.ndarray], baseline: Sequence[np.ndarray]) -> np.ndarray:
    """For each of N prompts the share of (response, baseline response) pairs that are won, ties half.

    `scores` and `baseline` hold N arrays of shape (K,); K may differ. Returns float64 of shape (N,): within
    each prompt the Mann-Whitney U statistic over K x K, the common-language effect size (McGraw, Wong
    1992).
    """
    compared = zip(scores, baseline, strict=True)
    return np.array([np.mean((np.sign(ours[:, None] - theirs) + 1) / 2) for ours, theirs in compared])


def mean_and_interval(values: np.ndarray) -> tuple[float, list[float] | None]:
    """The mean of one value a prompt (shape (N,)) and its 95 % t interval, None for N = 1."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, None
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2) * np.std(values, ddof=1) / math.sqrt(count))
    return mean, [mean - half, mean + half]


def _summarize(prompts: Round, initial: Round, judge: str, unit: str) -> dict[str, Any]:
    values = list(prompts.values())
    gold_mean, gold_ci = _over_prompts([prompt.gold for prompt in values])
    proxy_mean, proxy_ci = _over_prompts([prompt.proxy for prompt in values])
    kl, kl_ci = _over_prompts([prompt.log_ratio for prompt in values])
    length_mean, length_ci = _over_prompts([getattr(prompt, unit) for prompt in values])
    win_rate, win_rate_ci = _against(prompts, initial, judge)
    responses = [response for prompt in values for response in prompt.responses]
    return {
        "gold_mean": gold_mean,
        "proxy_mean": proxy_mean,
        "win_rate": win_rate,
        "win_rate_ci": win_rate_ci,
        "length_mean": length_mean,
        "kl": kl,
        "distinct": len(set(responses)) / len(responses),
        "distinct_within": float(np.mean([len(set(p.responses)) / len(p.responses) for p in values])),
        "gold_mean_ci": gold_ci,
        "proxy_mean_ci": proxy_ci,
        "length_mean_ci": length_ci,
        "kl_ci": kl_ci,
        "win_rate_by": judge,
        "length_unit": unit,
        "prompts": len(values),
        "responses": len(responses),
    }


def _against(prompts: Round, initial: Round, judge: str) -> tuple[float, list[float] | None]:
    """Win rate and interval; of round 0 against itself it is a half by definition."""
    if prompts is initial:
        return 0.5, [0.5, 0.5]
    ours = [getattr(prompts[id_], judge) for id_ in initial]
    theirs = [getattr(prompt, judge) for prompt in initial.values()]
    rate, interval = mean_and_interval(win_rates(ours, theirs))
    return rate, interval and [max(0.0, interval[0]), min(1.0, interval[1])]


def _over_prompts(values: Sequence[np.ndarray | None]) -> tuple[float | None, list[float] | None]:
    """Mean and interval over prompts of each prompt's mean; None where one of them is not known."""
    if any(value is None for value in values):
        return None, None
    return mean_and_interval(np.array([np.mean(value) for value in values]))


def _check_same_prompts(initial: Round, prompts: Round) -> None:
    for one, other in ((prompts, initial), (initial, prompts)):
        for id_, prompt in one.items():
            if id_ not in other:
                path = next(iter(other.values())).where.rpartition(":")[0]
                raise InputError(f"{prompt.where}: the prompt {id_} is not in {path}; all rounds need the same prompts")


def _evaluated(record: Record, where: str) -> Evaluated:
    proxy, responses = rewards_of(record, where), record["responses"]
    policy, initial = (_numbers(record, "logps_by", name, where) for name in ("policy", "initial"))
    by_sampler = policy is None and record.get("response_logps") is not None
    if by_sampler:
        policy = np.array([math.fsum(logps) for logps in record["response_logps"]])
    tokens = record.get("response_token_ids")
    return Evaluated(
        where=where,
        prompt=prompt_of(record, where)[-1]["content"],
        responses=responses,
        proxy=np.array(proxy, dtype=np.float64),
        gold=_numbers(record, "rewards_by", "gold", where),
        tokens=None if tokens is None else np.array(list(map(len, tokens)), dtype=np.float64),
        words=np.array([len(response.split()) for response in responses], dtype=np.float64),
        log_ratio=None if policy is None or initial is None else policy - initial,
        by_sampler=by_sampler,
    )


def _numbers(record: Record, field: str, name: str, where: str) -> np.ndarray | None:
    """`record[field][name]` as K finite numbers, or None where it is absent."""
    values = record.get(field)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise InputError(f"{where}: `{field}` must be an object with one list for each name")
    if name not in values:
        return None
    numbers, count = values[name], len(record["responses"])
    if not isinstance(numbers, list) or len(numbers) != count or not all(map(_is_finite, numbers)):
        raise InputError(f"{where}: `{field}.{name}` must hold {count} finite numbers, one for each response")
    return np.array(numbers, dtype=np.float64)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
