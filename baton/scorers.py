"""Which kinds of scorers there are, and the words that name one: `[NAME=]KIND:TARGET`."""

import difflib
import re
from pathlib import Path
from typing import NamedTuple

from baton.errors import InputError

DEFAULT_RUBRIC = Path(__file__).resolve().parents[1] / "annotate_data/rubric.txt"  # a judge's, where no other is named
KINDS_ON_GPU = ("bt", "vllm", "pair", "process", "custom")
KINDS = (*KINDS_ON_GPU, "function", "http", "judge")


class Wanted(NamedTuple):
    """A scorer as requested."""

    name: str  # its key in `rewards_by`
    kind: str
    target: str


def identity(scorer: Wanted) -> str:
    """What of a scorer is compared beside the content of its model or file: its name, its kind, and of a file the function."""
    return f"{scorer.name}={scorer.kind}" + (f":{scorer.target.rpartition(':')[2]}" if scorer.kind == "function" else "")


def wanted_scorers(words: list[str]) -> list[Wanted]:
    """`[NAME=]KIND:TARGET` words; the name is the kind unless given. Raises InputError for another form or equal names."""
    wanted: list[Wanted] = []
    for word in words:
        match = re.fullmatch(r"(?:(\w+)=)?(\w+):(.+)", word)
        kind = match[2] if match else ""
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            unknown = f"no kind `{kind}`{f', did you mean `{near[0]}`?' if near else ''}; " if kind else ""
            raise InputError(
                f"--scorer {word}: {unknown}expected [NAME=]KIND:TARGET, with KIND one of {', '.join(KINDS)}; for example "
                f"bt:MODEL, brief=function:rules.py:brevity, http:http://127.0.0.1:5000/get_reward"
            )
        name, _, target = match.groups()
        if (name or kind) in [scorer.name for scorer in wanted]:
            raise InputError(f"--scorer {word}: another one is called {name or kind} already; name it: NAME={word}")
        wanted.append(Wanted(name or kind, kind, target))
    return wanted
