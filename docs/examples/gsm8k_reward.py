"""A reward by rule: 1 where the last number of a response is the problem's answer, else 0.

    python annotate_data/get_rewards.py --scorer function:docs/examples/gsm8k_reward.py:gsm8k_reward \\
        --dataset_name_or_path data/gen_data.jsonl --output_dir data/data_with_rewards.jsonl

Each record carries the worked answer of GSM8K under `answer`, which ends with `#### NUMBER`; what a prompt record carries
besides its prompt passes through generation untouched.
"""

import re
from decimal import Decimal

NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, without thousands' commas and units, or None."""
    numbers = NUMBER.findall(text.replace("-$", "$-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def gsm8k_reward(prompts: list, responses: list[str], records: list[dict]) -> list[float]:
    """1.0 for each response that ends on the right number, else 0.0."""
    rewards = []
    for response, record in zip(responses, records, strict=True):
        answer = last_number(record["answer"].split("####")[-1])
        rewards.append(float(answer is not None and last_number(response) == answer))
    return rewards
