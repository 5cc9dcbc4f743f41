"""What a vLLM server loads for `ppo.py --transfer`: besides `Transfer`'s own worker methods, a bare way for weights to come.

The bare way is one broadcast of torch and vLLM's `load_weights` between the two functions that it needs around it: no pause, no
buckets, no versions, no look at what is missing.
"""

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from baton.servers import groups, vllm_weights


class Extension(vllm_weights.Extension):
    """Methods for /collective_rpc."""

    def join_bare(self, host: str, port: int, backend: str, size: int, seconds: float) -> None:
        """Join the trainer's group `bare` of so many members."""
        store = dist.TCPStore(host, port, timeout=timedelta(seconds=seconds), wait_for_workers=False)
        self.bare_place = torch.device("cpu") if backend == "gloo" else self.device
        self.bare = groups.join(store, "bare", 1 + self.rank, size, self.bare_place, host, seconds)

    def load_bare(self, names: list[str], shapes: list[list[int]], dtype: str) -> float:
        """Take all weights, one after another in one tensor; returns the seconds."""
        begun = time.perf_counter()
        model = self.model_runner.get_model()
        sizes = [torch.Size(shape).numel() for shape in shapes]
        flat = torch.empty(sum(sizes), dtype=getattr(torch, dtype), device=self.bare_place)
        groups.broadcast(self.bare, flat).wait()
        tensors = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            model.load_weights(zip(names, tensors, strict=True))
            finalize_layerwise_reload(model, self.model_config)
        return time.perf_counter() - begun
