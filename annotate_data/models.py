"""Loading models for scoring, with what can be refused without loading them refused first."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from baton.errors import InputError
from baton.templates import check_model_path

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Tokens in a batch, padding included. A CPU is busy with a single sequence; more would only leave its caches.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65536}
# The shortest sequence of a batch, as a share of its longest: what padding may cost at most.
LEAST_FILLED = {"cpu": 0.98, "cuda": 0.8}


class Settings(NamedTuple):
    """How a model is loaded and fed; None for the default."""

    dtype: Dtype = "auto"
    max_length: int | None = None
    tokens_per_batch: int | None = None
    chat_template: str | None = None


def check_reward_model(path: str) -> None:
    """Raise InputError, without any heavy import, if a local model has not the one output of a reward model."""
    check_model_path(path)
    file = Path(path, "config.json")
    if file.exists():
        config = json.loads(file.read_text(encoding="utf-8"))
        names = config.get("architectures") or []
        labels = config.get("num_labels") or len(config.get("id2label") or "12")
        if any("Causal" in name for name in names) or labels != 1:
            raise InputError(
                f"{path}: not a Bradley-Terry reward model, which is a sequence classifier with one output; this is "
                f"{', '.join(names) or 'unnamed'} with {labels} labels"
            )


def load(auto_class: Any, path: str, dtype: Dtype, **options: Any) -> Any:
    """A model in evaluation mode on CPU; dtype `auto` is the checkpoint's. Raises InputError if it cannot be loaded."""
    try:
        return auto_class.from_pretrained(path, dtype=dtype, **options).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the model cannot be loaded: {error}") from None


def place(model: Any, device: Any) -> Any:
    """A causal model on its device, on a CPU with the attention that is fastest there."""
    if device.type == "cpu":
        from annotate_data import cpu_attention

        cpu_attention.use(model)
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
