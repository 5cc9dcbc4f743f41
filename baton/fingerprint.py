"""What an input is, in a few bytes: so that a stage notices when its input is no longer what it was.

A file or a folder is its content, a model or dataset of the hub its commit. Contents are read whole once; later they are read
again only where a file's size or times have changed since.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

CHUNK = 1 << 22  # bytes read at a time
READERS = 8  # files of a folder that are read at once
HUB_SECONDS = 3  # how long to wait for the hub to name its latest commit


def fingerprint(source: str | Path) -> dict[str, Any]:
    """Describe a file or a folder by its content, and a hub name by its commit.

    `hash` is the content's, `state` that of sizes and times when it was read; the state is taken first, so that a change while
    reading is noticed later.
    """
    path = Path(source)
    if not path.exists():
        return {"path": str(source), "hash": _hub_hash(str(source), latest_commit(str(source)))}
    state = _state(_files(path))
    return {"path": str(source), "state": state, "hash": _content_hash(path, state)}


def state(source: str | Path) -> str | None:
    """What changes when a file or a folder may have changed, without reading it; of a hub name, the commit loaded last."""
    path = Path(source)
    return _state(_files(path)) if path.exists() else cached_commit(str(source))


def difference(known: dict[str, Any], source: str | Path) -> str | None:
    """What says that `source` is no longer what `known` describes, as a text, or None.

    The network is not used: of a hub name, the commit that was last loaded on this machine counts.
    """
    path = Path(source)
    if path.exists():
        same = known.get("state") == _state(_files(path)) or known["hash"] == fingerprint(source)["hash"]
        if same:
            return None
        return f"the content of {source} has changed" if known["path"] == str(source) else f"{source} is not {known['path']}"
    if "state" in known:
        return f"{source} is no longer there"
    name, _, before = known["hash"].partition("@")
    if name != str(source):
        return f"{source} is not {known['path']}"
    now = cached_commit(name)
    # Nothing is known where a copy has gone since, or was not here yet when the work began.
    return f"{source} is at another commit than {before}" if before and now and before != now else None


def cached_commit(name: str) -> str | None:
    """The commit of a hub model or dataset that was last loaded on this machine, or None."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for kind in ("models", "datasets"):
        reference = Path(HF_HUB_CACHE, f"{kind}--{name.replace('/', '--')}", "refs", "main")
        if reference.is_file():
            return reference.read_text(encoding="ascii").strip()
    return None


def cached_folder(model: str) -> Path | None:
    """Where the hub's cache holds the files of a model at its commit that was last loaded here, or None."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    reference = folder / "refs/main"
    return folder / "snapshots" / reference.read_text(encoding="ascii").strip() if reference.is_file() else None


def latest_commit(name: str) -> str | None:
    """The hub's latest commit of a model or dataset, which is about to be loaded; the cached one if the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    for kind in ("model", "dataset"):
        try:
            return HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS).sha
        except RepositoryNotFoundError:
            continue
        except Exception:  # whatever keeps the hub from answering, the libraries will name it when they load
            break
    return cached_commit(name)


def _hub_hash(name: str, commit: str | None) -> str:
    return f"{name}@{commit}" if commit else name


def _files(path: Path) -> dict[str, Path]:
    """The files of a folder by their names in it; of a file itself, under no name.

    Left out are hidden ones, its README.md, and the checkpoints of the training that made it, which may be deleted later.
    """
    if path.is_file():
        return {"": path}
    files = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
    hidden = {name for name in files if any(part.startswith(".") for part in name.parts)}
    hidden |= {name for name in files if name == Path("README.md") or name.parts[0].startswith("checkpoint-")}
    seen = {str(name): file for name, file in files.items() if name not in hidden}
    return dict(sorted(seen.items()))


def _state(files: dict[str, Path]) -> str:
    """A hash of the files' names, sizes and times. The change time cannot be set back, as the modification time can."""
    stats = {name: os.stat(file) for name, file in files.items()}
    text = "\0".join(f"{name} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for name, s in stats.items())
    return xxhash.xxh3_128_hexdigest(text.encode())


@functools.cache
def _content_hash(path: Path, state: str) -> str:
    """The hash of all files of `path`, read once for each `state`."""
    files = _files(path)
    whole = xxhash.xxh3_128()
    with ThreadPoolExecutor(READERS) as readers:
        for name, digest in zip(files, readers.map(_digest, files.values()), strict=True):
            whole.update(name.encode() + b"\0" + digest)
    return whole.hexdigest()


def _digest(path: Path) -> bytes:
    """The hash of one file's content."""
    hash_ = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            hash_.update(chunk)
    return hash_.digest()
