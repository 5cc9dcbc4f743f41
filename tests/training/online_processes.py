"""Steps of online training on made-up rollouts, in this process or in several, which torchrun starts, on CPU.

    torchrun --nproc_per_node N online_processes.py FOLDER

FOLDER holds `model/`, `critic/` and `records.json`. Process 0 writes the metrics of two steps and the weights after them to
`steps-N.pt`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from baton.models.attention import NAME
from baton.online.learner import Learner, optimizer_of
from baton.online.models import Models, load_actor, load_critic
from baton.online.samples import Samples
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


def algorithm_of(folder: Path, learner: Learner, **changes) -> Algorithm:
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32, attn_implementation=NAME)
    return Algorithm(settings(**changes), learner, reference)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    records = json.loads((folder / "records.json").read_text())
    learner = learner_of(folder)
    algorithm = algorithm_of(folder, learner, prompts_per_update=3, num_ppo_epochs=2, kl_target=1.0)
    metrics = [algorithm.step(records, Samples.of(records), step) for step in (1, 2)]
    weights = {name: weight.detach() for name, weight in learner.models.named_parameters()}
    if os.environ.get("RANK", "0") == "0":
        torch.save((metrics, weights, algorithm.state()), folder / f"steps-{os.environ.get('WORLD_SIZE', '1')}.pt")


if __name__ == "__main__":
    main()
