"""Scores of a pairwise preference model: a causal LM that says whether response A or response B is better.

The question's form is that of RLHFlow/pair-preference-model-LLaMA3-8B (Dong et al., RLHF Workflow, arXiv 2405.07863).
"""

from collections.abc import Iterable, Iterator
from itertools import permutations

import torch

from annotate_data.loaded import limits
from annotate_data.work import Score, Task
from baton.errors import InputError
from baton.models import loading
from baton.models.batching import batches, windows
from baton.models.scoring import next_token_shares
from baton.models.templates import load_tokenizer, prompt_token_ids
from baton.records import Messages

RECORDS_AT_ONCE = 64  # each is K * (K - 1) questions
TOO_LONG = "longer than max_length tokens as a question about two responses"


class PairPreference:
    """A preference model on one device. Call it with tasks: it yields the score of every response of each.

    Every two responses are compared both ways round; a response's score is the mean probability with which it wins,
    from 0 to 1.
    """

    def __init__(self, path: str, device: torch.device, settings: loading.Settings):
        from transformers import AutoModelForCausalLM

        self.tokenizer = load_tokenizer(path, settings.chat_template)
        letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "AB"]
        if any(len(ids) != 1 for ids in letters):
            raise InputError(f"{path}: its tokenizer has no single tokens for A and B, so it cannot answer with one of them")
        self.model = loading.place(loading.load(AutoModelForCausalLM, path, settings.dtype), device, settings.dtype)
        self.letters = [ids[0] for ids in letters]
        self.limits = limits(self.model, device, settings)

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for window in windows(tasks, RECORDS_AT_ONCE):
            questions = [(task, a, b) for task in window for a, b in permutations(range(len(task.responses)), 2)]
            sequences = [self.question(*question) for question in questions]
            wins = {task.position: [0.0] * len(task.responses) for task in window}
            most = self.limits.conversation
            too_long = {q[0].position for q, ids in zip(questions, sequences, strict=True) if len(ids) > most}
            fitting = [i for i, (task, _, _) in enumerate(questions) if task.position not in too_long]
            lengths = [len(sequences[i]) for i in fitting]
            for batch in batches(lengths, self.limits.batch, self.limits.least_filled):
                chosen = [fitting[i] for i in batch]
                for i, probability in zip(chosen, self.first_wins([sequences[i] for i in chosen]), strict=True):
                    task, a, b = questions[i]
                    wins[task.position][a] += probability
                    wins[task.position][b] += 1 - probability
            for task in window:
                contests = 2 * (len(task.responses) - 1)
                for index in task.missing:
                    failed = task.position in too_long
                    value = None if failed else wins[task.position][index] / contests
                    yield Score(task, index, value, TOO_LONG if failed else None)

    def question(self, task: Task, a: int, b: int) -> list[int]:
        """The token ids that ask whether response `a`, as A, or `b`, as B, is better."""
        text = f"[CONTEXT] {context(task.prompt)} [RESPONSE A] {task.responses[a]} [RESPONSE B] {task.responses[b]} \n"
        ids = prompt_token_ids(self.tokenizer, [{"role": "user", "content": text}], task.where)
        return ids[1:] if ids[0] == self.tokenizer.bos_token_id else ids  # the published model saw no BOS

    def first_wins(self, sequences: list[list[int]]) -> list[float]:
        """The probability of the answer A, of A and B, to each question."""
        return [first for first, _ in next_token_shares(self.model, sequences, self.letters)]


def context(messages: Messages) -> str:
    """A conversation in the plain form that the published model was trained on; turns alternate, whatever their role."""
    turns = (f"\n\n<turn> {('user', 'assistant')[i % 2]}\n {m['content']}" for i, m in enumerate(messages))
    return "\n" + "".join(turns) + "\n\n\n"
