"""A whole run of annotation: score what is missing, keep each score at once, write the output, and account."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from annotate_data.summary import Summary
from annotate_data.work import Annotated, Responses, Score, Scorer, Scores, write_records
from baton.drops import Drops
from baton.errors import FailuresListed, InputError
from baton.jsonl import Record
from baton.models.devices import barrier
from baton.parallel import data_parallel
from baton.program import rank
from baton.progress import Progress
from baton.stage import Stage

log = logging.getLogger("baton")

Merge = Callable[[Record, dict[str, list[float]]], tuple[Record, dict[str, list[float]]]]

NAMED = 20  # how many prompts a warning names; the summary names NAMED_KEPT
NAMED_KEPT = 1000


def annotate(
    stage: Stage,
    responses: Responses,
    scorers: dict[str, Callable[[], Scorer]],
    merge: Merge,
    drop_unanswered: bool = False,
) -> Drops:
    """Score `responses` with each of `scorers`, one after the other, and finish `stage`; returns the records left out.

    A scorer is made only when there is work for it. `merge(record, {scorer: scores})` gives the output's record, and columns of
    K numbers to summarise.

    A response that a scorer refuses has no score for good: its record is left out. Where another try may give a score, nothing
    is kept, unless `drop_unanswered`; the output is not written then, and the same command asks for these scores alone.

    Raises InputError, naming the record, for a score that is not finite, and for a scorer that refuses every response;
    FailuresListed where scores are missing.
    """
    barrier()  # process 0 has removed the results of an earlier run with other arguments
    scores = Scores(stage.output, responses, list(scorers))
    barrier()  # all have seen what is done
    shares = data_parallel().size
    progress = Progress(scores.partial.count // shares, "scores", scores.partial.done // shares)
    if scores.partial.done:
        log.info("%d of %d scores are done already", scores.partial.done, scores.partial.count)
    reasons: Counter[str] = Counter()  # why scores are missing, as far as this process has asked for them
    for name, make in scorers.items():
        if not scores.missing(name):
            continue
        scorer = make()
        try:
            reasons += keep_all(name, scorer(scores.tasks(name)), scores, progress, drop_unanswered)
        except FailuresListed as failure:  # a service is away: what other scorers say can wait until it is back
            reasons[f"{name}: {failure}"] += 1
            break
        del scorer  # before the next one takes the memory
    progress.close()
    barrier()  # all scores are on disk
    refuse_missing(Scores(stage.output, responses, list(scorers)), reasons)
    barrier()  # all have seen that none is missing: process 0 now takes the parts away
    return finish(stage, scores, merge) if rank() == 0 else Drops()


def keep_all(name: str, given: Iterable[Score], scores: Scores, progress: Progress, drop_unanswered: bool) -> Counter[str]:
    """Keep what the scorer `name` gives; returns why responses have no score that another try may give, with their numbers.

    That a response has no score is kept only once a response has one after it, or at the end: a scorer that fails at all of
    them, or a service that dies, is no reason to leave records out.
    """
    reasons: Counter[str] = Counter()
    held: list[Score] = []
    any_score = False
    for score in given:
        if score.value is None and score.again and not drop_unanswered:
            reasons[f"{name}: {score.note}"] += 1
            if reasons[f"{name}: {score.note}"] <= NAMED:
                log.warning("%s: no score by %s yet: %s", _named(score), name, score.note)
            continue
        held.append(score)
        if score.value is None:
            continue
        if not math.isfinite(score.value):
            raise InputError(f"{_named(score)}: {name} gave {score.value}, which is no score; for a model, try --dtype float32")
        any_score = True
        _keep(name, held, scores, progress)
    if held and not any_score and not scores.has_any(name):
        first = held[0]
        detail = f": {first.detail}" if first.detail else ""
        raise InputError(f"{_named(first)}: {first.note}{detail}\n{name} gave no response a score; nothing of this is kept")
    _keep(name, held, scores, progress)
    return reasons


def _keep(name: str, held: list[Score], scores: Scores, progress: Progress) -> None:
    """Put `held` on disk and empty it; what says more of a reason is shown with the first response that has it."""
    for score in held:
        if score.detail and score.note not in scores.shown:
            log.warning("%s: %s: %s", _named(score), score.note, score.detail)
            scores.shown.add(score.note)
        scores.keep(name, score)
        progress.update()
    held.clear()


def refuse_missing(scores: Scores, reasons: Counter[str]) -> None:
    """Raise FailuresListed, with the records and the reasons that this process knows, where `scores` are not complete."""
    missing = {name: ids for name in scores.scorers if (ids := scores.unscored(name))}
    if not missing:
        return
    count = scores.partial.count
    lines = [f"{count - scores.partial.done} of {count} scores are missing, so there is no output:"]
    for name, ids in missing.items():
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        lines.append(f"  {name}: of {len(ids)} records: {', '.join(ids[:NAMED])}{more}")
    lines += [f"  {count} × {reason}" for reason, count in reasons.most_common(NAMED)]
    if not reasons:
        lines.append("  the warnings above say why")
    lines.append(
        "all other scores are kept, and the same command asks for the missing ones alone; with --unanswered drop it leaves out "
        "the records that still get no answer"
    )
    raise FailuresListed("\n".join(lines))


def finish(stage: Stage, scores: Scores, merge: Merge) -> Drops:
    """Write the output, its summary and its manifest; a record with a response that has no score is dropped, and named."""
    found = Findings(merge)
    written = write_records(stage.output, found.merged(scores.all()))
    numbers, noted = found.numbers(), found.noted()
    for name, values in numbers.items():
        log.info("%s: %s", name, " ".join(f"{key} {_short(value)}" for key, value in values.items()))
    for note, facts in noted.items():
        more = ", …" if len(facts["prompts"]) > NAMED else ""
        log.warning("%d responses %s; prompts %s%s", facts["responses"], note, ", ".join(facts["prompts"][:NAMED]), more)
    records_in = len(scores.responses.counts)
    account = {"in": records_in, "out": written, "dropped": dict(found.drops.counts)}
    summary = {**numbers, "records": account, "noted": noted}
    summary_path(stage.output).write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    stage.finish(
        records_in=records_in,
        records_out=written,
        drops=found.drops,
        summary=numbers,
        noted=noted,
        scored_by_this_run=scores.partial.count - scores.partial.done,
    )
    return found.drops


class Findings:
    """What an annotated file comes to: records left out, the summary of each column, notes. Complete once `merged` is read."""

    def __init__(self, merge: Merge):
        self.merge = merge
        self.drops = Drops()
        self.summaries: defaultdict[str, Summary] = defaultdict(Summary)
        self.prompts: defaultdict[str, list[str]] = defaultdict(list)  # ids by note, one for each response

    def merged(self, annotated: Iterable[Annotated]) -> Iterator[Record]:
        """Yield the output's records: those whose responses all have scores."""
        for where, record, scores, notes, failures in annotated:
            if failures:
                self.drops.add(failures[0], f"{record['id']} ({where})")
                continue
            for note in notes:
                self.prompts[note].append(record["id"])
            made, columns = self.merge(record, scores)
            for name, values in columns.items():
                self.summaries[name].add(record["responses"], values)
            yield made

    def numbers(self) -> dict[str, dict[str, Any]]:
        """The summary of each column."""
        return {name: summary.numbers() for name, summary in self.summaries.items()}

    def noted(self) -> dict[str, dict[str, Any]]:
        """For each note, how many responses it is about, and the ids of the first of their prompts."""
        return {
            note: {"responses": len(ids), "prompts": list(dict.fromkeys(ids))[:NAMED_KEPT]}
            for note, ids in self.prompts.items()
        }


def summary_path(output: Path) -> Path:
    """The path of an output's summary."""
    return output.with_name(output.name + ".summary.json")


def _named(score: Score) -> str:
    """The response that a score is of, for messages."""
    return f"{score.task.where}: response {score.index + 1} of prompt {score.task.record['id']}"


def _short(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
