"""Where models and their chat templates come from: what can be refused before anything is loaded is refused here."""

import functools
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from baton import program
from baton.ahead import later, starts_here, will_be_adapter, will_be_made
from baton.errors import InputError, looked_in, without_ending
from baton.fingerprint import cached_folder
from baton.manifest import in_progress
from baton.steps import OUTPUT

log = logging.getLogger("baton")

HUB_SECONDS = 5  # how long to wait for the hub to say whether it gives a model


def check_model_path(model: str) -> None:
    """Raise InputError, before any heavy import, if `model` is a local path that holds no model.

    A name of the form `owner/name` that is no local path is taken for a model of the Hugging Face hub.
    """
    path = Path(model)
    if will_be_made(model):
        return
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
            raise InputError(f"{model}: no config.json in this folder, so it holds no model")
    elif path.exists():
        raise InputError(f"{model}: expected a model's folder, this is a file")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1 or path.parent.is_dir():
        raise InputError(f"{model}: no such folder, and not a Hugging Face name (`owner/name`){looked_in(path)}")


def check_hub(model: str, ahead: bool = False, weights: bool = True, kind: Literal["model", "dataset"] = "model") -> None:
    """Raise InputError, in seconds and without a download, for a model of the Hugging Face hub that cannot be had from here.

    The hub is asked only for what is neither a local path nor in its cache on this machine (of which `weights=False` needs the
    tokenizer alone). To be called where the model is about to be loaded, and before any heavy import. `ahead` of the work, a
    hub that cannot be asked is a warning: it may answer by then. Of a dataset it is one always, since copies of datasets are
    kept elsewhere. Of a model that is in the cache, see `leave_silent_hub`.
    """
    is_model = kind == "model"
    place, nor_cached = ("folder", " nor in the hub's cache") if is_model else ("file", "")
    if Path(model).exists() or will_be_made(model):
        return
    if is_model and _in_cache(model, weights):
        if not ahead:
            leave_silent_hub()
        return
    if not is_model:
        refuse_cut_name(model)
    ahead = ahead or not is_model
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    log_in = f"log in with `{Path(sys.prefix, 'bin/hf')} auth login`, or set HF_TOKEN"
    if constants.HF_HUB_OFFLINE:
        _cannot_ask(
            f"{model}: not in the hub's cache on this machine, and HF_HUB_OFFLINE is set (by you, or because the hub did not "
            "answer); give a local folder",
            ahead,
        )
        return
    try:
        # Of a gated model the hub shows everything but the files.
        url = hf_hub_url(model, "config.json" if is_model else "README.md", repo_type=kind)
        get_hf_file_metadata(url, timeout=HUB_SECONDS)
    except EntryNotFoundError:
        return  # an adapter, for one; what it lacks is said when it is loaded
    except GatedRepoError:
        raise InputError(
            f"{model}: the hub gives this {kind} only to those who were granted access: ask for it at "
            f"{constants.ENDPOINT}/{'' if is_model else 'datasets/'}{model}, then {log_in}"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{model}: neither a {place} here nor a {kind} that the hub shows to you: correct the name, or, if it is private, "
            f"{log_in}"
        ) from None
    except Exception as error:  # the kinds of failures of a network are too many to name
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
        if status in (401, 403):
            raise InputError(f"{model}: the hub refuses it (status {status}): {log_in}") from None
        reason = f"status {status}" if status else _first_line(error)
        _cannot_ask(
            f"{model}: {'neither' if is_model else 'not'} a {place} here{nor_cached}, and the hub at {constants.ENDPOINT} does "
            f"not answer ({reason}); check the network, or give a local {place}",
            ahead,
        )


def refuse_cut_name(dataset: str) -> None:
    """Raise InputError for what would be a name of the hub, and is a file's here but for its ending."""
    if near := without_ending(dataset):
        raise InputError(f"{dataset}: no such file; did you mean {near}?")


@functools.cache
def leave_silent_hub() -> None:
    """Have libraries and later processes take what the cache holds, without asking, where the hub gives no answer at all.

    They ask for a newer version of each file of a model or dataset, and would wait for each: minutes in a network that swallows
    what is sent. To be called before they are imported.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # the kinds of failures of a network are too many to name
        log.warning(
            "the hub at %s does not answer (%s): the copies on this machine are used as they are (HF_HUB_OFFLINE=1)",
            constants.ENDPOINT,
            _first_line(error),
        )
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"


def _cannot_ask(problem: str, ahead: bool) -> None:
    if not ahead:
        raise InputError(problem) from None
    log.warning("%s", problem)


def check_hub_ahead(model: str, output: Path, weights: bool = True, kind: Literal["model", "dataset"] = "model") -> None:
    """For `--check`: have `check_hub` made, once, for a model or dataset that the work on `output` would load.

    With HF_HUB_OFFLINE the plan of another machine can be made, where the models are; what starts here needs them here.
    """
    if will_be_made(output) and not will_be_made(model):
        from huggingface_hub.constants import HF_HUB_OFFLINE

        if starts_here() or not HF_HUB_OFFLINE:
            later(f"hub {kind} {model} {weights}", lambda: check_hub(model, not starts_here(), weights, kind))


def _in_cache(model: str, weights: bool) -> bool:
    """Whether the cache of the hub holds the model: all files of its weights, or, without `weights`, its tokenizer."""
    folder = cached_folder(model)
    names = {path.name for path in folder.iterdir()} if folder and folder.is_dir() else set()
    if not weights:
        return "tokenizer_config.json" in names
    for index in (name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))):
        return names.issuperset(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
    return any(name.endswith((".safetensors", ".bin")) for name in names)


def check_start(model: str) -> None:
    """`check_model_path` of a model that training starts from; raise InputError for an adapter without its model as well."""
    check_model_path(model)
    is_adapter = Path(model, "adapter_config.json").exists() and not Path(model, "config.json").exists()
    if will_be_adapter(model) or (is_adapter and not will_be_made(model)):
        raise InputError(f"{model}: holds an adapter without its model; train it with --merge_adapter to start from it")


@contextmanager
def loading(*models: str) -> Iterator[None]:
    """Context that loads models; raises InputError where one cannot be fetched or read. Errors of the system pass through."""
    program.started()  # all that is heavy to import is there, and long work may follow before the log says what runs
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{' or '.join(dict.fromkeys(models))}: cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def template_input(chat_template: str | Path | None) -> dict[str, str]:
    """The file of `--chat_template` as an input of a stage, or nothing. Raises InputError if there is no such file."""
    if not chat_template:
        return {}
    if not Path(chat_template).is_file():
        raise InputError(f"--chat_template {chat_template}: no such file{looked_in(chat_template)}")
    return {"chat_template": str(chat_template)}


def refuse_input(path: Path, inputs: dict[str, str | Path], flag: str, output: str | Path) -> None:
    """Raise InputError where `path`, a file that a stage writes beside its `output` and that `flag` names, cannot be there.

    It would replace an input, a folder or a device, or be deleted where the finished folder takes the place of what is at
    `output`.
    """
    if path.exists() and not path.is_file():  # a device such as /dev/null would be replaced too
        raise InputError(f"{flag} {path}: what is there is no file; give the path of one")
    folder, target = Path(output).resolve(), path.resolve()
    if not {folder, in_progress(folder)}.isdisjoint((target, *target.parents)):
        raise InputError(f"{flag} {path}: lies in the output {output}, which is replaced as a whole; give a path beside it")
    for name, source in inputs.items():
        if Path(source).resolve() == path.resolve():
            raise InputError(f"{path}: cannot replace the input `{name}`; give another {flag}")


def check_reward_model(
    path: str, heads: Sequence[str] | None = None, several: bool = False, config: Mapping[str, Any] | None = None
) -> list[float] | None:
    """Raise InputError, without any heavy import, if a model is no reward model, by its `config`, or its file.

    That is a sequence classifier with one output; a folder must be whole, with weights and a tokenizer. With `several` it may
    have more outputs, of which `heads` name what is read: returns their `weights_of_outputs`.
    """
    config = _config_of(path) if config is None else config
    if config is None:
        return None
    architectures, outputs = _classifier(config)
    if outputs == [OUTPUT]:
        raise InputError(f"{path}: a process reward model, which scores steps: name it process:{path}")
    if any("Causal" in name for name in architectures) or (len(outputs) != 1 and not (several and "id2label" in config)):
        raise InputError(
            f"{path}: not a Bradley-Terry reward model, which is a sequence classifier with one output; this is "
            f"{', '.join(architectures) or 'unnamed'} with {len(outputs)} labels"
        )
    _check_files(path)
    return weights_of_outputs(path, outputs, heads)


def check_process_model(path: str, config: Mapping[str, Any] | None = None) -> None:
    """Raise InputError, without any heavy import, if a model is no process reward model, by its `config`, or its file.

    It is a sequence classifier whose one output is called `steps.OUTPUT`.
    """
    config = _config_of(path) if config is None else config
    if config is None:
        return
    architectures, outputs = _classifier(config)
    if outputs != [OUTPUT]:
        raise InputError(
            f"{path}: not a process reward model, which is a sequence classifier whose output is called `{OUTPUT}`, as "
            f"reward_model/run_rm.py --loss_type process makes it; this is {', '.join(architectures) or 'unnamed'} with "
            f"{len(outputs)} labels"
        )
    _check_files(path)


def _check_files(folder: str) -> None:
    """Raise InputError where a model's folder has no weights or no tokenizer; what they are called depends on the model.

    A model of the hub has no folder yet.
    """
    if not Path(folder).is_dir():
        return
    names = [file.name for file in Path(folder).iterdir()]
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise InputError(f"{folder}: has a config.json, but no weights (*.safetensors, *.bin): is the folder copied whole?")
    if not any("token" in name or "vocab" in name or name.endswith((".model", ".tiktoken")) for name in names):
        raise InputError(
            f"{folder}: has no tokenizer (tokenizer.json, …): copy the files of that of the model which it was trained from"
        )


def weights_of_outputs(model: str, outputs: Sequence[str], heads: Sequence[str] | None) -> list[float] | None:
    """The weight of each of a reward model's named `outputs` in its reward; None where it has one only, which is the reward.

    `heads` are words NAME or NAME=WEIGHT. Raises InputError where there are several outputs and none of them is named, or one
    that the model does not have.
    """
    if len(outputs) == 1:
        return None
    known = ", ".join(outputs)
    if not heads:
        raise InputError(f"{model}: has {len(outputs)} outputs, {known}: say with --heads NAME[=WEIGHT] … which are the reward")
    weights = dict.fromkeys(outputs, 0.0)
    for word in heads:
        name, _, weight = word.partition("=")
        if name not in weights:
            raise InputError(f"--heads {word}: {model} has no output `{name}`, it has {known}")
        weights[name] = _finite(weight, f"--heads {word}") if weight else 1.0
    return list(weights.values())


def _finite(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: the weight must be a number, got {text!r}")
    return number


def _config_of(path: str) -> dict[str, Any] | None:
    """The configuration of a local model, or None where that is not known yet."""
    check_model_path(path)
    file = Path(path, "config.json")
    if not file.exists() or will_be_made(path):
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}; is the model's folder copied whole?") from None


def _classifier(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A configuration's architectures, and the names of its outputs, which are two where it does not say."""
    named = config.get("id2label") or {}
    count = config.get("num_labels") or len(named) or 2
    outputs = [str(named[number]) for number in sorted(named, key=int)] if len(named) == count else [*map(str, range(count))]
    return config.get("architectures") or [], outputs
