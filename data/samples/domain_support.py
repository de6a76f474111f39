"""Customer support of an invented mail-order shop: a system prompt and two or three turns on one matter."""

from __future__ import annotations

from random import Random

from invented import MONTHS, PEOPLE, SHOP

SYSTEM = (
    f"You are the support assistant of {SHOP}, a mail-order shop for outdoor gear. Be friendly and brief, "
    "ask for the order number when you need it, and never promise what the shop does not offer."
)
PRODUCTS = (
    "tent",
    "rucksack",
    "rain jacket",
    "sleeping bag",
    "camping stove",
    "head torch",
    "pair of boots",
    "hammock",
)
GREETINGS = ("Hello,", "Hi!", "Good morning,", "Good evening,", "Hello, this is {person}.")
THANKS = ("Thank you!", "Great, thanks.", "Perfect, that helps.", "Thanks for the quick answer.")
CLOSINGS = (
    "You are welcome. Have a good day!",
    "Gladly. Enjoy your {product}!",
    "You are welcome. Write again if anything comes up.",
    "My pleasure. Have a good time outdoors!",
)

Script = tuple[tuple[str, str], ...]
SCRIPTS: tuple[Script, ...] = (
    (
        (
            "my {product} has not arrived yet. Where is it?",
            "I am sorry for the wait. Could you give me the order number?",
        ),
        (
            "It is {order}.",
            "Thank you. Order {order} left our warehouse on {month} {day} and is with the carrier now. Deliveries "
            "take up to "
            "five working days; if it is not there by then, we send a new one.",
        ),
    ),
    (
        (
            "I would like to send my {product} back.",
            "No problem. May I have the order number, and is the {product} unused?",
        ),
        (
            "{order}, and yes, it is unused.",
            "Thank you. I have sent you a return label for order {order} by email. You have thirty days, and the "
            "refund comes "
            "within a week after the parcel has reached us.",
        ),
    ),
    (
        (
            "I cannot log in any more.",
            "Let us fix that. Please choose `Forgot password` on the login page. Does the email with the link arrive?",
        ),
        (
            "No, nothing has come.",
            "Then please look in the spam folder first. If it is not there, tell us the email address of the "
            "account, and we "
            "send the link again. We never ask for your password.",
        ),
    ),
    (
        (
            "the {product} I received is damaged.",
            "I am sorry about that! Please send me the order number and, if you can, a photo of the damage.",
        ),
        (
            "The number is {order}. The photo is attached.",
            "Thank you, the photo shows it well. Would you like a new {product} or your money back?",
        ),
        (
            "A new one, please.",
            "It is on its way tomorrow. You need not send the damaged {product} back.",
        ),
    ),
    (
        ("I got a {other} instead of the {product}.", "That was our mistake, I am sorry. What is the order number?"),
        (
            "{order}.",
            "Thank you. We send the {product} today, and a label for returning the {other} comes by email. You pay "
            "nothing for "
            "either.",
        ),
    ),
    (
        (
            "can I still change the address of my order?",
            "That works as long as the parcel has not been packed. What is the order number?",
        ),
        (
            "It is {order}.",
            "Order {order} has not been packed yet. Please reply with the new address, and I will enter it.",
        ),
    ),
    (
        ("I need an invoice for my {product}.", "Of course. Which order is it for?"),
        (
            "For order {order}.",
            "I have sent the invoice for {order} to the email address of your account. You also find it under `My "
            "orders`.",
        ),
    ),
    (
        (
            "how long is the guarantee on the {product}?",
            "Our {product}s carry a guarantee of two years. Is something wrong with yours?",
        ),
        (
            "Yes, a seam has opened after {weeks} weeks.",
            "That is covered. Please send me the order number and a photo, and we repair or replace it free of charge.",
        ),
    ),
    (
        ("I want to cancel my order.", "I can check whether that is still possible. What is the order number?"),
        (
            "{order}.",
            "It has not been sent yet, so I have cancelled order {order}. You get the full price back within five "
            "days.",
        ),
    ),
    (
        (
            "my discount code does not work.",
            "Let us see. Codes are valid until the date on the voucher and cannot be combined. What does the shop "
            "say when you "
            "enter it?",
        ),
        (
            "It says that the code has expired.",
            "Then it is past its date, and I cannot extend it. If you sign up for our newsletter, you receive a new"
            " code for "
            "your next order.",
        ),
    ),
    (
        (
            "is the {product} waterproof?",
            "It keeps out rain, but it is not made to lie in water. What do you want to use it for?",
        ),
        (
            "A walk of {weeks} days in {month}.",
            "For that it does well. I would add a light cover, so that nothing gets wet in long rain.",
        ),
    ),
    (
        (
            "my card was charged twice for the {product}.",
            "I am sorry, that should not happen. Could you give me the order number?",
        ),
        (
            "Sure, {order}.",
            "I see two payments for order {order}. The second one goes back to your card today; banks need up to "
            "three days to "
            "show it.",
        ),
    ),
    (
        (
            "the rucksack I ordered is too small. Can I swap it?",
            "Yes, within thirty days. Which order is it, and which size do you need?",
        ),
        (
            "Order {order}, and I need the large one.",
            "The large one is in stock and we send it tomorrow. Please use the return label in your email for the "
            "small one.",
        ),
    ),
    (
        (
            "when is the {product} in stock again?",
            "We expect new ones in {month}. Shall I send you an email when they arrive?",
        ),
        (
            "Yes, please.",
            "Done. You get an email as soon as it can be ordered. This does not reserve one for you, so it is good "
            "to be quick.",
        ),
    ),
)


def conversation(script: Script, random: Random) -> list[dict[str, str]]:
    """One talk along a script, in some cases with thanks at the end."""
    product, other = random.sample(PRODUCTS, 2)
    if product.startswith("pair"):
        product = "rain jacket" if other != "rain jacket" else "tent"
    slots = {
        "product": product,
        "other": other,
        "order": f"{random.choice('QBVT')}{random.randint(10000, 99999)}",
        "month": random.choice(MONTHS),
        "day": str(random.randint(1, 28)),
        "weeks": random.choice(("three", "four", "five", "six")),
        "person": random.choice(PEOPLE),
    }
    greeting = random.choice(GREETINGS)
    talk = [{"role": "system", "content": SYSTEM}]
    for number, (user, assistant) in enumerate(script):
        if number == 0:
            user = f"{greeting} {user if greeting.endswith(',') else user[0].upper() + user[1:]}"
        talk += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    if random.random() < 0.5:
        talk.append({"role": "user", "content": random.choice(THANKS)})
        talk.append({"role": "assistant", "content": random.choice(CLOSINGS)})
    return [{"role": turn["role"], "content": turn["content"].format(**slots)} for turn in talk]


def rows(random: Random, count: int = 200) -> list[dict[str, list[dict[str, str]]]]:
    """`count` different rows in the messages layout."""
    made: dict[str, list[dict[str, str]]] = {}
    turn = 0
    while len(made) < count:
        talk = conversation(SCRIPTS[turn % len(SCRIPTS)], random)
        made["\n".join(message["content"] for message in talk)] = talk
        turn += 1
    talks = list(made.values())
    random.shuffle(talks)
    return [{"messages": talk} for talk in talks]
