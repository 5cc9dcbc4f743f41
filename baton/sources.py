"""Where models and their chat templates come from: what can be refused before anything is loaded is refused here."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from baton.ahead import will_be_made
from baton.errors import InputError

log = logging.getLogger("baton")


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
        raise InputError(f"{model}: no such folder, and not a Hugging Face name (`owner/name`)")


def check_start(model: str) -> None:
    """`check_model_path` of a model that training starts from; raise InputError for an adapter without its model as well."""
    check_model_path(model)
    if Path(model, "adapter_config.json").exists() and not Path(model, "config.json").exists() and not will_be_made(model):
        raise InputError(f"{model}: holds an adapter without its model; train it with --merge_adapter to start from it")


def check_hub(model: str, ahead: bool = False) -> None:
    """Raise InputError for a model of the Hugging Face hub that is not on this machine and cannot be fetched: one request.

    `ahead` of the work, a hub that does not answer is a warning: it may answer by then.
    """
    if Path(model).exists() or will_be_made(model):
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if any(isinstance(try_to_load_from_cache(model, name), str) for name in ("config.json", "adapter_config.json")):
        return
    login = Path(sys.prefix, "bin/hf")
    try:
        HfApi().auth_check(model)
    except GatedRepoError:
        raise InputError(
            f"{model}: a gated model: ask for access on its page, https://huggingface.co/{model}, and then log in: {login} "
            "auth login, or HF_TOKEN=…"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{model}: not on the Hugging Face hub, or private; if it is private, log in: {login} auth login, or HF_TOKEN=…; a "
            "folder of this machine needs its path"
        ) from None
    except Exception as error:  # of the HTTP library, which depends on the version of huggingface_hub
        problem = f"{model}: not on this machine, and the Hugging Face hub does not answer ({_first_line(error)})"
        if not ahead:
            raise InputError(f"{problem}; where there is no network, give the path of a folder that holds the model") from None
        log.warning("%s", problem)


@contextmanager
def loading(*models: str) -> Iterator[None]:
    """Context that loads models; raises InputError where one cannot be fetched or read. Errors of the system pass through."""
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
        raise InputError(f"--chat_template {chat_template}: no such file")
    return {"chat_template": str(chat_template)}


def refuse_input(path: Path, inputs: dict[str, str | Path], flag: str) -> None:
    """Raise InputError where `path`, a file that a stage writes beside its output and `flag` names, is one of its inputs."""
    for name, source in inputs.items():
        if Path(source).resolve() == path.resolve():
            raise InputError(f"{path}: cannot replace the input `{name}`; give another {flag}")


def check_reward_model(path: str) -> None:
    """Raise InputError, without any heavy import, if a local model has not the one output of a reward model."""
    check_model_path(path)
    file = Path(path, "config.json")
    if file.exists() and not will_be_made(path):
        config = json.loads(file.read_text(encoding="utf-8"))
        names = config.get("architectures") or []
        labels = config.get("num_labels") or len(config.get("id2label") or "12")
        if any("Causal" in name for name in names) or labels != 1:
            raise InputError(
                f"{path}: not a Bradley-Terry reward model, which is a sequence classifier with one output; this is "
                f"{', '.join(names) or 'unnamed'} with {labels} labels"
            )
