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
GOLD, PROXY = "gold", "proxy"
MANY = 0.01  # of the prompts left out: a share that is worth a warning


@dataclass(frozen=True)
class Evaluated:
    """One held-out prompt of one round. Arrays are float64, shape (K,); None where the file has no values."""

    where: str  # file:line
    prompt: str  # the last turn of the conversation
    responses: list[str]
    scores: dict[str, np.ndarray]  # by who judges: PROXY, and the names in `rewards_by`
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


def in_all(rounds: Sequence[Round]) -> tuple[list[Round], dict[str, Any] | None]:
    """The rounds with those prompts alone that all of them have, in round 0's order, and what was left out, or None.

    What was left out: how many `prompts`, `of` how many, and in how many of them each round has no responses (`missing`, by the
    round's number). Raises InputError where no prompt is in all rounds.
    """
    every = set().union(*rounds)
    common = [id_ for id_ in rounds[0] if all(id_ in prompts for prompts in rounds)]
    if not common:
        names = ", ".join(next(iter(prompts.values())).where.rpartition(":")[0] for prompts in rounds)
        raise InputError(f"no prompt is in all of {names}: all rounds have to answer the same held-out prompts")
    if len(common) == len(every):
        return [{id_: prompts[id_] for id_ in common} for prompts in rounds], None
    missing = {str(n): len(every) - len(prompts) for n, prompts in enumerate(rounds) if len(prompts) < len(every)}
    left_out = {"prompts": len(every) - len(common), "of": len(every), "missing": missing}
    return [{id_: prompts[id_] for id_ in common} for prompts in rounds], left_out


def judges_of(rounds: Sequence[Round], trained: frozenset[str] = frozenset()) -> list[str]:
    """Who judges all rounds: gold first, then the evaluation scorers by name, last the proxy, which was optimised.

    `trained` are the names in `rewards_by` that the proxy is made of. A name whose scores are the proxy's is one of them.
    """
    everything = [prompt for prompts in rounds for prompt in prompts.values()]
    names = [name for name in everything[0].scores if all(name in prompt.scores for prompt in everything)]
    others = [
        name
        for name in names
        if name not in (PROXY, *trained)
        and not all(np.array_equal(prompt.scores[name], prompt.scores[PROXY]) for prompt in everything)
    ]
    return [*sorted(others, key=lambda name: (name != GOLD, name)), PROXY]


def summarize(rounds: Sequence[Round], trained: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """One summary for each round; round 0 is the model that the others are compared with. All hold the same prompts (`in_all`).

    gold_mean, proxy_mean   mean score of a response, with `…_ci`
    win_rate                against round 0, see `win_rates`, with `win_rate_ci`; by `win_rate_by`: the first of `judges`
    judges                  for each of `judges_of`: `mean`, `mean_ci`, `win_rate`, `win_rate_ci`, and whether it is what was
                            `optimised`
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

    What the files do not hold is None.
    """
    everything = [prompt for prompts in rounds for prompt in prompts.values()]
    judges = judges_of(rounds, trained)
    unit = "words" if any(prompt.tokens is None for prompt in everything) else "tokens"
    return [{"round": n, **_summarize(prompts, rounds[0], judges, unit)} for n, prompts in enumerate(rounds)]


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


def _summarize(prompts: Round, initial: Round, judges: Sequence[str], unit: str) -> dict[str, Any]:
    values = list(prompts.values())
    gold_mean, gold_ci = _over_prompts([prompt.scores.get(GOLD) if GOLD in judges else None for prompt in values])
    proxy_mean, proxy_ci = _over_prompts([prompt.scores[PROXY] for prompt in values])
    kl, kl_ci = _over_prompts([prompt.log_ratio for prompt in values])
    length_mean, length_ci = _over_prompts([getattr(prompt, unit) for prompt in values])
    by_judge = {judge: _judged(prompts, initial, judge) for judge in judges}
    responses = [response for prompt in values for response in prompt.responses]
    return {
        "gold_mean": gold_mean,
        "proxy_mean": proxy_mean,
        "win_rate": by_judge[judges[0]]["win_rate"],
        "win_rate_ci": by_judge[judges[0]]["win_rate_ci"],
        "length_mean": length_mean,
        "kl": kl,
        "distinct": len(set(responses)) / len(responses),
        "distinct_within": float(np.mean([len(set(p.responses)) / len(p.responses) for p in values])),
        "gold_mean_ci": gold_ci,
        "proxy_mean_ci": proxy_ci,
        "length_mean_ci": length_ci,
        "kl_ci": kl_ci,
        "win_rate_by": judges[0],
        "judges": by_judge,
        "length_unit": unit,
        "prompts": len(values),
        "responses": len(responses),
    }


def _judged(prompts: Round, initial: Round, judge: str) -> dict[str, Any]:
    mean, mean_ci = _over_prompts([prompt.scores[judge] for prompt in prompts.values()])
    rate, interval = _against(prompts, initial, judge)
    return {"mean": mean, "mean_ci": mean_ci, "win_rate": rate, "win_rate_ci": interval, "optimised": judge == PROXY}


def _against(prompts: Round, initial: Round, judge: str) -> tuple[float, list[float] | None]:
    """Win rate and interval; of round 0 against itself it is a half by definition."""
    if prompts is initial:
        return 0.5, [0.5, 0.5]
    ours = [prompts[id_].scores[judge] for id_ in initial]
    theirs = [prompt.scores[judge] for prompt in initial.values()]
    rate, interval = mean_and_interval(win_rates(ours, theirs))
    return rate, interval and [max(0.0, interval[0]), min(1.0, interval[1])]


def _over_prompts(values: Sequence[np.ndarray | None]) -> tuple[float | None, list[float] | None]:
    """Mean and interval over prompts of each prompt's mean; None where one of them is not known."""
    if any(value is None for value in values):
        return None, None
    return mean_and_interval(np.array([np.mean(value) for value in values]))


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
        scores=_scores(record, where) | {PROXY: np.array(proxy, dtype=np.float64)},
        tokens=None if tokens is None else np.array(list(map(len, tokens)), dtype=np.float64),
        words=np.array([len(response.split()) for response in responses], dtype=np.float64),
        log_ratio=None if policy is None or initial is None else policy - initial,
        by_sampler=by_sampler,
    )


def _scores(record: Record, where: str) -> dict[str, np.ndarray]:
    """The scores of `rewards_by`, by name."""
    names = record.get("rewards_by") or {}
    if not isinstance(names, dict):
        raise InputError(f"{where}: `rewards_by` must be an object with one list for each name")
    return {name: numbers for name in names if (numbers := _numbers(record, "rewards_by", name, where)) is not None}


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
