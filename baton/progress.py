"""Promise 5: a progress bar on a terminal, elsewhere a line every 30 seconds: done, rate, time left.

The time left is estimated from the items that are finished. Where many are worked on at once, as vLLM does, the first ones are
finished late and then many at a time: what they say of the rest is wrong by far, so nothing is said at first (`is_known`).
"""

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger("baton")

SECONDS_BETWEEN_LINES = 30
SETTLED = 4  # times what the first item took: by then items begin and end at all times
UNKNOWN_LEFT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<?, {rate_fmt}{postfix}]"  # tqdm's format, without the time left


class Progress:
    """Counts finished items out of `total`, None where it is not known; `note` adds a short text such as tokens a second."""

    def __init__(self, total: int | None, unit: str, done: int = 0):
        self.total, self.unit, self.done, self.already = total, unit, done, done
        self.start = self.last_line = time.monotonic()
        self.first: float | None = None  # seconds until the first item was finished
        self.bar = tqdm(total=total, initial=done, unit=unit, file=sys.stderr) if sys.stderr.isatty() else None

    def update(self, count: int = 1, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if self.first is None:
            self.first = now - self.start
        if self.bar is not None:
            self.bar.bar_format = None if self.is_known(now) else UNKNOWN_LEFT
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = (self.done - self.already) / (now - self.start)
            left = tqdm.format_interval((self.total - self.done) / rate) if self.is_known(now) else "?"
            log.info(
                "%d of %s %s, %s, %s left %s",
                self.done,
                "?" if self.total is None else self.total,
                self.unit,
                f"{1 / rate:.1f} s each" if 0 < rate < 1 else f"{rate:.1f} {self.unit}/s",
                left,
                note,
            )

    def is_known(self, now: float) -> bool:
        """Whether what is finished says when the rest will be: it is half of it, or took several times as long as the first."""
        if self.total is None or self.first is None:
            return False
        half = self.done - self.already >= (self.total - self.already) / 2
        return half or now - self.start >= SETTLED * self.first

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
