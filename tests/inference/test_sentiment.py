"""The gold score of the relay on a real model."""

import pytest

from quickstart import sentiment


def gold(text):
    return sentiment.sentiment([], [text], [{}])[0]


def test_praise_scores_above_zero_blame_below_and_what_says_nothing_zero():
    assert gold("A wonderful film. I loved the music!") > 0.5 > 0 > gold("A dreadful film. I hated the ending.")
    assert gold("It opens on Friday.") == gold("") == gold("12 … \n --") == 0


def test_saying_the_same_again_or_adding_what_says_nothing_never_pays():
    praise = "The acting is superb."
    assert gold(f"{praise} {praise} {praise}") == pytest.approx(gold(praise))
    assert gold(f"{praise} It runs for two hours.") == pytest.approx(gold(praise) / 2)


def test_sentences_end_with_their_mark_or_their_line():
    text = 'A "fine" film!  It is slow.\n\n- The end? "Yes." ** Mr. X'
    assert sentiment.sentences(text) == ['A "fine" film!', "It is slow.", "- The end?", '"Yes.', "** Mr.", "X"]
