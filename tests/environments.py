"""Environments for tests of what the scripts choose and start: made for a device, as their stamps say."""

import hashlib
import os
import re
import sys
from pathlib import Path

from tests.programs import ROOT

REAL = Path(sys.prefix).parent  # those that the tests run in


def made_for(device: str, folder: Path, python: Path | None = None) -> Path:
    """Both environments in `folder`, up to date for a device; returns it, a value of BATON_ENVS.

    They are links to those that the tests run in: never change them. Or, with `python`, that program alone for Python.
    """
    for name in ("inference", "training"):
        place = folder / name
        place.mkdir(parents=True)
        if python is None:
            for entry in (REAL / name).iterdir():
                if entry.name != "baton.stamp":
                    (place / entry.name).symlink_to(entry)
        else:
            (place / "bin").mkdir()
            (place / "lib/python3.11/site-packages").mkdir(parents=True)
            (place / "bin/python").symlink_to(python)
        (place / "baton.stamp").write_text(f"venv {place}\n{device} {pins_hash(name, device)}\n")
    return folder


def pins_hash(name: str, device: str) -> str:
    """The hash of a lock's pins, as scripts/setup_envs.sh computes it."""
    lines = (line.split("#")[0].strip() for line in (ROOT / f"configs/envs/{name}-{device}.txt").read_text().splitlines())
    pins = (line.split("==") for line in lines if line)
    sorted_pins = sorted(f"{re.sub(r'[-_.]+', '-', package).lower()}=={version}\n" for package, version in pins)
    return hashlib.sha256("".join(sorted_pins).encode()).hexdigest()


def on_path(folder: Path, **scripts: str) -> str:
    """A value of PATH on which commands come first that are these shell scripts; `_` in a name stands for `-`."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        file = folder / name.replace("_", "-")
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
