"""Rows made by several worker processes are those of one; nothing waits for them with a timeout, nothing outlives them."""

import copy
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest
from transformers import TrainingArguments

from baton.drops import Drops
from baton.errors import InputError
from baton.models.templates import load_tokenizer, prompt_token_ids
from baton.training import tokenising
from baton.training.rows import rows_on_disk
from dpo_iteration.rows import rows_of_pairs
from tests.programs import ROOT, read_jsonl
from tests.training.killed_worker import killed

CHUNK, FEW = 7, 10


@pytest.fixture(scope="module")
def tokenizer(task):
    return load_tokenizer(str(task / "base"))


@pytest.fixture
def cores(monkeypatch):
    """A function that gives this process so many cores; few records are many for its workers."""
    monkeypatch.setattr(tokenising, "CHUNK", CHUNK)
    monkeypatch.setattr(tokenising, "FEW", FEW)
    return lambda count: monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))


def pairs_of(task, count):
    """("where", pair) of the task's preferences; some have long prompts, equal responses, or a stranger's token ids."""
    for number, record in enumerate(read_jsonl(task / "data/rm_train.jsonl")[:count]):
        pair = {"id": str(number), **record}
        if number % 10 == 3:
            pair["prompt"] = [{"role": "user", "content": "It opens at sea. " * 40}]
        if number % 10 == 5:
            pair["rejected"] = pair["chosen"]
        if number % 10 == 7:
            pair["chosen_token_ids"] = [10**6]
        yield f"pairs.jsonl:{number + 1}", pair


def test_rows_drops_and_counts_are_those_of_one_process_in_its_order(task, tokenizer, cores, caplog):
    make, made = partial(rows_of_pairs, tokenizer, 100, 70), []
    for workers in (1, 2, 3):
        cores(workers)
        caplog.clear()
        drops, counted = Drops(), Counter()
        rows = list(tokenising.tokenised(make, pairs_of(task, 95), drops, counted))
        said = [record.getMessage() for record in caplog.records if "tokenising in" not in record.getMessage()]
        made.append((rows, drops.counts, drops.names, dict(counted), sorted(said)))
    assert len(made[0][0]) > 60 and len(made[0][1]) == 2 and sum("not this tokenizer's" in line for line in made[0][4]) == 1
    assert made[1] == made[2] == made[0]


def test_the_first_bad_record_is_named_whoever_finds_it(task, tokenizer, cores):
    cores(2)
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('too dry') if messages[0].content == 'sand' }}" + tokenizer.chat_template

    def records(refused):
        for where, pair in pairs_of(task, 47):
            yield where, {**pair, "prompt": [{"role": "user", "content": "sand"}]} if where in refused else pair
        raise InputError("pairs.jsonl:48: not JSON")  # the reader finds this

    make = partial(rows_of_pairs, refusing, 100, 70)
    for refused, message in [
        (("pairs.jsonl:30", "pairs.jsonl:45"), "pairs.jsonl:30: the chat template cannot take this conversation: too dry"),
        (("pairs.jsonl:45",), "pairs.jsonl:45: the chat template cannot take this conversation: too dry"),
        ((), "pairs.jsonl:48: not JSON"),
    ]:
        with pytest.raises(InputError, match=message):
            list(tokenising.tokenised(make, records(refused), Drops(), Counter()))


def test_no_more_than_a_few_chunks_are_in_memory(task, tokenizer, cores):
    cores(2)
    read = 0

    def records():
        nonlocal read
        for where, pair in pairs_of(task, 200):
            read += 1
            yield where, {**pair, "rejected": "It sank."}

    rows = tokenising.tokenised(partial(rows_of_pairs, tokenizer, 999, 999), records(), Drops(), Counter())
    for written, _ in enumerate(rows):
        assert read - written <= FEW + (2 * 2 + 2) * CHUNK


WORKERS_AT_WORK = """
import itertools, sys
from collections import Counter
from functools import partial
from baton.drops import Drops
from baton.models.templates import load_tokenizer, prompt_token_ids
from baton.training import tokenising
from baton.training.rows import rows_on_disk
from dpo_iteration.rows import rows_of_pairs

if __name__ == "__main__":
    tokenising.FEW, tokenising.os.sched_getaffinity = 10, lambda _: {0, 1}
    pair = {"id": "a", "prompt": [{"role": "user", "content": "Why?"}], "chosen": "So.", "rejected": "No."}
    make = partial(rows_of_pairs, load_tokenizer(sys.argv[1]), 99, 99)
    for _ in tokenising.tokenised(make, itertools.repeat(("here", pair)), Drops(), Counter()):
        print("at work", flush=True)
        sys.stdin.read()
"""


def test_kill_9_of_the_program_ends_its_workers(task, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(WORKERS_AT_WORK)
    words = [sys.executable, path, task / "base"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "at work\n"
        children = psutil.Process(program.pid).children()
        program.kill()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=30)
    for child in alive:
        child.kill()
    assert not alive


def test_an_interrupt_from_a_terminal_does_not_reach_workers_that_start(task, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(WORKERS_AT_WORK)
    words, environment = [sys.executable, path, task / "base"], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        while len(children := psutil.Process(program.pid).children()) < 3:  # two workers, and what counts their semaphores
            time.sleep(0.01)
        for child in children:
            child.send_signal(signal.SIGINT)
        assert program.stdout.readline() == "at work\n"
        program.kill()


@pytest.mark.parametrize("what", [ValueError("a bug"), KeyboardInterrupt()])
def test_what_ends_the_first_rows_is_raised_as_it_is(tmp_path, what):
    def rows():
        raise what
        yield

    config = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(type(what)) as raised:
        rows_on_disk(rows, config, "rows")
    assert raised.value is what


def test_processes_wait_for_rows_and_for_a_conversion_longer_than_a_collective_would(tmp_path):
    script = Path(__file__).with_name("rows_processes.py")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == ["3 rows"] * 2 + ["converted: True"] * 2


def test_a_worker_that_is_killed_is_one_message(task, cores):
    cores(2)
    with pytest.raises(InputError, match="one of 2 tokenising processes was killed, mostly for lack of memory"):
        list(tokenising.tokenised(killed, pairs_of(task, 30), Drops(), Counter()))


def test_a_text_longer_than_the_tokenizer_says_is_no_warning(tokenizer, caplog):
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 4
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(caplog.handler)
    try:
        prompt_token_ids(short, [{"role": "user", "content": "It opens at sea."}], "here")
        assert not caplog.messages
        short("It opens at sea, and it ends there.")
        assert caplog.messages
    finally:
        logger.removeHandler(caplog.handler)
