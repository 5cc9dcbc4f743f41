"""Which kinds of scorers there are, the words that name one, `[NAME=]KIND:TARGET`, and the files of a function."""

import ast
import difflib
import re
import symtable
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


def check_function(target: str) -> tuple[Path, str]:
    """`file.py:name` as (file, name). Raises InputError if there is no such file, or no such name in it; runs nothing of it."""
    file, _, name = target.rpartition(":")
    if not file or not name.isidentifier():
        raise InputError(f"--scorer function:{target}: expected function:FILE.py:NAME, with NAME a function in the file")
    try:
        text = Path(file).read_text(encoding="utf-8")
        compile(text, file, "exec")
        table = symtable.symtable(text, file, "exec")
    except OSError as error:
        raise InputError(f"--scorer function:{target}: {file}: {error.strerror}") from None
    except SyntaxError as error:
        raise InputError(f"--scorer function:{target}: {file}:{error.lineno}: {error.msg}") from None
    except ValueError as error:  # not UTF-8, or a zero byte
        raise InputError(f"--scorer function:{target}: {file}: not Python: {error}") from None
    # A name may also be assigned (`rule = partial(…)`) or imported.
    given = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    imports_all = any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in ast.walk(ast.parse(text)))
    if name not in given and not imports_all:
        functions = [child.get_name() for child in table.get_children() if child.get_type() == "function"]
        raise InputError(
            f"--scorer function:{target}: {file} defines no function {name}, only: {', '.join(functions) or 'none'}"
        )
    return Path(file), name


def imported_beside(file: Path) -> list[Path]:
    """The Python files in the folder of `file` that it imports, and those that they import; sorted, without `file` itself."""
    found: set[Path] = set()
    unread = [file]
    while unread:
        tree = ast.parse(unread.pop().read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        paths = {file.with_name(f"{name.partition('.')[0]}.py") for name in names}
        new = {path for path in paths if path.is_file()} - found - {file}
        found |= new
        unread += new
    return sorted(found)
