"""Steps of PPOTrainer of TRL 1.12.0, the last release that has one, as its documentation starts it: seconds of each.

It needs an environment of its own, which `ppo.py --trl_ppo_python /tmp/trl112/bin/python` names (torch first: trl would bring
the newest one):

    python3.11 -m venv /tmp/trl112
    /tmp/trl112/bin/pip install torch==2.13.0 && /tmp/trl112/bin/pip install trl==1.12.0 transformers==5.24.0

`trl_ppo.py FILE` reads JSON: `model`, `prompts` (lists of token ids), `K`, `tokens`, `steps`, `device`, `output`. Transformers
generate in the trainer's process, `tokens` for each sample. The reward model has one small layer, so that its score costs
about as little as a rule does.
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(given["model"], padding_side="left")
    rows = [{"input_ids": ids} for ids in given["prompts"] for _ in range(given["K"])]
    policy, reference = (AutoModelForCausalLM.from_pretrained(given["model"], dtype="float32") for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(given["model"], num_labels=1, dtype="float32")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_labels": 1}
    reward = AutoModelForSequenceClassification.from_config(
        LlamaConfig(vocab_size=policy.config.vocab_size, pad_token_id=tokenizer.pad_token_id, **small)
    )
    config = PPOConfig(
        given["output"], per_device_train_batch_size=len(rows), local_rollout_forward_batch_size=len(rows),
        total_episodes=given["steps"] * len(rows), response_length=given["tokens"], temperature=1.0, num_ppo_epochs=1,
        kl_coef=0.01, learning_rate=1e-6, num_sample_generations=0, gradient_checkpointing=False, bf16=False,
        use_cpu=given["device"] == "cpu", report_to="none", save_strategy="no", logging_steps=1000, disable_tqdm=True,
    )  # fmt: skip
    clock = Clock()
    trainer = PPOTrainer(
        config, tokenizer, policy, reference, reward, Dataset.from_list(rows), value,
        eval_dataset=Dataset.from_list(rows[:1]), callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    print(json.dumps({"seconds": statistics.median(after - before for before, after in itertools.pairwise(clock.ends))}))


if __name__ == "__main__":
    main()
