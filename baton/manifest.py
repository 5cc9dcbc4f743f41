"""Manifests: the JSON file beside an output that says what made it, and the names of the files around an output."""

import os
import shutil
from pathlib import Path
from typing import Any

import orjson

from baton.errors import InputError


def manifest_path(output: Path) -> Path:
    """The manifest beside a finished output."""
    return output.with_name(output.name + ".manifest.json")


def in_progress(output: Path) -> Path:
    """The name of unfinished work on an output, under which its manifest stands: `<output>.partial`."""
    return output.with_name(output.name + ".partial")


def put_aside(output: Path) -> Path:
    """Where an output is kept while its successor is made: `<output>.old`."""
    return output.with_name(output.name + ".old")


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest beside `output`, or None. Raises InputError if it is not JSON."""
    path = manifest_path(output)
    try:
        manifest = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error}; move it away, or start the stage afresh with --overwrite") from None
    parts = [manifest.get(name) for name in ("arguments", "inputs")] if isinstance(manifest, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or "stage" not in manifest:
        raise InputError(f"{path}: not a manifest of a stage; move it away, or start the stage afresh with --overwrite")
    return manifest


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest beside `output`, atomically."""
    path = manifest_path(output)
    unfinished = path.with_name(path.name + ".writing")
    with unfinished.open("wb") as file:
        file.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
        file.flush()
        os.fsync(file.fileno())  # else a machine that loses its power may keep the name without the content
    unfinished.replace(path)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
