"""Promise 5: a progress bar on a terminal, elsewhere a line every 30 seconds: done, rate, time left."""

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger("baton")

SECONDS_BETWEEN_LINES = 30


class Progress:
    """Counts finished items out of `total`, None where it is not known; `note` adds a short text such as tokens a second."""

    def __init__(self, total: int | None, unit: str, done: int = 0):
        self.total, self.unit, self.done, self.already = total, unit, done, done
        self.start = self.last_line = time.monotonic()
        self.bar = tqdm(total=total, initial=done, unit=unit, file=sys.stderr) if sys.stderr.isatty() else None

    def update(self, count: int = 1, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = (self.done - self.already) / (now - self.start)
            left = tqdm.format_interval((self.total - self.done) / rate) if rate and self.total is not None else "?"
            log.info(
                "%d of %s %s, %.1f %s/s, %s left %s",
                self.done,
                "?" if self.total is None else self.total,
                self.unit,
                rate,
                self.unit,
                left,
                note,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
