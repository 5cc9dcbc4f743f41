"""What an input is, in a few bytes: so that a stage notices when its input is no longer what it was."""

from pathlib import Path
from typing import Any

import xxhash

CHUNK = 1 << 22  # bytes read at a time
SAMPLED_ABOVE = 64 << 20  # in a model's folder, of a larger file only the size, the head and the tail are hashed


def fingerprint(source: str | Path) -> dict[str, Any]:
    """Describe a file by its content, a model's folder by its files, and a hub name by itself.

    Weights of a folder that are larger than 64 MiB are hashed by their size, first and last 4 MiB: training
    changes every tensor, and reading 16 GB to notice it would cost more than some stages do.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        hash_ = xxhash.xxh3_128()
        for file in files:
            hash_.update(str(file.relative_to(path)).encode())
            _hash_file(hash_, file, sampled=file.stat().st_size > SAMPLED_ABOVE)
        return {"path": str(source), **_cheap(files), "hash": hash_.hexdigest()}
    if path.is_file():
        hash_ = xxhash.xxh3_128()
        _hash_file(hash_, path, sampled=False)
        return {"path": str(source), **_cheap([path]), "hash": hash_.hexdigest()}
    return {"path": str(source), "hash": str(source)}


def unchanged(known: dict[str, Any], source: str | Path) -> bool:
    """Whether `source` is still what `known` describes; contents are read only where size or time differ."""
    path = Path(source)
    if known.get("path") == str(source) and "mtime_ns" in known and path.exists():
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        if _cheap(files) == {key: known[key] for key in ("bytes", "mtime_ns")}:
            return True
    return known.get("hash") == fingerprint(source)["hash"]


def _cheap(files: list[Path]) -> dict[str, int]:
    stats = [file.stat() for file in files]
    return {
        "bytes": sum(s.st_size for s in stats),
        "mtime_ns": max((s.st_mtime_ns for s in stats), default=0),
    }


def _hash_file(hash_: Any, path: Path, sampled: bool) -> None:
    size = path.stat().st_size
    hash_.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if sampled:
            hash_.update(file.read(CHUNK))
            file.seek(size - CHUNK)
        while chunk := file.read(CHUNK):
            hash_.update(chunk)
