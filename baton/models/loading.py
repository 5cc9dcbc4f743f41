"""Loading models for scoring: in evaluation mode, on one device, with the attention that is fastest there."""

from typing import Any, Literal, NamedTuple

from baton.errors import InputError
from baton.program import cpu_has_bfloat16
from baton.steps import StepReward

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Tokens in a batch, padding included. A CPU is busy with a single sequence; more would only leave its caches.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65536}
# Tokens in a packed row. Smaller rows would divide the responses of a long prompt among them, and compute it in each.
TOKENS_PER_ROW = {"cpu": 8192, "cuda": 65536}
# The shortest sequence of a batch, as a share of its longest: what padding may cost at most.
LEAST_FILLED = {"cpu": 0.98, "cuda": 0.8}


class Settings(NamedTuple):
    """How a model is loaded and fed, and what of it is read; None for the default."""

    dtype: Dtype = "auto"
    max_length: int | None = None
    tokens_per_batch: int | None = None
    chat_template: str | None = None
    heads: tuple[str, ...] | None = None  # of a reward model with several outputs, see `sources.weights_of_outputs`
    step_reward: StepReward = "min"
    step_separator: str | None = None


def load(auto_class: Any, path: str, dtype: Dtype, **options: Any) -> Any:
    """A model in evaluation mode on CPU; dtype `auto` is the checkpoint's. Raises InputError if it cannot be loaded."""
    try:
        model = auto_class.from_pretrained(path, dtype=dtype, **options).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the model cannot be loaded: {error}") from None
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # transformers 5.19 chooses torch's attention, which leaves the soft cap out
    return model


def place(model: Any, device: Any, dtype: Dtype) -> Any:
    """A causal model on its device, on a CPU with the attention that is fastest there; `dtype` as in `moved`."""
    if device.type == "cpu":
        from baton.models import blockwise

        blockwise.use(model)
    return moved(model, device, dtype)


def moved(model: Any, device: Any, dtype: Dtype) -> Any:
    """A model on its device. With dtype `auto` a CPU without instructions for bfloat16 computes in float32: it is faster."""
    import torch

    if device.type == "cpu" and dtype == "auto" and model.dtype == torch.bfloat16 and not cpu_has_bfloat16():
        model.float()
    return model.to(device)


def longest_input(model: Any, wanted: int | None) -> int:
    """The tokens that a model reads at most: its own limit, or `wanted` where that is less."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return min(wanted or limit, limit)


def described(model: Any) -> dict[str, str]:
    """What `log_what_runs` says of a model."""
    return {
        "model": type(model).__name__,
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
    }
