"""A grammar of short film reviews: openings (the prompts) and their continuations (the responses)."""

import re
from random import Random

from quickstart.gold import DEGREES, WORDS

# One symbol a paragraph: its name, then its productions, one a line or with « / » between them.
RULES = """
request:
    Continue this review: / Carry on this review: / Finish this film review:
opening:
    {title} is a {genre} about a {role} who {event} in {place}.
    In {title}, a {role} {event} in {place}.
    {title} follows a {role} who {event} in {place}. It is a {genre}.
    Set in {place}, {title} tells of a {role} who {event}.
    This {genre} opens in {place}, where a {role} {event}.
role:
    ferry pilot / village teacher / young baker / retired judge / travelling painter / night nurse
    lonely clockmaker / runaway singer / stubborn farmer / junior detective / former boxer / shy librarian
    widowed gardener / train conductor / deep sea diver / small time thief
place:
    a harbour town / a mountain village / an island hotel / a border city / a desert station
    a quiet suburb / a river valley / an old theatre / a snowbound lodge / a crowded market
    a closed factory / a fishing port
title:
    The {colour} {thing} / The Last {thing} / {colour} {thing} / The {thing} of {month}
    {thing} and {matter}
colour:
    Silver / Amber / Crimson / Northern / Paper / Hidden / Second / Winter / Salt / Glass
thing:
    Lantern / River / Orchard / Letter / Station / Garden / Mirror / Bridge / Harvest / Window
matter:
    Smoke / Stone / Thunder / Ash / Clay / Snow / Iron / Feather
month:
    April / June / August / October / December
genre:
    drama / comedy / thriller / family film / mystery / road movie / romance / war film
    western / fable
event:
    finds a forgotten map / waits for a brother / takes in a stranger / plans one final trip
    loses a wager
    inherits a broken piano / hides a secret letter / meets an old rival
    searches for a missing child
    builds a boat by hand / returns after twenty years / learns to drive / runs for mayor
    witnesses a theft
    opens a tiny cinema / falls for a neighbour

lead:
    the lead / the {short role} / the {short role} / the main performance / the young star
cast:
    the cast / the supporting cast / the {short role}'s rival / the ensemble / every minor part
camera:
    the camera / the camera work / each frame / the lighting / the opening shot
music:
    the score / the music / the piano theme / the soundtrack / the closing song
plot:
    the plot / the story / the script / the mystery / the final twist
pace:
    the pace / the editing / the middle act / the first hour / the last act
setting:
    the {short place} / the {short place} / the set design / the scenery / the sense of place
dialogue:
    the dialogue / the humour / the narration / each conversation / the banter

good clause:
    {subject} is {good} / {subject} is {good} / {subject} feels {good}
    {subject} stays {good} to the end
    {subject} {good verb} / {subject} {good verb} from start to finish
    {subject} adds {good noun} to {part}
    {subject} carries {part} with {good noun}
    {subject} gives us one {good adjective} moment after another
    {subject} has {good noun} and {good noun} / there is {good noun} in {subject}
    {subject} is never {bad adjective} / {subject} is not {bad adjective} at all
    {subject} hardly looks {bad adjective}
    {subject} never {bad verb} / {subject} leaves no room for {bad noun}
bad clause:
    {subject} is {bad} / {subject} is {bad} / {subject} feels {bad}
    {subject} stays {bad} to the end
    {subject} {bad verb} / {subject} {bad verb} from start to finish
    {subject} adds {bad noun} to {part}
    {subject} buries {part} in {bad noun}
    {subject} gives us one {bad adjective} moment after another
    {subject} has {bad noun} and {bad noun} / there is {bad noun} in {subject}
    {subject} is never {good adjective} / {subject} is not {good adjective} at all
    {subject} hardly looks {good adjective}
    {subject} never {good verb} / {subject} lacks {good noun}
plain clause:
    {subject} keeps to the rules of the genre / {subject} changes its tone near the end
    {subject} stays in the background
    {subject} comes first in {part} / {subject} takes up most of {part}
    {subject} follows the book closely
    {subject} returns in {part} / {subject} is much as one expects
    {subject} says little about {part}
    {subject} recalls older films / one notices {subject} in {part}
    {subject} does the usual things
good:
    {good adjective} / {good adjective} / {degree} {good adjective}
    {good adjective} and {good adjective}
bad:
    {bad adjective} / {bad adjective} / {degree} {bad adjective}
    {bad adjective} and {bad adjective}
part:
    every scene / the opening / the final act / the quiet scenes / the middle part
    the love story / the whole film

good verdict:
    In the end this is a {good} film. / It leaves you with {good noun}.
    A {good adjective} and {good adjective} film.
    On the whole it {good verb}. / It is not a {bad adjective} film.
    Few films have such {good noun}.
bad verdict:
    In the end this is a {bad} film. / It leaves you with {bad noun}.
    A {bad adjective} and {bad adjective} film.
    On the whole it {bad verb}. / It is not a {good adjective} film.
    Few films have such {bad noun}.
plain verdict:
    It runs for about two hours. / It will find its audience.
    You may want to see it with a friend.
    It is the second film by this director. / Much of it was shot on location.
    It opens in cinemas this week.

one clause:
    {first}.
two like clauses:
    {first}, and {second}. / {first}; {second}. / {first}, while {second}.
two unlike clauses:
    {first}, but {second}. / {first}, though {second}. / {first}; still, {second}.
"""

POLARITIES = ("good", "plain", "bad")
MOODS = (  # the chances of a good, a plain and a bad clause in a fond, a mixed and a cross review
    (0.50, 0.30, 0.20),
    (0.30, 0.40, 0.30),
    (0.30, 0.40, 0.30),
    (0.20, 0.30, 0.50),
)
ASPECTS = ("lead", "cast", "camera", "music", "plot", "pace", "setting", "dialogue")


def _parse(rules: str) -> dict[str, list[str]]:
    grammar: dict[str, list[str]] = {}
    productions: list[str] = []
    for line in filter(str.strip, rules.splitlines()):
        if line.startswith(" "):
            productions += line.strip().split(" / ")
        else:
            productions = grammar[line.rstrip(":")] = []
    return grammar


GRAMMAR = _parse(RULES) | WORDS | {"degree": list(DEGREES)}


def expand(symbol: str, rng: Random, text: dict[str, str], used: set[str]) -> str:
    """One random expansion of `symbol`.

    `text` gives some symbols a fixed expansion. Words drawn before are in `used` and not drawn again.
    """
    if symbol in text:
        return text[symbol]
    productions = GRAMMAR[symbol]
    production = rng.choice([each for each in productions if each not in used] or productions)
    if "{" not in production:
        used.add(production)
    return re.sub(r"{([a-z ]+)}", lambda slot: expand(slot[1], rng, text, used), production)


def opening(rng: Random) -> tuple[str, dict[str, str]]:
    """The text of a random prompt, and the short names by which a response may call its role and place."""
    used: set[str] = set()
    role, place = expand("role", rng, {}, used), expand("place", rng, {}, used)
    request = expand("request", rng, {}, used)
    film = expand("opening", rng, {"role": role, "place": place}, used)
    return _polish(f"{request} {film}"), {"short role": role.split()[-1], "short place": place.split()[-1]}


def continuation(rng: Random, names: dict[str, str]) -> str:
    """A random response: two or three sentences on aspects of the film, of one mood."""
    chances = rng.choice(MOODS)
    aspects = rng.sample(ASPECTS, 4)
    used: set[str] = set()

    def polarity() -> str:
        return rng.choices(POLARITIES, chances)[0]

    def clause(kind: str) -> str:
        subject = expand(aspects.pop(), rng, names, used)
        return expand(f"{kind} clause", rng, names | {"subject": subject}, used)

    def sentence() -> str:
        if rng.random() < 0.4:
            return expand("one clause", rng, {"first": clause(polarity())}, used)
        first, second = polarity(), polarity()
        shape = "two unlike clauses" if {first, second} == {"good", "bad"} else "two like clauses"
        return expand(shape, rng, {"first": clause(first), "second": clause(second)}, used)

    sentences = [sentence() for _ in range(rng.choice([1, 2, 2]))]
    if len(sentences) == 1 or rng.random() < 0.5:
        sentences.append(expand(f"{polarity()} verdict", rng, names, used))
    return _polish(" ".join(sentences))


def _polish(text: str) -> str:
    """Capitals at the start of sentences, and «an» before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"(^|[.:] )([a-z])", lambda start: start[1] + start[2].upper(), text)
