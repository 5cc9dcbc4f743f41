"""Promise 4: records that a stage leaves out, counted by reason, the first ones by name."""

import logging
from collections import Counter

from baton.program import harmless

log = logging.getLogger("baton")

NAMED_DROPS = 20  # how many drops of each reason are named in the log; the manifest names NAMED_DROPS_KEPT
NAMED_DROPS_KEPT = 1000


class Drops:
    """Records that a stage leaves out, counted by reason, the first ones by name."""

    def __init__(self, quiet: bool = False) -> None:
        """`quiet`: the log names none of them."""
        self.quiet = quiet
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one record, named by its id or file:line, as dropped for `reason`."""
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMED_DROPS_KEPT:
            names.append(name)
        if self.quiet:
            return
        if self.counts[reason] <= NAMED_DROPS:
            log.warning("dropped %s: %s", harmless(str(name)), reason)
        elif self.counts[reason] == NAMED_DROPS + 1:
            log.warning("more dropped: %s; the manifest names up to %d of them", reason, NAMED_DROPS_KEPT)

    def named(self) -> str:
        """Which of the drops `names` has: «them», or how many of each reason."""
        return "them" if max(self.counts.values(), default=0) <= NAMED_DROPS_KEPT else f"{NAMED_DROPS_KEPT} of each reason"

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.items()) or "none"
