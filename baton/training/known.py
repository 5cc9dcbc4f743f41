"""The settings that training programs know, read from the source of their classes: importing TRL takes ten seconds.

The classes are those of the installed packages and of the programs themselves, so nothing here has to follow a new version.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from baton.errors import InputError

ROOT = Path(__file__).parents[2]
# The programs, each with the TRL configuration that it builds on.
CONFIGS = {
    "dpo_iteration/run_dpo.py": "DPOConfig",
    "dpo_iteration/run_kto.py": "KTOConfig",
    "sft/run_sft.py": "SFTConfig",
    "reward_model/run_rm.py": "RewardConfig",
    "distillation/run_kd.py": "SFTConfig",
}


def config_fields(name: str) -> set[str]:
    """The fields of the TRL configuration of this name that can be set."""
    return set(_fields(_package("trl"), name))


def refuse_foreign(settings: dict[str, object], program: str, own_names: set[str]) -> None:
    """Raise InputError where a setting is not of `program`, but of other training programs, which are named.

    Args:
        own_names: those of the program itself, beside its TRL configuration's.
    """
    known = own_names | config_fields(CONFIGS[program])
    for name in settings:
        if name in known:
            continue
        owners = [other for other in CONFIGS if other != program and name in _known_to(other)]
        if owners:
            raise InputError(f"`{name}` is a setting of {' and '.join(owners)}, and {Path(program).name} does nothing with it")


def _known_to(program: str) -> set[str]:
    return set(_fields(ROOT / program, "Arguments")) | config_fields(CONFIGS[program])


@functools.cache
def _fields(file: Path, name: str) -> tuple[str, ...]:
    """The annotated fields of a class, its bases' included; the class stands in `file` or is imported there.

    Fields that the constructor does not take (`init=False`) are left out.
    """
    tree = _parsed(file)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            inherited = [field for base in bases for field in _fields(file, base)]
            return (*inherited, *_own_fields(node))
    source = _imported_from(file, name)
    return () if source is None else _fields(*source)


def _own_fields(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        arguments = statement.value.keywords if isinstance(statement.value, ast.Call) else []
        given = [word.value.value for word in arguments if word.arg == "init" and isinstance(word.value, ast.Constant)]
        if "ClassVar" not in ast.unparse(statement.annotation) and given != [False]:
            yield statement.target.id


def _imported_from(file: Path, name: str) -> tuple[Path, str] | None:
    """The file that a name comes from, and its name there; None for what is no class of a known package."""
    for node in ast.walk(_parsed(file)):
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if name == (alias.asname or alias.name):
                found = _module(file, node.module or "", node.level)
                return found and (found, alias.name)
    return None


def _module(file: Path, module: str, level: int) -> Path | None:
    """The file of a module that `file` imports."""
    package, *rest = module.split(".")
    if level:
        folder = file.parents[level - 1].joinpath(*module.split("."))
    elif package in ("trl", "transformers"):
        folder = _package(package).parent.joinpath(*rest)
    else:
        folder = ROOT.joinpath(package, *rest)
    return next((path for path in (folder.with_suffix(".py"), folder / "__init__.py") if path.is_file()), None)


def _package(name: str) -> Path:
    """The first file of an installed package, which is not imported for this."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise InputError(f"{name} is not installed here: run this program in the training environment (scripts/setup_envs.sh)")
    return Path(spec.origin)


@functools.cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())
