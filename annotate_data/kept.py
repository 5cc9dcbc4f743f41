"""The scorer that this process has loaded last, for the next stage of a chain that scores with the same model."""

from collections.abc import Callable, Hashable
from typing import Any

from annotate_data.work import Scorer
from baton.fingerprint import state
from baton.models import devices, loading
from baton.program import log_what_runs

_kept: list[tuple[Hashable, Any]] = []  # one at most: it is freed before another takes the memory


def kept(
    kind: str, path: str, settings: loading.Settings, device: devices.Device, make: Callable[[], Any]
) -> Callable[[], Scorer]:
    """A function that makes the scorer of `kind` by `make`, or gives the one that this process made last, if it is the same.

    The same is: of a model whose files have not changed, with the same settings, on the same device.
    """

    def scorer() -> Any:
        template = state(settings.chat_template) if settings.chat_template else None
        key = (kind, path, state(path), settings, template, device)
        if _kept and _kept[0][0] == key:
            found = _kept[0][1]
            log_what_runs(**devices.described(devices.choose_device(device)), **loading.described(found.model))
            return found
        _kept.clear()
        _kept.append((key, make()))
        return _kept[0][1]

    return scorer
