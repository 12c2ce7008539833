"""Three tasks with a score, whose texts are made by rule from a seed: JSON of an order, SQL of a question, a word for a
request. The held-out examples have names, places, goods and phrases that no example to train on has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Examples = list[tuple[str, str]]  # a prompt and its answer, which ends with the line

NAMES = ["Anna", "Bruno", "Chloe", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "Jonas", "Karen", "Louis",
         "Maria", "Nadia", "Oscar", "Paula", "Quinn", "Ralph", "Sofia", "Thomas"]  # fmt: skip
CITIES = ["Oslo", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Lisbon", "Prague", "Athens", "Warsaw",
          "Boston", "Chicago", "Denver", "Seattle", "Toronto"]  # fmt: skip
GOODS = ["chair", "table", "lamp", "clock", "carpet", "mirror", "candle", "basket", "blanket", "pillow", "kettle",
         "bottle", "jacket", "bicycle", "camera", "guitar"]  # fmt: skip
ORDERS = [
    "{name} from {city} orders {count} {good}s.",
    "Please send {count} {good}s to {name} in {city}.",
    "{count} {good}s for {name}, to be delivered in {city}.",
    "We sold {count} {good}s to {name}, who lives in {city}.",
    "In {city}, {name} would like {count} {good}s.",
]
REQUESTS = {
    "billing": ["I was charged twice for {}", "The invoice for {} is wrong", "Please refund what I paid for {}",
                "Why is the price of {} on my bill so high", "My card was debited for {} too often",
                "I need a receipt of my payment for {}", "The discount on {} is missing from my invoice"],
    "delivery": ["When will {} arrive", "{} has not been shipped yet", "The courier left {} at the wrong door",
                 "Can you change the address of the parcel with {}", "The tracking of {} shows no progress",
                 "{} should have come yesterday", "The package with {} is lost in transit"],
    "returns": ["I want to send {} back", "{} does not fit, may I exchange it", "How do I return {}",
                "Please take {} back, it is the wrong colour", "I changed my mind and do not want to keep {}",
                "Can I swap {} for another size", "Where do I drop off {} that I am giving back"],
    "repair": ["{} stopped working", "{} is broken, can you fix it", "A part of {} came off after a week",
               "{} makes a strange noise", "How can I have {} mended under the warranty",
               "{} no longer turns on", "There is a crack in {}, please repair it"],
}  # fmt: skip
HELD_OUT = 4  # names, places and goods at the end of their lists; one of the phrases of every kind of request


@dataclass(frozen=True)
class Task:
    """A kind of text to answer.

    example   makes a prompt and its answer, for training or held out
    is_right  whether a text, which is cut at the end of the line, is the answer
    """

    name: str
    score: str
    example: Callable[[random.Random, bool], tuple[str, str]]
    is_right: Callable[[str, str], bool]

    @property
    def adapter(self) -> str:
        """Return the name of the adapter that learns it; "request" alone is a mode's name."""
        return f"to-{self.name}"

    def examples(self, count: int, held_out: bool, seed: int = 0) -> Examples:
        """Return different examples, the same ones for the same seed."""
        generator = random.Random(f"{self.name} {held_out} {seed}")
        found: dict[str, str] = {}
        while len(found) < count:
            found.update([self.example(generator, held_out)])
        return list(found.items())


def _one_of(generator: random.Random, words: Sequence[str], held_out: bool) -> str:
    return generator.choice(words[-HELD_OUT:] if held_out else words[:-HELD_OUT])


def _order(generator: random.Random, held_out: bool) -> tuple[str, str]:
    words = {
        "name": _one_of(generator, NAMES, held_out),
        "city": _one_of(generator, CITIES, held_out),
        "good": _one_of(generator, GOODS, held_out),
        "count": generator.randint(2, 99),
    }
    text = generator.choice(ORDERS).format(**words)
    return f"Order: {text}\nJSON with the keys name, city, good, count:", f" {json.dumps(words)}"


def _same_json(text: str, answer: str) -> bool:
    try:
        return bool(json.loads(text) == json.loads(answer))
    except ValueError:
        return False


def _question(generator: random.Random, held_out: bool) -> tuple[str, str]:
    good, city = _one_of(generator, GOODS, held_out), _one_of(generator, CITIES, held_out)
    year = generator.randint(2001, 2024)
    asked, column = generator.choice(
        [("How many {} were sold", "COUNT(*)"), ("What did the {} that were sold cost in all", "SUM(price)"),
         ("What was the highest price of {} that were sold", "MAX(price)"), ("Who bought {}", "buyer")]
    )  # fmt: skip
    where, condition = generator.choice([(f" in {city}", f" AND city = '{city}'"), ("", "")])
    when, period = generator.choice(
        [(f" since {year}", f" AND year >= {year}"), (f" before {year}", f" AND year < {year}"),
         (f" in {year}", f" AND year = {year}")]
    )  # fmt: skip
    text = f"{asked.format(f'{good}s')}{where}{when}?"
    sql = f" SELECT {column} FROM sales WHERE good = '{good}'{condition}{period};"  # noqa: S608  (it is never run)
    return f"Table sales(good, city, year, price, buyer). {text}\nSQL:", sql


def _same_words(text: str, answer: str) -> bool:
    return text.split() == answer.split()


def _request(generator: random.Random, held_out: bool) -> tuple[str, str]:
    kind = generator.choice(list(REQUESTS))
    phrase = generator.choice(REQUESTS[kind][-1:] if held_out else REQUESTS[kind][:-1])
    text = phrase.format(f"the {_one_of(generator, GOODS, held_out)}")
    opening = generator.choice(["", "Hello, ", "Good morning, ", "Dear team, ", "Hi there, "])
    text = f"{opening}{text}" if opening else f"{text[0].upper()}{text[1:]}"
    return f"Request: {text}.\nOne of {', '.join(REQUESTS)}:", f" {kind}"


TASKS = (
    Task("json", "JSON is equal", _order, _same_json),
    Task("sql", "SQL is equal", _question, _same_words),
    Task("request", "word is right", _request, _same_words),
)
