"""Small finance tasks with a checkable answer: headline sentiment, ratios, changes, terms, sorting of expenses."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from invented import COMPANIES, MONTHS

Row = dict[str, str]

HEADLINES: dict[str, tuple[str, ...]] = {
    "positive": (
        "{company} raises its forecast after a strong {month}",
        "Record orders fill the books of {company}",
        "{company} pays off its last loan two years early",
        "Profit of {company} climbs {percent} percent as costs fall",
        "{company} wins its largest contract so far",
        "Customers return to {company}: sales up {percent} percent",
    ),
    "negative": (
        "{company} warns of a loss in {month}",
        "Factory fire halts production at {company}",
        "{company} loses its main customer",
        "Sales of {company} drop {percent} percent as demand weakens",
        "{company} cuts its dividend to save cash",
        "Lenders lose patience with {company}",
    ),
    "neutral": (
        "{company} will publish its results in {month}",
        "{company} moves its yearly meeting to {month}",
        "Turnover of {company} unchanged from last year",
        "{company} confirms its forecast",
        "{company} names a new auditor",
        "{company} keeps its number of shops at {percent}",
    ),
}

TERMS: dict[str, str] = {
    "liquidity": "Liquidity is how easily somebody can pay what is due. Cash is the most liquid thing a firm can own.",
    "dividend": "A dividend is the part of a company's profit that it pays out to its shareholders.",
    "depreciation": "Depreciation spreads the cost of a thing that wears out over the years in which it is used.",
    "working capital": "Working capital is current assets minus current liabilities: the money that keeps daily "
    "business going.",
    "gross margin": "Gross margin is revenue minus the cost of the goods sold, given as a share of revenue.",
    "inflation": "Inflation is a general rise of prices, so that the same sum of money buys less than before.",
    "bond": "A bond is a loan cut into pieces that can be traded. Its holder receives interest and, at the end, "
    "the sum lent.",
    "diversification": "Diversification means spreading money over different investments, so that one loss hurts less.",
    "cash flow": "Cash flow is the money that comes in and goes out during a period, whatever the books call it.",
    "interest": "Interest is the price of borrowed money, given as a percentage of the sum for a year.",
    "collateral": "Collateral is something of value that a lender may sell if a loan is not paid back.",
    "break-even point": "The break-even point is the amount of sales at which income covers all costs, with no "
    "profit and no loss.",
    "equity": "Equity is what belongs to the owners: all assets minus all debts.",
    "audit": "An audit is an independent check of whether a company's accounts give a true picture.",
    "budget": "A budget is a plan of what will come in and what may be spent during a period.",
}  # fmt: skip

EXPENSES: dict[str, tuple[str, ...]] = {
    "travel": ("train ticket", "hotel night", "taxi ride", "ferry fare"),
    "office": ("printer paper", "desk lamp", "pens and folders", "office chair"),
    "utilities": ("electricity bill", "water bill", "heating", "internet line"),
    "training": ("language course", "safety seminar", "textbook", "exam fee"),
}


def sentiment(random: Random) -> Row:
    """Classify an invented headline."""
    label = random.choice(list(HEADLINES))
    headline = random.choice(HEADLINES[label]).format(
        company=random.choice(COMPANIES), month=random.choice(MONTHS), percent=random.randint(4, 38)
    )
    return {
        "instruction": "Classify the sentiment of the headline as positive, negative or neutral.",
        "input": headline,
        "output": label,
    }


def ratio(random: Random) -> Row:
    """A ratio with round numbers, worked out in one line."""
    name, upper, lower = random.choice(
        (
            ("current ratio", "Current assets", "Current liabilities"),
            ("debt-to-equity ratio", "Total debt", "Equity"),
            ("price-to-earnings ratio", "Share price", "Earnings per share"),
        )
    )
    below, quotient = random.randrange(20, 400, 20), random.choice((0.5, 0.75, 1.2, 1.5, 1.8, 2.0, 2.5, 3.0, 8.0, 12.5))
    above = below * quotient
    return {
        "instruction": f"Compute the {name}.",
        "input": f"{upper}: {above:g} crowns. {lower}: {below} crowns.",
        "output": f"{above:g} / {below} = {quotient:g}. The {name} is {quotient:g}.",
    }


def change(random: Random) -> Row:
    """The change between two amounts in percent."""
    before, percent = random.randrange(200, 4000, 100), random.choice([n for n in range(-40, 65, 5) if n])
    after = before + before * percent // 100
    word = "rose" if percent > 0 else "fell"
    return {
        "instruction": "By how many percent did the figure change? Answer in one sentence.",
        "input": f"Revenue of {random.choice(COMPANIES)} last year: {before} crowns. This year: {after} crowns.",
        "output": f"Revenue {word} by {abs(percent)} percent, from {before} to {after} crowns.",
    }


def margin(random: Random) -> Row:
    """A gross margin in percent."""
    revenue, percent = random.randrange(1000, 9000, 200), random.randrange(10, 75, 5)
    cost = revenue - revenue * percent // 100
    return {
        "instruction": "Work out the gross margin in percent.",
        "input": f"Revenue: {revenue} crowns. Cost of goods sold: {cost} crowns.",
        "output": f"({revenue} - {cost}) / {revenue} = {percent / 100:g}. The gross margin is {percent} percent.",
    }


def interest(random: Random) -> Row:
    """Simple interest over some years."""
    principal, rate, years = random.randrange(500, 9000, 500), random.randint(2, 9), random.randint(2, 8)
    earned = principal * rate * years // 100
    return {
        "instruction": "Compute the simple interest.",
        "input": f"Principal: {principal} crowns. Rate: {rate} percent a year. Time: {years} years.",
        "output": f"{principal} x {rate} / 100 x {years} = {earned}. The interest is {earned} crowns.",
    }


def term(random: Random) -> Row:
    """Explain a word; the input column stays empty, as it may in this layout."""
    word = random.choice(list(TERMS))
    ask = random.choice(("Explain the term {0} in plain words.", "What does {0} mean in finance?"))
    return {"instruction": ask.format(word), "input": "", "output": TERMS[word]}


def expense(random: Random) -> Row:
    """Sort an expense into its category."""
    category = random.choice(list(EXPENSES))
    thing, amount = random.choice(EXPENSES[category]), random.randrange(5, 400, 5)
    return {
        "instruction": f"Sort the expense into one category: {', '.join(EXPENSES)}.",
        "input": f"{thing}, {amount} crowns, {random.choice(MONTHS)}",
        "output": category,
    }


WRITERS: tuple[Callable[[Random], Row], ...] = (
    sentiment,
    sentiment,
    ratio,
    change,
    margin,
    interest,
    term,
    expense,
)


def rows(random: Random, count: int = 200) -> list[Row]:
    """`count` different rows with the columns `instruction`, `input` and `output`."""
    made: dict[tuple[str, str], Row] = {}
    turn = 0
    while len(made) < count:
        row = WRITERS[turn % len(WRITERS)](random)
        made[row["instruction"], row["input"]] = row
        turn += 1
    shuffled = list(made.values())
    random.shuffle(shuffled)
    return shuffled
