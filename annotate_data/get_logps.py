"""Annotate responses with their log-probabilities under one or several causal language models.

    python annotate_data/get_logps.py --dataset_name_or_path data/gen_data.jsonl --output_dir data/logps.jsonl \\
        --models policy=runs/a/round3/policy initial=runs/a/sft
    # eight GPUs
    accelerate launch --num_processes 8 annotate_data/get_logps.py --dataset_name_or_path …

Each record of the output is the input's, with `logps_by: {name: K floats}`: ln p(response | prompt) in nats, summed over the
response's tokens. Of responses sampled from `policy`, the mean of policy - initial estimates KL(policy || initial).
"""

from functools import partial
from pathlib import Path
from typing import Literal

from annotate_data.kept import kept
from annotate_data.work import Responses, check_output
from baton.ahead import will_be_made
from baton.arguments import StageArguments, option, parse
from baton.errors import InputError
from baton.jsonl import Record
from baton.launch.check import check_processes
from baton.models import loading
from baton.program import log_what_runs, run
from baton.sources import check_hub, check_hub_ahead, check_model_path, template_input
from baton.stage import Stage

IMPORTS = ("annotate_data.annotate", "annotate_data.causal_lm", "transformers.models.auto.modeling_auto")


class Arguments(StageArguments):
    dataset_name_or_path: str = option(..., "responses: a file or a Hugging Face dataset", changes_result=False)
    output_dir: Path = option(..., "the output FILE, such as data/logps.jsonl", changes_result=False)
    models: list[str] = option(..., "the models, each as NAME=PATH", changes_result=False, min_length=1)
    dataset_key: str | None = option(None, "key of the prompt (else `prompt` or `context_messages`)")
    chat_template: Path | None = option(None, "Jinja file, for models that have no chat template", changes_result=False)
    max_length: int | None = option(
        None,
        "tokens of prompt and response; a record with longer ones is dropped (default: the model's)",
        ge=8,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto: the checkpoint's own, float32 on a CPU without bfloat16"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run", changes_result=False)
    tokens_per_batch: int | None = option(
        None,
        "tokens in a batch (default: 65536 on a GPU, 8192 on CPU; where sequences are padded 8192 and 2048)",
        ge=1,
        changes_result=False,
    )


def main() -> None:
    arguments = parse(Arguments, __doc__)
    check_processes(on_cpu=arguments.device == "cpu")
    paths = models_by_name(arguments.models)
    check_output(arguments.output_dir)
    inputs = {
        "dataset": arguments.dataset_name_or_path,
        **{f"model {name}": path for name, path in paths.items()},
        **template_input(arguments.chat_template),
    }

    def read_responses() -> Responses:
        return Responses(arguments.dataset_name_or_path, arguments.dataset_key)

    check = None if will_be_made(arguments.dataset_name_or_path) else lambda stage: read_responses()
    stage = Stage.begin("logps", arguments, arguments.output_dir, inputs, check=check)
    if stage is None:
        for model in paths.values():
            check_hub_ahead(model, arguments.output_dir)
        return
    for model in paths.values():
        check_hub(model)
    responses = read_responses()

    from annotate_data.annotate import annotate
    from annotate_data.causal_lm import CausalLM
    from baton.models import devices

    device = devices.choose_device(arguments.device)

    settings = loading.Settings(arguments.dtype, arguments.max_length, arguments.tokens_per_batch, arguments.chat_template)

    def scorer(path: str) -> CausalLM:
        model = CausalLM(path, device, settings)
        log_what_runs(**devices.described(device), **loading.described(model.model))
        return model

    makers = {name: kept("logps", path, settings, arguments.device, partial(scorer, path)) for name, path in paths.items()}
    annotate(stage, responses, makers, add_logps)


def models_by_name(words: list[str]) -> dict[str, str]:
    """NAME=PATH arguments as {name: path}. Raises InputError for another form, a name given twice, or a missing model."""
    paths: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise InputError(f"--models {word}: expected NAME=PATH, such as policy=runs/a/round1/policy")
        if name in paths:
            raise InputError(f"--models: the name {name} is given twice")
        check_model_path(path)
        paths[name] = path
    return paths


def add_logps(record: Record, scores: dict[str, list[float]]) -> tuple[Record, dict[str, list[float]]]:
    """The record with its log-probabilities beside those of other models, and the same for the summary."""
    columns = {f"logps {name}": values for name, values in scores.items()}
    return {**record, "logps_by": {**record.get("logps_by", {}), **scores}}, columns


if __name__ == "__main__":
    run(main)
