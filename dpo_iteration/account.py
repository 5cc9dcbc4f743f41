"""What became of the records of a run, for its log and its manifest."""

from collections import Counter
from dataclasses import dataclass, field

from baton.drops import Drops

IN = "in"


@dataclass
class Account:
    """How many records went in, which were dropped, and what else was counted of them.

    `counted["in"]` is the number of rows that the records could give, trained on and dropped together; every other key says
    in words what it counts. A function that returns an account has read its records to the end, so the account is final. It
    is that of process 0, which alone reads them; the other processes have an empty one.
    """

    drops: Drops = field(default_factory=Drops)
    counted: Counter[str] = field(default_factory=Counter)

    @property
    def facts(self) -> dict[str, int]:
        """What was counted of the records beside their number, for the manifest."""
        return {name: count for name, count in self.counted.items() if name != IN}


def in_words(counted: Counter[str]) -> str:
    """The counts as a text, without those that are 0 and the number of records that went in."""
    return ", ".join(f"{count} {name}" for name, count in counted.items() if count and name != IN)
