"""Steps of online training on made-up rollouts, in this process or in several, on CPU.

    online_processes.py FOLDER NAME

FOLDER holds `model/`, `reference/`, `critic/` and `records.json`. The environment says how the models are spread. Process 0
writes the metrics of two steps, the weights after them and the algorithm's state to `NAME.pt`.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from baton.models.attention import NAME
from baton.models.logps import gathered
from baton.online import setup
from baton.online.learner import Learner, optimizer_of
from baton.online.models import Models, load_actor, load_critic, weights_for_servers
from baton.online.samples import Samples
from baton.servers import own
from baton.training.export import tensors_of
from ppo.algorithm import Algorithm
from ppo.run_ppo import Arguments

TOKENS_PER_ROW = 60


def settings(**changes):
    """The arguments of run_ppo.py with their defaults, but for `changes`."""
    known = {"K": 3, "max_new_tokens": 12, "whiten_advantages": True, "kl_coef": 0.1, "seed": 1}
    return Arguments.model_construct(**known | changes)


def learner_of(folder: Path, critic: bool = True, optimizer=None, tokens_per_row: int = TOKENS_PER_ROW) -> Learner:
    """A learner of the models in `folder`, with steps of AdamW unless `optimizer` makes another one of them."""
    actor = load_actor(str(folder / "model"), torch.float32)
    models = Models(actor, load_critic(str(folder / "critic"), torch.float32, 0) if critic else None)
    made = (optimizer or (lambda of: optimizer_of(of, 1e-3, 2e-3)))(models)
    return Learner(models, made, Accelerator(cpu=True), lambda update, group: 1.0, tokens_per_row, 1.0)


def algorithm_of(folder: Path, learner: Learner, reference: str = "reference", **changes) -> Algorithm:
    reference = AutoModelForCausalLM.from_pretrained(folder / reference, dtype=torch.float32, attn_implementation=NAME)
    return Algorithm(settings(**changes), learner, reference)


def gloo_timeout() -> float:
    """Seconds that a process waits for the others."""
    group = torch.distributed.distributed_c10d._get_default_group()
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    records = json.loads((folder / "records.json").read_text())
    arguments = settings(
        model_name_or_path=str(folder / "model"), ref_model=str(folder / "reference"), prompts_per_update=3, num_ppo_epochs=2,
        kl_target=1.0, learning_rate=1e-3, tokens_per_row=TOKENS_PER_ROW, gradient_checkpointing=False,
    )  # fmt: skip
    config = setup.configuration(arguments, SimpleNamespace(partial_folder=folder / name))
    if config.deepspeed_plugin is not None:  # small weights are spread too
        config.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    accelerator = setup.accelerator_of(arguments, config, str(folder))
    if config.deepspeed_plugin is not None:  # under DDP on a CPU Transformers sets no time
        assert setup.WAIT_SECONDS == gloo_timeout() > own.START_SECONDS
    critic = str(folder / "critic")
    learner = setup.learner_of(arguments, config, accelerator, critic, total_updates=8, critic_learning_rate=2e-3)
    of_new_critic = load_critic(str(folder / "model"), torch.float32, 0)
    with gathered(of_new_critic.score.weight):
        assert not of_new_critic.score.weight.any(), "the head of a new critic is not of zeros"
    algorithm = Algorithm(arguments, learner, setup.reference_of(arguments, config))
    metrics = [algorithm.step(records, Samples.of(records), step) for step in (1, 2)]
    models = learner.models
    weights = dict(weights_for_servers(models.actor))
    weights |= {f"critic.{name}": tensor.detach() for name, tensor in tensors_of(models.critic)}
    if os.environ.get("RANK", "0") == "0":
        torch.save((metrics, weights, algorithm.state(), accelerator.distributed_type.value), folder / f"{name}.pt")


if __name__ == "__main__":
    main()
