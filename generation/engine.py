"""Offline vLLM as a stream: requests go in while earlier ones come out; no batch is waited for."""

import ctypes
import logging
import math
import os
import signal
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import psutil

from baton import program
from baton.errors import InputError

log = logging.getLogger("baton")

CPU_BLOCK, CPU_SEQUENCES = 128, 256  # vLLM's own on CPU: tokens of a cache block, sequences at once
FLOAT32_BYTES = 4
PR_SET_PDEATHSIG = 1  # prctl(2)


def prepare_environment() -> None:
    """Set what vLLM and OpenMP read from the environment; to be called before anything imports torch.

    On CPU the engine runs in this process: that starts twice as fast as with its two worker processes, and
    nothing outlives `kill -9`. OpenMP threads then sleep while they wait, for spinning ones would take the
    cores from the engine's own work. What the user has set stays.
    """
    defaults = {
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if runs_on_cpu():
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_WAIT_POLICY": "passive"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(
        os.environ["VLLM_LOGGING_LEVEL"]
    )  # for what it says while it is imported
    os.register_at_fork(after_in_child=die_with_parent)


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies, so that `kill -9` leaves no engine behind."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        log.debug("no prctl here: an engine process may outlive kill -9")


def runs_on_cpu() -> bool:
    """Whether the installed vLLM is a CPU build. vLLM itself decides by the same name."""
    return any(
        name.startswith("vllm") and "cpu" in f"{name} {version}"
        for name, version in program.versions().items()
    )


def leave() -> None:
    """End a program whose output is complete, where the engine runs inside it.

    Taking vLLM apart object by object takes seconds, and only frees what the operating system frees anyway.
    """
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        logging.shutdown()
        os._exit(0)


def start(
    *,
    model: str,
    seed: int,
    dtype: str,
    max_model_len: int | None,
    max_num_seqs: int | None,
    gpu_memory_utilization: float,
    tensor_parallel_size: int,
    enforce_eager: bool | None,
) -> Any:
    """Start a vLLM engine (`vllm.v1.engine.llm_engine.LLMEngine`) and log what it runs on.

    Raises InputError where there are fewer devices than `tensor_parallel_size`, or where vLLM refuses the
    settings.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    devices = 1 if current_platform.is_cpu() else current_platform.device_count()
    if tensor_parallel_size > devices:
        raise InputError(
            f"--tensor_parallel_size {tensor_parallel_size} needs as many devices, there are {devices}"
        )
    settings: dict[str, Any] = {"max_num_seqs": max_num_seqs} if max_num_seqs else {}
    if current_platform.is_cpu():
        # Compiling takes longer than it saves on the models that run on a CPU.
        enforce_eager = True if enforce_eager is None else enforce_eager
        settings["kv_cache_memory_bytes"] = _cache_bytes_on_cpu(model, max_model_len, max_num_seqs)
    try:
        llm = LLM(
            model,
            seed=seed,
            dtype=dtype,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=bool(enforce_eager),
            **settings,
        )
    except ValueError as error:
        raise InputError(f"{model}: vLLM refuses these settings: {error}") from None
    config = llm.llm_engine.vllm_config
    program.log_what_runs(
        device=current_platform.get_device_name(),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        attention=_attention_backend(config),
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=config.model_config.max_model_len,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        eager=bool(enforce_eager),
    )
    return llm.llm_engine


def window(engine: Any, samples_per_request: int) -> int:
    """How many requests to keep with the engine: twice what it can run at once, so that it never runs dry."""
    return 1 + math.ceil(2 * engine.vllm_config.scheduler_config.max_num_seqs / samples_per_request)


def stream(
    engine: Any, requests: Iterable[tuple[str, list[int], Any]], ahead: int
) -> Iterator[tuple[str, Any]]:
    """Yield (key, vllm.RequestOutput) as requests (key, prompt token ids, vllm.SamplingParams) finish.

    At most `ahead` requests are with the engine; more are drawn from `requests` as soon as some finish.
    """
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    requests, running = iter(requests), 0
    while True:
        for key, token_ids, parameters in islice(requests, ahead - running):
            parameters.output_kind = RequestOutputKind.FINAL_ONLY
            engine.add_request(key, tokens_input(token_ids), parameters)
            running += 1
        if not running:
            return
        for output in engine.step():
            if output.finished:
                running -= 1
                yield output.request_id, output


def _cache_bytes_on_cpu(model: str, max_model_len: int | None, max_num_seqs: int | None) -> int:
    """Bytes of the key-value cache: what all sequences need at full length, at most a quarter of free memory.

    vLLM would take nearly all memory, and fill it with zeros first. VLLM_CPU_KVCACHE_SPACE overrides.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_size * FLOAT32_BYTES
    length = max_model_len or config.max_position_embeddings
    needed = per_token * math.ceil(length / CPU_BLOCK + 1) * CPU_BLOCK * (max_num_seqs or CPU_SEQUENCES)
    return min(needed, psutil.virtual_memory().available // 4)


def _attention_backend(config: Any) -> str:
    """The name of the attention backend that vLLM selects for this model on this device."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    model = config.model_config
    with set_current_vllm_config(config):
        backend = get_attn_backend(
            model.get_head_size(), model.dtype, config.cache_config.cache_dtype, use_mla=model.use_mla
        )
    return backend.get_name()
