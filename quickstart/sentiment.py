"""The gold score of a real model's film reviews: how favourable the words are, by the public lexicon VADER.

    python annotate_data/get_rewards.py --scorer gold=function:quickstart/sentiment.py:sentiment …

The reward model's labels and evaluation use it; the rounds learn from the reward model alone. Source: Hutto and Gilbert,
«VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text», ICWSM 2014; vaderSentiment, MIT licence.
"""

import re
from functools import cache
from typing import Any


def sentiment(prompts: list, responses: list[str], records: list[dict]) -> list[float]:
    """How favourable each response is, in [-1, 1]: the mean of VADER's `compound` over its sentences, 0 for an empty text.

    `compound` of a whole text grows with its number of words of praise, and is near 1 after a few sentences. The mean over
    sentences, which VADER's authors recommend for longer texts, does not reward length.
    """
    return [mean_over_sentences(response) for response in responses]


def mean_over_sentences(text: str) -> float:
    scores = [analyzer().polarity_scores(sentence)["compound"] for sentence in sentences(text)]
    return sum(scores) / len(scores) if scores else 0.0


def sentences(text: str) -> list[str]:
    """The sentences of a text, those without a letter left out."""
    parts = re.split(r"(?<=[.!?])[\"'”’)]*\s+|\n+", text)
    return [part.strip() for part in parts if re.search(r"[^\W\d_]", part)]


@cache
def analyzer() -> Any:
    """VADER with its lexicon, which takes a moment to read."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
