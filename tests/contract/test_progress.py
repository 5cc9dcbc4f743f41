"""Progress: the time left is said once it can be known."""

import logging
import re
import sys

from baton import progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def lines(monkeypatch, caplog, finished, total, already=0):
    """The lines of a progress whose items are finished at these seconds, ascending: the second, and what is said to be left."""
    clock, said = Clock(), []
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO, logger="baton")
    bar = progress.Progress(total, "prompts", already)
    for second in finished:
        clock.now = 100.0 + second
        bar.update()
        if caplog.messages:
            said.append((second, re.search(r"(\S+) left", caplog.messages[-1])[1]))
            caplog.clear()
    return said


def test_prompts_that_are_sampled_all_at_once_do_not_say_that_the_rest_takes_many_minutes(monkeypatch, caplog):
    finished = [20, 25, 30.5, 31, *(40 + 25 * i / 91 for i in range(92))]
    (_, first), (_, second) = lines(monkeypatch, caplog, finished, 96)
    assert (first, second) == ("?", "00:12")


def test_items_one_after_another_have_an_estimate_at_the_first_line(monkeypatch, caplog):
    said = lines(monkeypatch, caplog, range(1, 91), 300, already=100)
    assert said == [(30, "02:50"), (60, "02:20"), (90, "01:50")]


def test_long_work_has_an_estimate_long_before_its_half(monkeypatch, caplog):
    finished = [20 + 2 * i for i in range(100)]
    said = lines(monkeypatch, caplog, finished, 10_000)
    assert [left == "?" for second, left in said] == [second < 80 for second, _ in said]
    assert said[-1][1] != "?"


def test_what_takes_longer_than_a_second_has_its_seconds_said_instead_of_a_rate_of_nothing(monkeypatch, caplog):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO, logger="baton")
    bar = progress.Progress(10, "steps")
    clock.now += 45
    bar.update()
    assert caplog.messages[-1].startswith("1 of 10 steps, 45.0 s each")
