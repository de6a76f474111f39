"""Running text for continued pre-training: the logbook of an invented boatyard, with terms of its own."""

from __future__ import annotations

from random import Random

from invented import BOATS, MONTHS, PEOPLE, PLACES

WEATHER = (
    "Fog until noon, then a clear sky with a light wind from the east.",
    "Rain all day, so the doors of the shed stayed closed.",
    "Frost on the slipway; we spread sand before we began.",
    "A warm day, good for varnish.",
    "Strong wind from the sea, and the flags stood like boards.",
    "Still air and low clouds.",
)
WORK = (
    "{person} took out the third plank on the port side of {boat} and found the rib behind it sound.",
    "We steamed two oak strips for the rail of {boat}; one of them cracked at the bend and goes into the stove.",
    "{boat} came up the slip at high water, with the keel on the middle blocks.",
    "{person} caulked the seams of {boat} from the bow to the mast, {number} metres in all.",
    "The engine of {boat} starts again since {person} cleaned the fuel line and changed the filter.",
    "New paint for {boat}: one coat of primer below the waterline, and two coats of grey above it.",
    "{person} checked the rudder bolts of {boat} and replaced {number} of them.",
    "The mast of {boat} lies on the trestles, and {person} is scraping off the old varnish.",
    "We bailed {boat} in the morning and found a leak at the stern tube, about {number} cups in an hour.",
)
STORES = (
    "In the store: {number} planks of larch, a full drum of tar, too few copper nails.",
    "The sawmill in {place} will deliver larch in {month}.",
    "{person} ordered {number} metres of hemp rope from {place}.",
    "The band saw needs a new blade before we cut the next frames.",
    "Somebody has taken the small plane; it is to be back on its hook by the evening.",
)
LESSONS = (
    "Note for the apprentices: oak wants to be steamed for an hour for each thumb of thickness.",
    "Note for the apprentices: measure the gap at both ends before you cut, because no plank is straight.",
    "Note for the apprentices: varnish goes on in thin coats, and each coat waits for the one before.",
    "Note for the apprentices: a boat is lifted slowly and by one voice only.",
    "Note for the apprentices: tar keeps water out, but only where the wood was dry.",
    "Note for the apprentices: whoever uses a tool last sharpens it first.",
)
PLANS = (
    "Tomorrow {boat} goes back into the water if the tide allows it.",
    "The owner of {boat} comes on the {number}th to look at the deck.",
    "Next week we begin with the frames of the new rowing boat for {place}.",
    "{person} will show the apprentices how to make a scarf joint.",
    "We close early on Friday to clean the shed.",
)


def note(random: Random) -> str:
    """One day in the logbook, five to eight sentences."""
    boat, person, helper = random.choice(BOATS), *random.sample(PEOPLE, 2)
    parts = [
        random.choice(WEATHER),
        *random.sample(WORK, random.randint(2, 3)),
        *random.sample(STORES, random.randint(1, 2)),
        random.choice(LESSONS),
        random.choice(PLANS),
    ]
    sentences = [
        part.format(
            boat=boat,
            person=random.choice((person, helper)),
            place=random.choice(PLACES),
            month=random.choice(MONTHS),
            number=random.randint(4, 19),
        )
        for part in parts
    ]
    text = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    return f"{random.choice(MONTHS)} {random.randint(1, 28)}. {text}"


def rows(random: Random, count: int = 100) -> list[dict[str, str]]:
    """`count` different rows with the column `text`."""
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[note(random)] = None
    return [{"text": text} for text in texts]
