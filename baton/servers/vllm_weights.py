"""What vLLM's workers load to take weights from a trainer while they serve: `--worker-extension-cls …vllm_weights.Extension`.

The import registers the engine "baton" of `--weight-transfer-config`. The trainer's side is weights.py. This is the one file of
`baton` that imports vLLM; only vLLM imports it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from baton.servers import groups

log = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged under its own name


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where the trainer's store listens, and which group, of how many members, its servers' workers join."""

    host: str
    port: int
    connection: str
    size: int
    backend: str  # gloo or nccl
    seconds: float


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """Tensors that arrive one after another in a flat one: their names and shapes, and the dtype of all."""

    names: list[str]
    shapes: list[list[int]]
    dtype: str


class Engine(WeightTransferEngine[Meeting, Bucket]):
    """A worker's end of a `Transfer`. Every worker gets whole tensors, as in a checkpoint, and takes its part of them."""

    init_info_cls, update_info_cls = Meeting, Bucket
    group, connection, failed = None, "", False

    def init_transfer_engine(self, meeting: Meeting) -> None:
        self.shutdown()
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = dist.TCPStore(meeting.host, meeting.port, timeout=timedelta(seconds=meeting.seconds), wait_for_workers=False)
        here = groups.own_address(meeting.host, meeting.port)
        self.place = torch.device("cpu") if meeting.backend == "gloo" else self.device
        self.group = groups.join(store, meeting.connection, rank, meeting.size, self.place, here, meeting.seconds)
        self.connection, self.seconds = meeting.connection, meeting.seconds

    def start_weight_update(self) -> None:
        if self.failed:
            raise RuntimeError("an update has failed before: the server must be started anew")
        self.missing = {name for name, _ in self.model.named_parameters()} if self.model_config.quantization is None else set()
        self.failed = True  # until the update is complete
        log.info("new weights come")
        initialize_layerwise_reload(self.model)

    def receive_weights(self, bucket: Bucket) -> None:
        if self.group is None:
            raise RuntimeError("no trainer is connected")
        sizes = [torch.Size(shape).numel() for shape in bucket.shapes]
        flat = torch.empty(sum(sizes), dtype=getattr(torch, bucket.dtype), device=self.place)
        groups.broadcast(self.group, flat).wait(timedelta(seconds=self.seconds))
        tensors = [part.view(shape) for part, shape in zip(flat.split(sizes), bucket.shapes, strict=True)]
        with disable_mtp_completeness_check():
            self.load(zip(bucket.names, tensors, strict=True))

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take some of the model's weights, by their names in a checkpoint."""
        loaded = self.model.load_weights(weights)
        self.missing = self.missing - loaded if loaded is not None else set()

    def load_from(self, folder: str) -> None:
        """Take the weights in a model's folder."""
        self.model_config.model, self.model_config.revision = folder, None
        loader = get_model_loader(self.vllm_config.load_config)
        self.load(loader.get_all_weights(self.model_config, self.model))

    def finish_weight_update(self) -> None:
        missing = sorted(self.missing | set(self._incomplete()))
        if missing:
            raise ValueError(f"no weights, or not all, came for {len(missing)} parts of the model: {', '.join(missing[:5])}")
        finalize_layerwise_reload(self.model, self.model_config)
        renew_shared_head(self.model)
        self.failed = False
        log.info("new weights are complete")

    def _incomplete(self) -> Iterator[str]:
        """Layers that got a part of their parameters, such as a query without its key; vLLM would fill the rest with junk."""
        for name, layer in self.model.named_modules() if self.model_config.quantization is None else ():
            info = get_layerwise_info(layer)
            wanted = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
            padded = isinstance(layer, VocabParallelEmbedding)
            if info.can_load() and info.load_numel < wanted and not padded:
                yield name

    def shutdown(self) -> None:
        if self.group is not None:
            self.group.abort()
        self.group, self.connection = None, ""


def renew_shared_head(model: torch.nn.Module) -> None:
    """Bring an output head that shares the embedding's weights up to date with them.

    On a CPU vLLM multiplies by a packed copy of it, which it renews only for a head with weights of its own: log-probabilities
    would be those of new layers under the old head.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = {layer.weight.data_ptr() for layer in layers if not isinstance(layer, ParallelLMHead)}
    for layer in layers:
        if isinstance(layer, ParallelLMHead) and layer.weight.data_ptr() in embeddings:
            layer.quant_method.process_weights_after_loading(layer)


class Extension:
    """Methods that vLLM's workers get, for /collective_rpc."""

    def reload_from(self, folder: str) -> None:
        """Load the weights in a model's folder. Raises ValueError where it does not hold them all.

        vLLM's own `reload_weights` would log what is missing, and serve what memory happens to hold in its place.
        """
        self.start_weight_update()
        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.load_from(folder)
        self.finish_weight_update()

    def transfer_state(self) -> dict[str, str]:
        """To which `Transfer` this worker is connected ("" to none), and the dtype of its weights."""
        return {
            "connection": self.weight_transfer_engine.connection,
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
        }


WeightTransferEngineFactory.register_engine("baton", Engine)
