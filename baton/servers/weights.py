"""A trainer's weights on their way to vLLM servers that go on serving: the trainer's side of vllm_weights.py.

    transfer = Transfer([server.url for server in servers], api_key)
    transfer.send(model.named_parameters(), version=7)

Each server has a process group of its own with the trainer, so that the death of one blocks no other. A server is always paused
while its weights change: that ends its requests, which `Rollouts` sends again, and empties its cache of prefixes.
"""

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from baton.errors import InputError
from baton.servers import groups
from baton.servers.addresses import error_text, proxy_settings

log = logging.getLogger("baton")

BUCKET_BYTES = 256 * 2**20
IDLE_SECONDS = 2.0  # of a connection that is used again: vLLM closes them after 5, in whose moment a request would fail
POLL_SECONDS = 0.001


class TransferFailed(Exception):
    """Servers, at `urls`, that did not get the weights, and stay paused until they are started anew. The others have them."""

    def __init__(self, reasons: dict[str, str]):
        super().__init__("; ".join(f"{url}: {reason}" for url, reason in reasons.items()))
        self.urls = list(reasons)


class Failure(Exception):
    """Why one server did not do as it was told."""


class Bucket(NamedTuple):
    """Tensors one after another in a `flat` one."""

    names: list[str]
    shapes: list[list[int]]
    flat: torch.Tensor


@dataclass
class Link:
    """One server, and the group with it; `connection` is the group's name, which the server must know too."""

    url: str
    http: httpx.Client
    group: groups.Group | None = None
    connection: str = ""
    dtype: torch.dtype | None = None  # of the server's weights

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The server's JSON answer. Raises Failure."""
        return self.tell(method, path, body).json()

    def tell(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The server's answer, whatever it holds. Raises Failure."""
        try:
            response = self.http.request(method, f"{self.url}/{path}", json=body)
        except httpx.HTTPError as error:
            raise Failure(f"/{path}: {type(error).__name__} {error}".rstrip()) from None
        if response.status_code != 200:
            raise Failure(f"/{path}: HTTP {response.status_code}: {error_text(response)}")
        return response

    def call_workers(self, method: str, **kwargs: str) -> list[Any]:
        """What each of the server's workers returns. Raises Failure."""
        return self.ask("POST", "collective_rpc", {"method": method, "kwargs": kwargs})["results"]

    def pause(self) -> None:
        """End what the server samples, and empty its caches. Raises Failure."""
        self.ask("POST", "pause?mode=abort&clear_cache=true")
        if not self.ask("GET", "is_paused")["is_paused"]:
            raise Failure("/pause: the server goes on")

    def resume(self, version: int) -> None:
        """Let a paused server go on. Raises Failure if its weights are not of this version."""
        found = self.ask("GET", "weight_info")["weight_version"]
        if found != str(version):
            raise Failure(f"its weights are of version {found} after those of version {version} were sent")
        self.ask("POST", "resume")

    def disconnect(self) -> None:
        if self.group is not None:
            self.group.abort()
        self.group, self.connection = None, ""


class Transfer:
    """Sends weights to the servers at `urls` (without /v1), which were started for it: own.policy_servers(…, weights=True).

    device: where the trainer's weights are. backend: nccl or gloo; the device's own if not given; gloo where a trainer shares a
    GPU with a server. host: the address of this machine on which to meet the servers. dtype: of the weights on their way; that
    of the servers if not given. bucket_bytes: held at once, half of it on its way while the other half is filled. timeout:
    seconds for each step of a server, such as one bucket.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None,
        *,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        host: str = "127.0.0.1",
        dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        timeout: float = 60.0,
    ):
        self.backend = backend or ("nccl" if torch.device(device).type == "cuda" else "gloo")
        self.device = torch.device(device if self.backend == "nccl" else "cpu")
        if self.device.type == "cuda" and self.device.index is None:  # other threads have another current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.host, self.dtype, self.bucket_bytes, self.timeout = host, dtype, bucket_bytes, timeout
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10)),
            limits=httpx.Limits(keepalive_expiry=IDLE_SECONDS),
            **proxy_settings(),
        )
        self.links = [Link(url.rstrip("/").removesuffix("/v1"), self.http) for url in urls]
        self.store, self.port = groups.listen(host, timeout)
        self.pool = ThreadPoolExecutor(8 * len(urls), "weights")

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], version: int, urls: Sequence[str] | None = None) -> float:
        """Give servers (those at `urls`; all if not given) these weights, by their names in a checkpoint; returns the seconds.

        `weights` is read to its end once, whatever happens to the servers, and a tensor only until the next one is asked for.
        Raises TransferFailed if a server did not get them: the others did. Raises InputError for servers of different dtypes.
        """
        began, failures = time.monotonic(), {}
        links = self._on_each(self._chosen(urls), self._connect, failures)
        dtype = self.dtype or common_dtype(links)
        doing = self._start(links, self._begin)
        try:
            for bucket in buckets(weights, dtype, self.bucket_bytes // 2, self.device):
                links = self._succeeded(doing, failures)
                doing = self._start(links, partial(self._give, bucket))  # while the next one is filled
            links = self._succeeded(doing, failures)
        except BaseException:
            for link in links:
                log.warning("%s: has half of the weights: it stays paused until it is started anew", link.url)
                link.disconnect()
            raise
        self._on_each(links, partial(self._finish, version), failures)
        if failures:
            raise TransferFailed(failures)
        return time.monotonic() - began

    def reload(self, path: str | Path, version: int, urls: Sequence[str] | None = None) -> float:
        """As `send`, for weights in a model's folder that every server can read, on a RAM disk or a shared disk.

        Raises InputError if the folder holds no whole safetensors files.
        """
        check_weights(Path(path))

        def load(link: Link) -> None:
            link.pause()
            link.call_workers("reload_from", folder=str(Path(path).absolute()))
            link.ask("POST", "update_weight_version", {"new_version": str(version)})
            link.resume(version)

        began, failures = time.monotonic(), {}
        self._on_each(self._chosen(urls), load, failures)
        if failures:
            raise TransferFailed(failures)
        return time.monotonic() - began

    def sleep(self) -> None:
        """Have the servers leave their GPUs' memory to others until `wake`; they answer nothing. Raises TransferFailed."""
        self._tell_each("sleep?level=1")

    def wake(self) -> None:
        """End `sleep`. Raises TransferFailed."""
        self._tell_each("wake_up")

    def _tell_each(self, path: str) -> None:
        failures: dict[str, str] = {}
        self._on_each(self.links, lambda link: link.tell("POST", path), failures)
        if failures:
            raise TransferFailed(failures)

    def checksums(self) -> dict[str, dict[str, str]]:
        """The checksum of each parameter as each server holds it, by the servers' addresses. Raises TransferFailed."""
        found, failures = {}, {}

        def ask(link: Link) -> None:
            found[link.url] = link.ask("POST", "weight_checker", {"action": "checksum"})["checksums"]

        self._on_each(self.links, ask, failures)
        if failures:
            raise TransferFailed(failures)
        return found

    def close(self) -> None:
        """End the connections. The servers go on."""
        for link in self.links:
            link.disconnect()
        self.pool.shutdown(wait=False)
        self.http.close()

    def _chosen(self, urls: Sequence[str] | None) -> list[Link]:
        chosen = None if urls is None else {url.rstrip("/").removesuffix("/v1") for url in urls}
        return [link for link in self.links if chosen is None or link.url in chosen]

    def _on_each(self, links: list[Link], do: Callable[[Link], None], failures: dict[str, str]) -> list[Link]:
        """Do something with servers, all at once; returns what `_succeeded` does."""
        return self._succeeded(self._start(links, do), failures)

    def _start(self, links: list[Link], do: Callable[[Link], None]) -> list[tuple[Link, Future]]:
        return [(link, self.pool.submit(do, link)) for link in links]

    def _succeeded(self, doing: list[tuple[Link, Future]], failures: dict[str, str]) -> list[Link]:
        """Wait until all is done; returns the servers with which it worked, and notes why it did not with others."""
        succeeded = []
        for link, future in doing:
            try:
                future.result()
                succeeded.append(link)
            except (Failure, RuntimeError) as error:  # torch's own are RuntimeErrors
                failures[link.url] = str(error)
                log.error("%s: %s", link.url, error)
                link.disconnect()
        return succeeded

    def _connect(self, link: Link) -> None:
        """Have a group with a server, unless it still knows the one that there is."""
        workers = link.call_workers("transfer_state")
        link.dtype = getattr(torch, workers[0]["dtype"])
        if link.group is not None and all(worker["connection"] == link.connection for worker in workers):
            return
        link.disconnect()
        name, size = secrets.token_hex(8), 1 + len(workers)
        meeting = {"host": self.host, "port": self.port, "connection": name, "size": size}
        meeting |= {"backend": self.backend, "seconds": self.timeout}
        told = self.pool.submit(link.ask, "POST", "init_weight_transfer_engine", {"init_info": meeting})
        joined = self.pool.submit(groups.join, self.store, name, 0, size, self.device, self.host, self.timeout)
        _, waiting = wait([told, joined], self.timeout, FIRST_EXCEPTION)
        for future in {told, joined} - waiting:
            future.result()
        if waiting:
            raise Failure(f"not connected after {self.timeout:g} s")
        link.group, link.connection = joined.result(), name

    def _begin(self, link: Link) -> None:
        link.pause()
        link.ask("POST", "start_weight_update")

    def _give(self, bucket: Bucket, link: Link) -> None:
        """Send a bucket to a server, and wait until the server has loaded it."""
        dtype = str(bucket.flat.dtype).removeprefix("torch.")
        description = {"names": bucket.names, "shapes": bucket.shapes, "dtype": dtype}
        told = self.pool.submit(link.ask, "POST", "update_weights", {"update_info": description})
        sending = groups.broadcast(link.group, bucket.flat)
        deadline = time.monotonic() + self.timeout
        while not (told.done() and sending.is_completed()):
            if told.done():
                told.result()  # a server that has failed takes no more
            if sending.is_completed() and not told.done():
                wait([told], max(deadline - time.monotonic(), 0))
            if time.monotonic() > deadline:
                raise Failure(f"no answer after {self.timeout:g} s to {bucket.flat.nbytes} bytes of weights")
            time.sleep(POLL_SECONDS)
        told.result()
        sending.wait()

    def _finish(self, version: int, link: Link) -> None:
        link.ask("POST", "finish_weight_update", {"weight_version": str(version)})
        link.resume(version)


def common_dtype(links: list[Link]) -> torch.dtype | None:
    """The dtype of these servers' weights; None without servers. Raises InputError if they differ."""
    dtypes = {link.dtype for link in links}
    if len(dtypes) > 1:
        raise InputError(
            f"the servers' weights are of different dtypes, {', '.join(map(str, dtypes))}: start them with one --dtype"
        )
    return next(iter(dtypes), None)


def buckets(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None, size: int, device: torch.device
) -> Iterator[Bucket]:
    """`weights`, as `dtype` where they are floats, in buckets of `size` bytes on `device`; a larger tensor has its own.

    A bucket takes the memory of the last but one, which must not be used any more when it is asked for.
    """
    names, shapes, flat, filled = [], [], torch.empty(0, device=device), 0
    other = flat

    def done() -> Bucket:
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()
        return Bucket(names, shapes, flat[:filled])

    for name, tensor in weights:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        count = tensor.numel()
        if wanted != flat.dtype or filled + count > flat.numel():
            if names:
                yield done()
            names, shapes, filled = [], [], 0
            flat, other = other, flat
            if wanted != flat.dtype or count > flat.numel():
                del flat  # before there is another one
                flat = torch.empty(max(size // wanted.itemsize, count), dtype=wanted, device=device)
        flat[filled : filled + count].copy_(tensor.detach().reshape(-1))
        names.append(name)
        shapes.append(list(tensor.shape))
        filled += count
    if names:
        yield done()


def check_weights(folder: Path) -> None:
    """Raise InputError unless there are safetensors files, all that the index names, each of them whole.

    A server that fails to load a file answers no more.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ()
        files = [folder / name for name in named] or list(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{folder}: no *.safetensors in this folder")
        for file in files:
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder}: not the whole weights of a model: {error}") from None
