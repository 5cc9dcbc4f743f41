"""A reward by a rule, for tests of online training: a scorer `function:` of annotate_data."""


def even(prompts, responses, records):
    """The share of letters that come early in the alphabet."""
    return [sum("a" <= letter <= "m" for letter in text) / (len(text) + 1) for text in responses]
