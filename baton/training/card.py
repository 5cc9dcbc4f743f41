"""The README.md of a finished model: what its manifest says, and no more."""

from pathlib import Path
from typing import Any

import yaml

from baton.errors import InputError
from baton.manifest import read_manifest
from baton.program import harmless
from baton.training.progress import SHOWN

CARD = "README.md"
FIGURES = SHOWN[:10]  # without those of the optimizer and of the speed
NOTHING = (None, False, 0, -1)  # arguments that say: no such thing


def write_card(folder: Path, manifest: dict[str, Any], counts: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Write the card of the model in `folder`; to be called by process 0, when what else writes one has done so.

    Args:
        manifest: of the work in progress.
        counts: `in`, `out`, and `dropped` by reason.
        history: what the trainer has logged up to the step of these weights.
    """
    text = card(manifest, counts, history, rewards_of(manifest["inputs"]))
    (folder / CARD).write_text(text, encoding="utf-8")


def card(manifest: dict[str, Any], counts: dict[str, Any], history: list[dict[str, Any]], rewards: list[str]) -> str:
    """The text of a card, Markdown; `rewards` name what scored the data."""
    inputs = {name: named(source) for name, source in manifest["inputs"].items()}
    adapter = manifest["arguments"].get("use_peft") and not manifest["arguments"].get("merge_adapter")
    head = {"library_name": "peft" if adapter else "transformers"}
    if "state" not in manifest["inputs"]["model"]:  # a name of the hub, and no folder of this machine
        head = {"base_model": manifest["inputs"]["model"]["path"], **head}
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()) or "none"
    given = {name: value for name, value in manifest["arguments"].items() if value not in NOTHING}
    if not given.get("use_peft"):
        given = {name: value for name, value in given.items() if not name.startswith("lora_")}
    decides = {**given, **manifest["settings"]}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"Made by Baton's stage `{manifest['stage']}` from `{inputs['model']}`.\n",
        "## Data\n",
        _table("input", "is", inputs | ({"rewards": ", ".join(rewards)} if rewards else {})),
        f"{counts['in']} in, {counts['out']} trained on, dropped: {dropped}.\n",
        "## Settings\n",
        _table("setting", "value", dict(sorted(decides.items()))),
    ]
    if figures := last_figures(history):
        parts += ["## Figures of the last lines\n", _table("metric", "value", figures)]
    parts += ["## Versions\n", _table("package", "version", manifest["versions"])]
    return "\n".join(parts)


def last_figures(history: list[dict[str, Any]]) -> dict[str, str]:
    """The FIGURES of the last line of training and of the last evaluation, in four digits."""
    lines = [next((line for line in reversed(history) if name in line), {}) for name in ("loss", "eval_loss")]
    return {
        name: f"{value:.4g}"
        for line in lines
        for name, value in line.items()
        if name.removeprefix("eval_") in FIGURES or name in ("step", "epoch")
    }


def named(source: dict[str, Any]) -> str:
    """An input by its name: a hub name whole, of a path the last two parts."""
    return "/".join(Path(source["path"]).parts[-2:]) if "state" in source else source["path"]


def rewards_of(inputs: dict[str, Any]) -> list[str]:
    """What scored the inputs that were annotated, as far as the manifests beside them say it."""
    found: dict[str, None] = {}
    for source in inputs.values():
        try:
            manifest = read_manifest(Path(source["path"])) if "state" in source else None
        except InputError:
            continue
        if manifest is None or manifest["stage"] != "annotate":
            continue
        for scorer in manifest.get("settings", {}).get("scorers", []):
            target = manifest["inputs"].get(f"scorer {scorer.partition('=')[0]}")
            found[f"{scorer} {named(target)}" if target else scorer] = None
    return list(found)


def _table(first: str, second: str, rows: dict[str, Any]) -> str:
    lines = [f"| {first} | {second} |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return harmless(str(value)).replace("|", "\\|")
