"""A whole run of annotation: score what is missing, keep each score at once, write the output, and account."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from annotate_data.summary import Summary
from annotate_data.work import Annotated, Responses, Scorer, Scores, write_records
from baton.drops import Drops
from baton.errors import InputError
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
) -> Drops:
    """Score `responses` with each of `scorers`, one after the other, and finish `stage`; returns the records left out.

    A scorer is made only when there is work for it. `merge(record, {scorer: scores})` gives the output's record, and columns of
    K numbers to summarise. Raises InputError, naming the record, for a score that is not finite.
    """
    barrier()  # process 0 has removed the results of an earlier run with other arguments
    scores = Scores(stage.output, responses, list(scorers))
    barrier()  # all have seen what is done
    shares = data_parallel().size
    progress = Progress(scores.partial.count // shares, "scores", scores.partial.done // shares)
    if scores.partial.done:
        log.info("%d of %d scores are done already", scores.partial.done, scores.partial.count)
    for name, make in scorers.items():
        if not scores.missing(name):
            continue
        scorer = make()
        for score in scorer(scores.tasks(name)):
            if score.value is not None and not math.isfinite(score.value):
                raise InputError(
                    f"{score.task.where}: response {score.index + 1} of prompt {score.task.record['id']}: "
                    f"{name} gave {score.value}; of a model, try --dtype float32"
                )
            scores.keep(name, score)
            progress.update()
        del scorer  # before the next one takes the memory
    progress.close()
    barrier()  # all scores are on disk
    return finish(stage, scores, merge) if rank() == 0 else Drops()


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


def _short(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
