"""Offline vLLM as a stream: requests go in while earlier ones come out; no batch is waited for."""

import gc
import logging
import math
import os
import signal
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import psutil

from baton import program
from baton.errors import InputError
from baton.fingerprint import state
from baton.program import die_with_parent
from baton.sampling import seed_from
from generation.arguments import GenerationArguments, changed
from generation.sampling import Completion, Task, prompt_seed

log = logging.getLogger("baton")

CPU_BLOCK, CPU_SEQUENCES = 128, 256  # vLLM's own on CPU: tokens of a cache block, sequences at once
FLOAT32_BYTES = 4


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
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # for what it says while imported
    os.register_at_fork(after_in_child=die_with_parent)


def runs_on_cpu() -> bool:
    """Whether the installed vLLM is a CPU build. vLLM itself decides by the same name."""
    return any(name.startswith("vllm") and "cpu" in f"{name} {version}" for name, version in program.versions().items())


class Sampler:
    """A running engine: called with tasks, it yields each with its K completions, in the order they finish."""

    def __init__(self, llm: Any, arguments: Any):
        self.llm, self.engine, self.arguments = llm, llm.llm_engine, arguments
        engine = self.engine
        self.context = engine.model_config.max_model_len
        # Twice what can run at once, so that the engine always has work; a million prompts need not be held.
        self.ahead = 1 + math.ceil(2 * engine.vllm_config.scheduler_config.max_num_seqs / arguments.K)

    def __call__(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, list[Completion]]]:
        from vllm.inputs import tokens_input

        tasks, running = iter(tasks), {}
        while True:
            for task in islice(tasks, self.ahead - len(running)):
                running[str(task.position)] = task
                parameters = sampling_parameters(self.arguments, prompt_seed(self.arguments, task.record))
                self.engine.add_request(str(task.position), tokens_input(task.token_ids), parameters)
            if not running:
                return
            for output in self.engine.step():
                if output.finished:
                    yield running.pop(output.request_id), [_completion(one) for one in output.outputs]

    def stream(self, task: Task, seed: int) -> Iterator[str | Completion]:
        """Sample one response: yields its text piece by piece, and last of all the completion."""
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        parameters = sampling_parameters(self.arguments, seed)
        parameters.output_kind = RequestOutputKind.DELTA
        name, text, token_ids, reason = str(task.position), "", [], None
        self.engine.add_request(name, tokens_input(task.token_ids), parameters)
        try:
            while reason is None:
                for output in _whole_step(self.engine):
                    (part,) = output.outputs
                    text, reason = text + part.text, part.finish_reason
                    token_ids.extend(part.token_ids)
                    yield part.text
        finally:  # also on Ctrl-C, or where the answer is not read to its end
            if reason is None:
                self.engine.abort_request([name])
        yield Completion(text, token_ids, reason)


def _whole_step(vllm: Any) -> Any:
    """The outputs of one step of the engine. Ctrl-C waits until it is done, so that nothing is left half changed."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        outputs = vllm.step()
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
    return outputs


def _completion(output: Any) -> Completion:
    """vLLM's `CompletionOutput` as a completion."""
    logps = None if output.logprobs is None else output.logprobs.logprobs  # FlatLogprobs: of the sampled tokens alone
    return Completion(output.text, output.token_ids, output.finish_reason, logps)


def sampling_parameters(arguments: GenerationArguments, seed: int | None) -> Any:
    """The arguments as vllm.SamplingParams: K samples of one prompt are one request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=arguments.K,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_tokens=arguments.max_new_tokens,
        min_tokens=arguments.min_new_tokens or 0,
        stop=arguments.stop or None,
        stop_token_ids=arguments.eos_ids or None,
        seed=seed,
        logprobs=0 if arguments.response_logps else None,  # of no token but the sampled one
        flat_logprobs=arguments.response_logps,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class Kept(NamedTuple):
    """The engine of this process, and the settings that it was started with."""

    llm: Any
    settings: dict[str, Any]


_kept: list[Kept] = []  # one at most: a second one would need the memory of the first


class Seeding:
    """What vLLM adds to its worker, in whichever process that is: new random numbers for a running engine."""

    def seed_anew(self, seed: int) -> None:
        from vllm.utils.torch_utils import set_random_seed

        set_random_seed(seed)


def start(arguments: Any, already_done: int) -> Sampler:
    """vLLM with the arguments of get_hf2.py: the engine that this process has, where its settings are the same, else a new one.

    Shards, and a run that goes on after a death with `already_done` prompts, draw other random numbers; which engine draws
    them does not matter. Raises InputError where there are fewer devices than `tensor_parallel_size`, or where vLLM refuses
    the settings.
    """
    settings = _settings(arguments)
    if not _kept or _kept[0].settings != settings:
        if _kept:  # its memory first
            _kept.pop().llm.llm_engine.engine_core.shutdown()
            gc.collect()
        _kept.append(Kept(_new_engine(settings), settings))
    llm = _kept[0].llm
    llm.reset_prefix_cache()
    llm.collective_rpc("seed_anew", args=(seed_from(arguments.seed, arguments.iter, arguments.local_index, already_done),))
    _log_what_runs(llm.llm_engine.vllm_config)
    return Sampler(llm, arguments)


def _settings(arguments: Any) -> dict[str, Any]:
    """The settings of vLLM's engine for these arguments; the state of the model's files is among them.

    Raises InputError where there are fewer devices than `tensor_parallel_size`.
    """
    if runs_on_cpu() and arguments.enforce_eager is not False:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else log-probabilities alone would compile, which needs a compiler
    from vllm.platforms import current_platform

    on_cpu, parallel = current_platform.is_cpu(), arguments.tensor_parallel_size
    devices = 1 if on_cpu else current_platform.device_count()
    if parallel > devices:
        raise InputError(f"--tensor_parallel_size {parallel} needs as many devices, there are {devices}")
    settings: dict[str, Any] = {
        "model": arguments.model_name_or_path,
        "state": state(arguments.model_name_or_path),
        "dtype": arguments.dtype,
        "max_model_len": arguments.max_model_len,
        "tensor_parallel_size": parallel,
        "gpu_memory_utilization": arguments.gpu_memory_utilization,
        # Compiling takes longer than it saves on the models that run on a CPU.
        "enforce_eager": arguments.enforce_eager is not False if on_cpu else bool(arguments.enforce_eager),
    }
    names = ("max_num_seqs", "max_num_batched_tokens", "speculative_config", "quantization", "trust_remote_code")
    chosen = {name: getattr(arguments, name) for name in names}
    settings |= {name: value for name, value in chosen.items() if value}
    # After temperature, top-k and top-p; where they change nothing, the cheaper mode says the same. Also where nobody asks for
    # log-probabilities: a round and its evaluation then share an engine.
    if changed(arguments):
        settings["logprobs_mode"] = "processed_logprobs"
    return settings


def _new_engine(settings: dict[str, Any]) -> Any:
    """A running vllm.LLM. Raises InputError where vLLM refuses the settings."""
    from vllm import LLM
    from vllm.platforms import current_platform

    options = {name: value for name, value in settings.items() if name != "state"}
    try:
        if current_platform.is_cpu():
            options["kv_cache_memory_bytes"] = _cache_bytes_on_cpu(settings)
            if "max_num_batched_tokens" not in settings:  # which may be too few for a whole prompt
                # vLLM 0.32 dies on a CPU of a prompt that is computed in parts whose request has a seed.
                options["enable_chunked_prefill"] = False
        return LLM(worker_extension_cls=f"{__name__}.{Seeding.__name__}", **options)
    except ValueError as error:
        raise InputError(f"{settings['model']}: vLLM refuses these settings: {error}") from None


def _log_what_runs(config: Any) -> None:
    from vllm.platforms import current_platform

    program.log_what_runs(
        device=current_platform.get_device_name(),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        attention=_attention_backend(config),
        tensor_parallel_size=config.parallel_config.tensor_parallel_size,
        max_model_len=config.model_config.max_model_len,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        prefix_caching=config.cache_config.enable_prefix_caching,
        chunked_prefill=config.scheduler_config.enable_chunked_prefill,
        eager=config.model_config.enforce_eager,
    )


def _cache_bytes_on_cpu(settings: dict[str, Any]) -> int:
    """Bytes of the key-value cache: what all sequences need at full length, at most a quarter of free memory.

    vLLM would take nearly all memory, and fill it with zeros first. VLLM_CPU_KVCACHE_SPACE overrides.
    """
    from transformers import AutoConfig

    trusts = settings.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(settings["model"], trust_remote_code=trusts).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_size * FLOAT32_BYTES
    length = settings["max_model_len"] or config.max_position_embeddings
    needed = per_token * math.ceil(length / CPU_BLOCK + 1) * CPU_BLOCK * settings.get("max_num_seqs", CPU_SEQUENCES)
    return min(needed, psutil.virtual_memory().available // 4)


def _attention_backend(config: Any) -> str:
    """The name of the attention backend that vLLM selects for this model on this device."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    model = config.model_config
    with set_current_vllm_config(config):
        backend = get_attn_backend(model.get_head_size(), model.dtype, config.cache_config.cache_dtype, use_mla=model.use_mla)
    return backend.get_name()
