"""The settings of scorers, for the programs that score: get_rewards.py and serve_rm.py."""

from pathlib import Path
from typing import Literal

from baton.arguments import StageArguments, option
from baton.errors import InputError
from baton.models.loading import Settings
from baton.scorers import Wanted, wanted_scorers
from baton.steps import StepReward


class ScorerArguments(StageArguments):
    reward_name_or_path: str = option(
        "sfairXC/FsfairX-LLaMA3-RM-v0.1", "reward model, where no --scorer is given", changes_result=False
    )
    scorer: list[str] | None = option(None, "scorers, each [NAME=]KIND:TARGET (see above)", changes_result=False)
    weights: list[float] | None = option(None, "weight of each scorer in `rewards` (default: 1 each)")
    chat_template: Path | None = option(None, "Jinja file, for a reward model that has no chat template", changes_result=False)
    max_length: int | None = option(
        None, "tokens of a conversation; longer ones lose their beginning (default: the model's limit)", ge=8
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the model; auto: the checkpoint's, but float32 on a CPU without bfloat16 (in a vllm: scorer vLLM's choice)"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where models run", changes_result=False)
    tokens_per_batch: int | None = option(
        None,
        "tokens in a batch (default: 65536 on a GPU, 8192 on CPU, 2048 where sequences are padded)",
        ge=1,
        changes_result=False,
    )
    trust_remote_code: bool = option(False, "let scorers of kind custom run the code in the model's folder")
    workers: int | None = option(
        None, "calls at once (default: a process per core for function, 32 requests for http and judge)",
        ge=1, changes_result=False,
    )  # fmt: skip
    timeout: float = option(60.0, "seconds that one call of a function or service may take", gt=0, changes_result=False)
    tries: int = option(5, "tries of a request before giving up", ge=1, changes_result=False)
    judge_model: str | None = option(None, "name of the judge model on its server")
    rubric: Path | None = option(
        None, "text file with the judge's rubric (default: annotate_data/rubric.txt)", changes_result=False
    )

    heads: list[str] | None = option(
        None, "outputs of a `bt` model that has several, each NAME or NAME=WEIGHT: the reward is their weighted sum"
    )
    step_reward: StepReward = option("min", "reward of a response by the probabilities of its steps, of kind process")
    step_separator: str | None = option(
        None,
        "what stands between steps, of kind process; \\n is a line break (default: an empty line, \\n\\n)",
    )

    def model_settings(self) -> Settings:
        """How a scorer's model is loaded and read."""
        fed = self.dtype, self.max_length, self.tokens_per_batch, self.chat_template
        return Settings(*fed, self.heads and tuple(self.heads), self.step_reward, self.step_separator)

    def wanted(self) -> list[Wanted]:
        """The scorers that are requested. Raises InputError for a word that names none."""
        return wanted_scorers(self.scorer or [f"bt:{self.reward_name_or_path}"])


def weights_of(wanted: list[Wanted], weights: list[float] | None) -> dict[str, float]:
    """The weight of each scorer, by name."""
    if weights is not None and len(weights) != len(wanted):
        raise InputError(f"--weights: {len(weights)} weights for {len(wanted)} scorers")
    return dict(zip([scorer.name for scorer in wanted], weights or [1.0] * len(wanted), strict=True))


def weighted_sum(scores: dict[str, list[float]], weights: dict[str, float]) -> list[float]:
    """The weighted sum of each response's scores."""
    columns = zip(*(scores[name] for name in weights), strict=True)
    return [sum(w * s for w, s in zip(weights.values(), column, strict=True)) for column in columns]
