"""The names, places and amounts that appear in the samples: all coined here, none meant to be real.

Both generators draw from these lists and from nowhere else, so a test can hold every capitalised word of the samples
against them. The words were put together from syllables; a likeness to a living person or a real firm is an accident.
"""

from __future__ import annotations

import re
from random import Random

PEOPLE: tuple[str, ...] = (
    "Brannica", "Corvelle", "Dessimar", "Elowind", "Fennara", "Garrovin", "Hespelle", "Ivorran", "Jorvelin", "Kestrina",
    "Lumarra", "Mirovan", "Nerisole", "Ostravel", "Pellimar", "Quorrin",
)  # fmt: skip

COMPANIES: tuple[str, ...] = (
    "Velthorn Mills", "Quorrimex Foods", "Tarnovell Freight", "Brimquade Tools", "Ostrumel Paper", "Halvendor Systems",
    "Zephrolin Energy", "Mirquade Optics", "Drellivar Homes", "Pondrake Marine", "Yastrelle Fabrics",
    "Culverax Robotics",
)  # fmt: skip

PLACES: tuple[str, ...] = (
    "Orlenzia", "Marrowick", "Tessamoor", "Vendrala", "Quellport", "Brasmund", "Illovar", "Sarnholt", "Dovrastein",
    "Kelmaria", "Pentrosa", "Wyldenau",
)  # fmt: skip
"""Invented towns and lands; each can stand after `the laws of` and after `in`."""

SHOP = "Quellbrook Outfitters"
BOATS: tuple[str, ...] = (
    "the Grey Gull", "the Little Lantern", "the Morning Rope", "the Blue Kettle", "the Patient Crab", "the Tin Whistle",
)  # fmt: skip

MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

ROLES: tuple[tuple[str, str], ...] = (
    ("the Supplier", "the Customer"), ("the Contractor", "the Client"), ("the Licensor", "the Licensee"),
    ("the Seller", "the Buyer"), ("the Consultant", "the Company"), ("the Landlord", "the Tenant"),
    ("the Agent", "the Principal"), ("the Provider", "the User"), ("the Carrier", "the Shipper"),
    ("the Designer", "the Publisher"),
)  # fmt: skip
"""Pairs of contract parties, by role."""

GOODS: tuple[str, ...] = (
    "machines", "fabrics", "pumps", "engines", "chairs", "lamps", "tools", "boats", "panels", "seeds", "printers",
    "vehicles",
)  # fmt: skip

DAYS: tuple[int, ...] = (5, 7, 10, 14, 15, 20, 21, 30, 45, 60, 90)
YEARS: tuple[str, ...] = ("two", "three", "four", "five", "six", "ten")
AMOUNTS: tuple[str, ...] = ("500", "750", "1,200", "2,500", "4,000", "8,000", "15,000", "20,000", "50,000", "90,000")


def fill(template: str, random: Random, roles: tuple[tuple[str, str], ...] = ROLES) -> str:
    """A template of one or more sentences with its slots filled and each sentence's first letter a capital.

    Slots: `{a}` and `{b}` (two parties, either way round; `{A}` and `{B}` with a capital), `{days}`, `{years}`,
    `{amount}`, `{place}`, `{goods}`, `{month}`, `{company}`, `{person}`.
    """
    pair = random.choice(roles)
    a, b = pair if random.random() < 0.5 else (pair[1], pair[0])
    text = template.format(
        a=a,
        b=b,
        A=a[0].upper() + a[1:],
        B=b[0].upper() + b[1:],
        days=random.choice(DAYS),
        years=random.choice(YEARS),
        amount=random.choice(AMOUNTS),
        place=random.choice(PLACES),
        goods=random.choice(GOODS),
        month=random.choice(MONTHS),
        company=random.choice(COMPANIES),
        person=random.choice(PEOPLE),
    )
    return re.sub(r"(^|[.]\s)([a-z])", lambda start: start[1] + start[2].upper(), text)
