"""Where wandb and TensorBoard write, and what wandb needs: looked for before anything is sampled or loaded."""

import configparser
import importlib.util
import netrc
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from baton import program
from baton.errors import InputError
from baton.sources import check_hub

WANDB_HOST = "https://api.wandb.ai"
FOLDERS = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "wandb": "WANDB_DIR"}  # the variable that says where each writes


def requested(settings: dict[str, Any]) -> set[str]:
    """Those of FOLDERS that `report_to` names; `all` stands for what is installed."""
    named = settings.get("report_to")
    names = set(map(str, named if isinstance(named, list) else [named]))
    if "all" in names:
        return {name for name in FOLDERS if importlib.util.find_spec(name)}
    return names & FOLDERS.keys()


def check_reports(settings: dict[str, Any]) -> None:
    """Raise InputError where a report is requested that could not be written: it would end the training as it begins."""
    for name in sorted(requested(settings)):
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"`report_to: {name}` needs {name} in the training environment: {sys.executable} -m pip install {name}"
            )
    if "wandb" in requested(settings) and program.rank() == 0 and not wandb_can_start():
        raise InputError(
            f"`report_to: wandb`, but nobody is logged in: {Path(sys.prefix, 'bin/wandb')} login, or WANDB_API_KEY=…; or "
            "WANDB_MODE=offline keeps the reports on this machine"
        )


def check_outside(settings: dict[str, Any], models: Iterable[str], ahead: bool) -> None:
    """Raise InputError for a report that could not be written, and for a model of the hub that could not be fetched.

    Nothing heavy is imported for this. Args: `ahead`: as for `check_hub`.
    """
    check_reports(settings)
    for model in dict.fromkeys(models):
        check_hub(model, ahead)


def wandb_can_start() -> bool:
    """Whether wandb finds a key, or needs none: in the environment, in .netrc, or in its own settings."""
    settings = _wandb_settings()
    mode = os.environ.get("WANDB_MODE") or settings.get("mode", "online")
    if mode.lower() in ("offline", "dryrun", "disabled") or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key"):
        return True
    host = os.environ.get("WANDB_BASE_URL") or settings.get("base_url", WANDB_HOST)
    home = [path for path in (Path.home() / ".netrc", Path.home() / "_netrc") if path.exists()]
    files = [Path(os.environ["NETRC"]).expanduser()] if os.environ.get("NETRC") else home[:1]
    try:
        return any(netrc.netrc(file).authenticators(urlsplit(host).netloc) for file in files)
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_settings() -> dict[str, str]:
    """What wandb's files of settings say, those of the working folder last."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", Path.home() / ".config/wandb"))
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([folder / "settings", Path("wandb/settings")])
    except configparser.Error:
        return {}
    return dict(parser.defaults()) | (dict(parser["default"]) if parser.has_section("default") else {})


def place_reports(settings: dict[str, Any], metrics_path: Path) -> None:
    """Have reports written to the folder `reports` beside the file of metrics, unless their own variables name another.

    To be called before a trainer is made, which reads the variables.
    """
    folder = metrics_path.absolute().parent / "reports"
    for name in sorted(requested(settings)):
        if FOLDERS[name] not in os.environ:
            if program.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
            os.environ[FOLDERS[name]] = str(folder)
