"""Small Python functions as prompt and completion; every docstring holds an example that is run first."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

NUMBERS = [3, -4, 8, 15, -1, 6, 10, 7]
KEEP: tuple[tuple[str, str, str], ...] = (
    ("even", "the even numbers", "n % 2 == 0"),
    ("odd", "the odd numbers", "n % 2 == 1"),
    ("positive", "the positive numbers", "n > 0"),
    ("negative", "the negative numbers", "n < 0"),
    ("large", "the numbers above five", "n > 5"),
    ("small", "the numbers of at most five", "n <= 5"),
)
FOLD: tuple[tuple[str, str, str, str], ...] = (
    ("sum", "the sum of", "int", "sum({0})"),
    ("count", "how many there are of", "int", "len([{0}])"),
    ("largest", "the largest of", "int", "max({0})"),
    ("smallest", "the smallest of", "int", "min({0})"),
    ("squares_of", "the squares of", "list[int]", "[n * n for n in [{0}]]"),
    ("sorted", "a sorted list of", "list[int]", "sorted({0})"),
)
WORDS: tuple[tuple[str, str, str, str], ...] = (
    ("shout", "the text in capitals with an exclamation mark", "str", 'text.upper() + "!"'),
    ("count_vowels", "the number of vowels in the text", "int", 'sum(c in "aeiou" for c in text.lower())'),
    ("reverse_words", "the text with its words in reverse order", "str", '" ".join(reversed(text.split()))'),
    ("longest_word", "the longest word of the text", "str", "max(text.split(), key=len)"),
    ("initials", "the first letters of the words in capitals", "str", '"".join(w[0] for w in text.split()).upper()'),
    ("word_lengths", "the length of each word", "list[int]", "[len(w) for w in text.split()]"),
    ("is_palindrome", "whether the text reads the same backwards", "bool", "text == text[::-1]"),
    ("unique_letters", "the different letters of the text in order", "str", '"".join(sorted(set(text) - {" "}))'),
    ("first_word", "the first word of the text", "str", "text.split()[0]"),
    ("snake_case", "the text with underscores between its words", "str", '"_".join(text.lower().split())'),
    ("without_spaces", "the text without its spaces", "str", 'text.replace(" ", "")'),
    ("capitalise", "the text with a capital at its start", "str", "text.capitalize()"),
)
TEXTS = ("seven small boats", "the old mill wheel", "level")
UNITS: tuple[tuple[str, str, float], ...] = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("hours", "minutes", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("dozens", "pieces", 12),
    ("minutes", "seconds", 60),
    ("tonnes", "kilograms", 1000),
)
PAIRS: tuple[tuple[str, str, str, str], ...] = (
    ("invert", "a dictionary with keys and values swapped", "dict[int, str]", "{v: k for k, v in prices.items()}"),
    ("total", "the sum of all values", "int", "sum(prices.values())"),
    ("cheapest", "the key with the smallest value", "str", "min(prices, key=lambda k: prices[k])"),
    ("dearest", "the key with the largest value", "str", "max(prices, key=lambda k: prices[k])"),
    ("names_by_price", "the keys in order of their values", "list[str]", "sorted(prices, key=lambda k: prices[k])"),
    (
        "doubled",
        "a dictionary in which each value is twice as large",
        "dict[str, int]",
        "{k: 2 * v for k, v in prices.items()}",
    ),
    ("mean_price", "the mean of the values", "float", "sum(prices.values()) / len(prices)"),
    ("long_names", "the keys of more than four letters", "list[str]", "[k for k in prices if len(k) > 4]"),
)
TABLES = ("{'rope': 12, 'lamp': 30, 'anchor': 96}", "{'bread': 4, 'cheese': 9, 'pear': 2}")
SERIES: tuple[tuple[str, str, str, str], ...] = (
    ("triangular", "the n-th triangular number", "int", "return n * (n + 1) // 2"),
    (
        "factorial",
        "the product of the numbers from 1 to n",
        "int",
        "result = 1\n    for k in range(2, n + 1):\n        result *= k\n    return result",
    ),
    (
        "rabbits",
        "the n-th number of the series 0, 1, 1, 2, 3, 5, in which two neighbours sum to the next",
        "int",
        "a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    ),
    ("digit_sum", "the sum of the digits of n", "int", "return sum(int(digit) for digit in str(n))"),
    ("divisors", "all divisors of n", "list[int]", "return [k for k in range(1, n + 1) if n % k == 0]"),
    (
        "is_prime",
        "whether n is a prime number",
        "bool",
        "return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))",
    ),
    ("countdown", "the numbers from n down to 0", "list[int]", "return list(range(n, -1, -1))"),
    ("binary", "n written in binary digits", "str", 'return format(n, "b")'),
    (
        "steps_to_one",
        "how many steps lead to 1, halving even numbers and turning odd n into 3n + 1",
        "int",
        "steps = 0\n    while n != 1:\n        n = n // 2 if n % 2 == 0 else 3 * n + 1\n        steps += 1\n    "
        "return steps",
    ),
    (
        "squares_up_to",
        "all square numbers of at most n",
        "list[int]",
        "return [k * k for k in range(1, n + 1) if k * k <= n]",
    ),
)
ASKS = (
    "Write a Python function `{name}` that returns {what}.",
    "In Python, define `{name}`. It should return {what}.",
    "I need a Python function called `{name}` which returns {what}. Please add a docstring with an example.",
)


def _function(head: str, what: str, body: str, call: str) -> str:
    """The source of one function, its docstring's example filled in by running it."""
    space: dict[str, object] = {}
    exec(f"{head}\n    {body}\n", space)
    result = repr(eval(call, space))
    return f'{head}\n    """Return {what}.\n\n    >>> {call}\n    {result}\n    """\n    {body}\n'


def functions() -> Iterator[tuple[str, str, str]]:
    """Name, purpose and source of every function that the families below can make."""
    for keep, which, test in KEEP:
        for fold, what, kind, form in FOLD:
            name, purpose = f"{fold}_{keep}", f"{what} {which} in a list"
            body = "return " + form.format(f"n for n in numbers if {test}")
            yield (
                name,
                purpose,
                _function(f"def {name}(numbers: list[int]) -> {kind}:", purpose, body, f"{name}({NUMBERS})"),
            )
    for name, purpose, kind, form in WORDS:
        for text in TEXTS[:2] if name != "is_palindrome" else TEXTS[1:]:
            yield (
                name,
                purpose,
                _function(f"def {name}(text: str) -> {kind}:", purpose, f"return {form}", f"{name}({text!r})"),
            )
    for big, little, factor in UNITS:
        for name, purpose, body in (
            (f"{big}_to_{little}", f"the number of {little} in some {big}", f"return {big} * {factor}"),
            (f"{little}_to_{big}", f"the number of {big} in some {little}", f"return {little} / {factor}"),
        ):
            unit = name.split("_to_")[0]
            yield (
                name,
                purpose,
                _function(
                    f"def {name}({unit}: float) -> float:",
                    purpose,
                    body,
                    f"{name}({6 * factor if unit == little else 6})",
                ),
            )
    for name, purpose, kind, form in PAIRS:
        for table in TABLES:
            yield (
                name,
                purpose,
                _function(
                    f"def {name}(prices: dict[str, int]) -> {kind}:", purpose, f"return {form}", f"{name}({table})"
                ),
            )
    for name, purpose, kind, body in SERIES:
        for number in (6, 13):
            yield name, purpose, _function(f"def {name}(n: int) -> {kind}:", purpose, body, f"{name}({number})")


def rows(random: Random, count: int = 150) -> list[dict[str, str]]:
    """`count` different rows with the columns `prompt` and `completion`."""
    made: dict[tuple[str, str], None] = {}
    known = list(functions())
    random.shuffle(known)
    turn = 0
    while len(made) < count:
        name, what, source = known[turn % len(known)]
        made[random.choice(ASKS).format(name=name, what=what), source] = None
        turn += 1
    return [{"prompt": prompt, "completion": completion} for prompt, completion in made]
