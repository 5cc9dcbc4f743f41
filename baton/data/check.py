"""`check`: what a file holds, how long it is, what is repeated in it and what cannot be read. Writes nothing."""

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baton.data.arguments import CheckArguments
from baton.data.reading import Source, Tally, in_lines, reason_of, refused
from baton.data.survey import Survey, statistics
from baton.errors import FailuresListed, InputError
from baton.jsonl import Record
from baton.program import harmless

TOKENISED = 10_000  # records whose tokens are counted, unless all are


def check(arguments: CheckArguments) -> None:
    """Print the report. Raises FailuresListed where records were refused, InputError where nothing can be read."""
    tokenizer = _tokenizer(arguments)
    source = Source(arguments)
    print(f"{harmless(arguments.dataset_name_or_path)}: {source.kind}, read from {source.shape.name}")
    survey, tally, examples = Survey(source.kind), Tally(), []
    tokens = Tokens(tokenizer, source.kind, None if arguments.all else TOKENISED)
    for where, records in source.read(tally):
        for record in records:
            survey.add(record)
            if tokenizer is not None:
                tokens.add(record, where, tally)
            if len(examples) < arguments.show:
                examples.append((where, record))
    failures = refused(tally.counts)
    print("\n".join(report(source, survey, tally, tokens)))
    for where, record in examples:
        print("", harmless(where), *(f"  {line}" for line in _shown(tokenizer, record, source.kind, where)), sep="\n")
    if failures:
        raise FailuresListed(f"{failures} records were refused, of {source.rows}; the report says why")


class Tokens:
    """The numbers of tokens of records, of the first `most` of them."""

    def __init__(self, tokenizer: Any, kind: str, most: int | None):
        self.tokenizer, self.kind, self.most = tokenizer, kind, most
        self.read, self.learnt, self.seen = array("I"), array("I"), 0

    def add(self, record: Record, where: str, tally: Tally) -> None:
        """Count those of one of Baton's records; one that the chat template refuses goes to `tally`."""
        if self.most is not None and self.seen >= self.most:
            return
        from baton.data.tokens import pieces_of

        self.seen += 1
        try:
            parts = pieces_of(self.tokenizer, record, self.kind, where).values()
        except InputError as error:
            tally.add(reason_of(error, where), where)
            return
        self.read.append(sum(len(ids) for part in parts for ids, _ in part))
        self.learnt.append(sum(len(ids) for part in parts for ids, learnt in part if learnt))


def report(source: Source, survey: Survey, tally: Tally, tokens: Tokens) -> Iterator[str]:
    """The report in lines. The order of `survey` is lost."""
    yield f"{source.rows:,} records, {refused(tally.counts):,} refused; {len(survey):,} {source.kind} in them"
    if tally.counts:
        yield "left out:"
        yield from in_lines(tally)
    table = {f"{name}, characters": numbers for name, numbers in survey.statistics().items()}
    if tokens.read:
        table |= {"tokens": statistics(tokens.read), "tokens learnt": statistics(tokens.learnt)}
    if table:
        yield f"{'':24}{'mean':>10}{'median':>10}{'95 %':>10}{'longest':>10}"
    for name, (mean, median, most, longest) in table.items():
        yield f"{name:24}{mean:10,.1f}{median:10,}{most:10,}{longest:10,}"
    if tokens.most is not None and tokens.seen == tokens.most:
        yield f"tokens: of the first {tokens.most:,}; --all counts all"
    same, prompts = survey.repeated()
    yield f"exact duplicates: {same:,}; repeated prompts: {prompts:,}; empty responses: {survey.empty:,}"


def _tokenizer(arguments: CheckArguments) -> Any:
    if arguments.tokenizer is None:
        return None
    from baton.models.templates import load_tokenizer
    from baton.sources import check_hub, check_model_path

    if not Path(arguments.tokenizer).is_dir():  # a folder needs no model beside the tokenizer
        check_model_path(arguments.tokenizer)
        check_hub(arguments.tokenizer, weights=False)
    return load_tokenizer(arguments.tokenizer, arguments.chat_template)


def _shown(tokenizer: Any, record: Record, kind: str, where: str) -> list[str]:
    from baton.data.tokens import pieces_of, shown, shown_with_tokens

    if tokenizer is None:
        return shown(record, kind)
    try:
        return shown_with_tokens(tokenizer, pieces_of(tokenizer, record, kind, where))
    except InputError as error:
        return [harmless(str(error))]
