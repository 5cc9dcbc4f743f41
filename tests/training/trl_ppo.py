"""What the PPO of TRL 1.12.0, the last release that has one, computes of one small batch: the numbers of `test_ppo_math.py`.

    python3.11 -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 trl==1.12.0
    PYTHONPATH=. /tmp/trl/bin/python tests/training/trl_ppo.py

Its trainer has no functions for the parts, so lines of its `train` are run as they are, on the tensors of `batch`.
"""

import inspect
import json
import runpy
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch

SETTINGS = {"kl_coef": 0.1, "gamma": 0.97, "lam": 0.9, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.5}


def batch():
    """Random log-probabilities and values (3, 5), the scores, and the responses' lengths."""
    generator = torch.Generator().manual_seed(0)
    names = ("logprobs", "ref_logprobs", "new_logprobs", "values", "vpred")
    tensors = {name: torch.randn(3, 5, generator=generator) * 0.5 - 1 for name in names}
    return {**tensors, "scores": torch.tensor([1.5, -0.5, 0.25]), "lengths": torch.tensor([5, 3, 2])}


def lines(first, last):
    """The lines of TRL's `train` between those that begin so."""
    from trl.experimental.ppo import PPOTrainer

    source = inspect.getsource(PPOTrainer.train).splitlines()
    begin, end = (next(i for i, line in enumerate(source) if line.strip().startswith(words)) for words in (first, last))
    return textwrap.dedent("\n".join(source[begin : end + 1]))


def run(text, names):
    """The variables after `text` has run with the variables `names`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lines.py")
        file.write_text(text, encoding="utf-8")
        return runpy.run_path(str(file), init_globals=names)


def numbers(kl_estimator):
    from trl.experimental.ppo import ppo_trainer

    args = SimpleNamespace(**SETTINGS, kl_estimator=kl_estimator, whiten_rewards=False)
    given = batch()
    names = {**vars(ppo_trainer), **given, "args": args, "responses": torch.zeros(3, 5)}
    names["sequence_lengths"] = given["lengths"] - 1  # TRL's are the index of the last token
    before = run(lines("response_idxs = ", "advantages = torch.masked_fill"), names)
    leaves = {name: given[name].clone().requires_grad_() for name in ("new_logprobs", "vpred")}
    names |= {name: before[name] for name in ("padding_mask", "padding_mask_p1")}
    names |= {f"mb_{name}": before[name] for name in ("logprobs", "values")}
    names |= {"mb_advantage": before["advantages"], "mb_return": before["returns"], "micro_batch_inds": slice(None), **leaves}
    names["new_logprobs"] = leaves["new_logprobs"].masked_fill(before["padding_mask"], ppo_trainer.INVALID_LOGPROB)
    after = run(lines("vpred = torch.masked_fill", "loss = pg_loss"), names)
    after["loss"].backward()
    made = {name: before[name] for name in ("kl", "rewards", "advantages", "returns")}
    made |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    made |= {name: after[name] for name in ("pg_loss", "vf_loss", "vf_clipfrac")}
    return {name: [round(x, 6) for x in tensor.flatten().tolist()] for name, tensor in made.items()}


if __name__ == "__main__":
    for kind in ("k1", "k3"):
        print(kind, json.dumps(numbers(kind), indent=1))
