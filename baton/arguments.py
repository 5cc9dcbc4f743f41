"""Promise 1: `program.py [config.yaml] [--flag value …]`, checked in full before anything heavy is loaded.

A stage states its arguments as a pydantic model whose fields are made with `option`. Flags override the file;
a key that nobody knows, or a value of the wrong type or range, is an InputError that names it.
"""

import argparse
import dataclasses
import difflib
import glob
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from baton.errors import InputError, looked_in
from baton.secrets import is_secret


def option(default: Any, help: str, *, changes_result: bool = True, **constraints: Any) -> Any:
    """A field of a stage's arguments; `...` as default makes it required.

    `changes_result=False` marks what says only how a task is executed: paths (inputs are compared by their content), shards,
    memory, log settings. `constraints` are pydantic's (`ge`, `gt`, `le`, `lt`, `min_length`).
    """
    return Field(default, description=help, json_schema_extra={"changes_result": changes_result}, **constraints)


class StageArguments(BaseModel):
    """The arguments that every stage has."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    overwrite: bool = option(False, "start afresh where an output already exists", changes_result=False)
    check: bool = option(False, "check arguments and inputs, say what would be done, and do nothing", changes_result=False)


A = typing.TypeVar("A", bound=StageArguments)
Accept = Callable[[dict[str, Any]], dict[str, Any]]


def parse(model: type[A], description: str, argv: Sequence[str] | None = None, accept: Accept = dict) -> A:
    """Read `model` from a YAML file and flags. Raises InputError on anything unknown, mistyped or missing.

    `accept` gets the file's settings, and then the flags', and returns them by the names of this program.
    """

    def accept_known(settings: dict[str, Any]) -> dict[str, Any]:
        accepted = accept(settings)
        check_known(accepted, model.model_fields)
        return accepted

    settings, places = _read_settings(model, description, None, argv, accept_known)
    return _validate(model, settings, places)


def parse_with_rest(
    model: type[A],
    description: str,
    config_class: Callable[[], type],
    argv: Sequence[str] | None = None,
    accept: Accept = dict,
) -> tuple[A, dict[str, Any]]:
    """Read `model`, and return beside it the settings that it does not know, their values unchecked: see `build_config`.

    `config_class` gives the dataclass that such settings belong to (a trainer's configuration); it is called for
    `--help` alone, so that a library is not imported just to parse. `accept` gets the file's settings, and then the flags', and
    returns them by the names of this program; it raises InputError for those that it does not know.
    """
    settings, places = _read_settings(model, description, config_class, argv, accept)
    rest = {name: settings.pop(name) for name in list(settings) if name not in model.model_fields}
    return _validate(model, settings, places), rest


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings. Raises InputError if it is absent, not YAML, or not a mapping."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(path.parent.parent.glob(f"*/{glob.escape(path.name)}")) if path.name else []
        hint = f"; did you mean {near[0]}?" if near else looked_in(path)
        raise InputError(f"{path}: no such file (the first argument without a flag is the YAML file){hint}") from None
    except IsADirectoryError:
        problem = "a folder, and the first argument without a flag is the YAML file: give the folder after its flag"
        raise InputError(f"{path}: {problem}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2026-99-99 is no date
        raise InputError(f"{path}{_where(error)}") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise InputError(f"{path}: expected a mapping of settings by name, got {type(settings).__name__}")
    return settings


def check_known(names: typing.Iterable[str], known: typing.Iterable[str]) -> None:
    """Raise InputError for the first of `names` that is not in `known`, with the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "--help lists all"
            raise InputError(f"unknown setting `{name}`: {hint}")


def build_config(config_class: type, settings: dict[str, Any], own_names: typing.Iterable[str] = ()) -> Any:
    """A trainer's configuration dataclass from YAML values and flag strings, converted to the fields' types.

    `own_names` are the stage's own settings, named as nearest matches too. Raises InputError on an unknown
    name, a value that does not convert, or a combination that the dataclass itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    check_known(settings, [*fields, *own_names])
    hints = typing.get_type_hints(config_class)
    values = {name: _converted(name, value, hints[name]) for name, value in settings.items()}
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{config_class.__name__}: {error}") from None


def _read_settings(
    model: type[A],
    description: str,
    config_class: Callable[[], type] | None,
    argv: Sequence[str] | None,
    accept: Accept = dict,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Every setting of the YAML file and the flags, by name, flags first, not converted yet; and where messages place those
    of the file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    file = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    settings = read_yaml(file) if file else {}
    parser = argparse.ArgumentParser(
        usage="%(prog)s [config.yaml] [--flag value ...]",
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, field in model.model_fields.items():
        ending = "required" if field.is_required() else f"default: {field.get_default()}"
        _add_flag(parser, name, field.annotation, f"{field.description} [{ending}]")
    if config_class and {"-h", "--help"} & set(argv):
        group = parser.add_argument_group("settings of the trainer underneath")
        for field in dataclasses.fields(config_class()):
            if field.init and field.name not in model.model_fields:
                default = "" if field.default is dataclasses.MISSING else f" [default: {field.default}]"
                _add_flag(group, field.name, str, f"{field.metadata.get('help', '')}{default}")
    try:
        flags, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    try:
        of_file = accept(settings)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    of_flags = accept(vars(flags) | _loose_flags(unknown))
    return of_file | of_flags, dict.fromkeys(of_file.keys() - of_flags.keys(), f"{file}: ")


def _where(error: Exception) -> str:
    """Line, column and problem of a YAML error, without the text there, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or "a character or a value that is not allowed"
    problem = re.sub(r"(tag|handle|alias|anchor) ['\"].*", r"\1", problem, flags=re.DOTALL)  # their names are text of the file
    return f"{place}: not YAML: {problem}"


def _validate(model: type[A], settings: dict[str, Any], places: dict[str, str]) -> A:
    try:
        return model(**settings)
    except ValidationError as error:
        raise InputError("\n".join(places.get(_name(problem), "") + _explain(problem) for problem in error.errors())) from None


def _converted(name: str, value: Any, annotation: Any) -> Any:
    """One setting as a value of its field's type; where a list is wanted, a single value is a list of one."""
    if not isinstance(value, list) and {typing.get_origin(k) for k in _union_members(annotation)} == {list}:
        value = [value]
    adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise InputError(_explain(error.errors()[0] | {"loc": (name,)})) from None


def _add_flag(parser: Any, name: str, annotation: Any, help: str) -> None:
    """One `--name`, whose value stays a string (or a list of them) for pydantic to convert."""
    members = _union_members(annotation)
    kinds = {typing.get_origin(kind) or kind for kind in members}
    choices = [str(choice) for kind in members if typing.get_origin(kind) is typing.Literal for choice in typing.get_args(kind)]
    options: dict[str, Any] = {
        "metavar": "{" + ",".join(choices) + "}" if choices else "X",
        "help": help.replace("%", "%%"),
    }
    if kinds & {list, tuple}:
        options["nargs"] = "+"
    elif bool in kinds:
        options |= {"nargs": "?", "const": True}
    parser.add_argument(f"--{name}", **options)


def _union_members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _loose_flags(words: Sequence[str]) -> dict[str, Any]:
    """Flags that no field claims: `--a 1 --c x y --d` as {"a": "1", "c": ["x", "y"], "d": True}."""
    settings: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            settings[name] = [value] if value else []
        elif name is None:
            raise InputError(f"unexpected argument `{word}`: every value needs a flag, and the YAML file comes first")
        else:
            settings[name].append(word)
    return {name: True if not values else values[0] if len(values) == 1 else values for name, values in settings.items()}


def _name(problem: Any) -> str:
    """The setting that pydantic's problem is with; the empty text for one with several."""
    return "".join(str(part) for part in problem["loc"][:1])


def _explain(problem: Any) -> str:
    name = _name(problem)
    if problem["type"] == "missing":
        return f"`{name}` is required: give --{name} or set it in the YAML file"
    got = "a secret that is not shown" if is_secret(name) else repr(problem["input"])
    return f"`{name}`: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {got}"
