"""General patient education as short conversations: everyday health, said with care, and when to ask a professional."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from random import Random

from invented import PEOPLE


@dataclass(frozen=True)
class Topic:
    """One subject: how people ask about it, what helps, and when it needs more than advice."""

    asks: tuple[str, ...]
    opening: str
    advice: tuple[str, ...]
    caution: str


TOPICS: tuple[Topic, ...] = (
    Topic(
        ("How can I sleep better?", "I lie awake for a long time at night. What could help?"),
        "Good sleep mostly comes from steady habits.",
        (
            "Go to bed and get up at about the same time, on free days too.",
            "Keep the bedroom dark, quiet and rather cool.",
            "Avoid coffee and strong tea from the afternoon on.",
            "Put screens away for the last hour of the day.",
        ),
        "If poor sleep lasts longer than a few weeks or makes your days hard, talk to your doctor.",
    ),
    Topic(
        ("I have a cold. What can I do?", "How do I get through a common cold?"),
        "A common cold usually passes on its own within a week or two.",
        (
            "Rest, and give yourself a few quiet days.",
            "Drink enough, for instance water or warm herbal tea.",
            "Cough into your elbow and wash your hands often, so that others stay well.",
            "Let fresh air into the room from time to time.",
        ),
        "See a doctor if you have trouble breathing, a high fever, or if you feel worse again after getting better.",
    ),
    Topic(
        ("How much water should I drink?", "How do I know whether I drink enough?"),
        "Most healthy adults do well when they drink through the day and follow their thirst.",
        (
            "Pale yellow urine is a good sign that you drink enough.",
            "Drink more when it is hot and when you exercise.",
            "Water and unsweetened tea are good choices.",
            "A glass of water with each meal is an easy habit.",
        ),
        "If you have a heart or kidney condition, ask your doctor how much is right for you.",
    ),
    Topic(
        ("How should I wash my hands?", "What is the right way to wash hands?"),
        "Careful hand washing is one of the simplest ways to avoid infections.",
        (
            "Use soap and rub for at least twenty seconds.",
            "Do not forget the thumbs and the spaces between the fingers.",
            "Wash before you eat or cook and after you use the toilet.",
            "Dry your hands well with a clean towel.",
        ),
        "If your skin becomes cracked and sore, a pharmacist can suggest a suitable cream.",
    ),
    Topic(
        ("I twisted my ankle a little. What now?", "What helps with a mild sprain?"),
        "A mild sprain usually heals well with some patience.",
        (
            "Rest the joint for the first day or two.",
            "Cool it for ten to fifteen minutes at a time, with a cloth between ice and skin.",
            "Raise the leg when you sit or lie down.",
            "Start to move the joint gently as soon as the pain allows it.",
        ),
        "If you cannot put weight on it, or if it looks out of shape, have it examined the same day.",
    ),
    Topic(
        ("My back aches from sitting all day. What can I do?", "How do I look after my back at a desk?"),
        "Back pain from long sitting often gets better with movement.",
        (
            "Stand up and walk a few steps every half hour.",
            "Set the screen so that its upper edge is at the height of your eyes.",
            "Keep both feet flat on the floor.",
            "Build up a little strength with regular exercise for back and belly.",
        ),
        "Numbness, weakness in a leg or trouble with the bladder are reasons to seek medical help at once.",
    ),
    Topic(
        ("How do I protect my skin from the sun?", "What should I know about sun protection?"),
        "Shade and clothing protect best, and sunscreen covers the rest.",
        (
            "Stay in the shade around noon.",
            "Wear a hat, sunglasses and a light shirt with sleeves.",
            "Put sunscreen on generously and again every two hours.",
            "Put it on again after swimming.",
        ),
        "Have a mole checked by a doctor if it changes its shape, size or colour.",
    ),
    Topic(
        ("How often should I brush my teeth?", "What keeps teeth and gums healthy?"),
        "Teeth stay healthy with a short routine every day.",
        (
            "Brush twice a day for two minutes with a fluoride toothpaste.",
            "Clean the spaces between the teeth once a day.",
            "Keep sugary snacks and drinks for rare occasions.",
            "Replace the brush about every three months.",
        ),
        "See a dentist regularly, and sooner if you have pain or if your gums bleed for more than a few days.",
    ),
    Topic(
        ("How can I start to exercise?", "I have not moved much for years. How do I begin?"),
        "Begin with less than you think you can do, and do it often.",
        (
            "A brisk walk of ten minutes is a fine start.",
            "Add a few minutes each week.",
            "Choose something that you enjoy, so that you keep doing it.",
            "Aim for about half an hour on most days in the long run.",
        ),
        "If you have a heart condition, or chest pain when you move, talk to your doctor before you start.",
    ),
    Topic(
        ("How do I keep food safe in summer?", "How should leftovers be stored?"),
        "Cold, clean and well cooked is a good rule for food.",
        (
            "Put leftovers into the fridge within two hours.",
            "Keep raw meat apart from food that is ready to eat.",
            "Heat leftovers until they steam all the way through.",
            "Wash boards and knives after they have touched raw meat.",
        ),
        "If vomiting or diarrhoea lasts more than two days, or if there is blood, call a doctor.",
    ),
    Topic(
        ("I have a small burn from the stove. What helps?", "What should I do about a minor burn?"),
        "A small, shallow burn can usually be treated at home.",
        (
            "Cool it under cool running water for twenty minutes.",
            "Take off rings or a watch near the burn before it swells.",
            "Cover it loosely with a clean dressing that does not stick.",
            "Do not put ice, butter or toothpaste on it.",
        ),
        "Burns that are larger than your hand, deep, or on the face need medical care right away.",
    ),
    Topic(
        ("My nose bleeds now and then. What should I do?", "How do I stop a nosebleed?"),
        "Most nosebleeds stop on their own within a few minutes.",
        (
            "Sit upright and lean a little forward.",
            "Pinch the soft part of the nose for ten minutes without letting go.",
            "Breathe through your mouth meanwhile.",
            "Do not blow your nose for some hours afterwards.",
        ),
        "Get help if the bleeding is heavy or does not stop after half an hour, or if you take blood thinners.",
    ),
    Topic(
        ("How do I prepare for a doctor's appointment?", "What should I bring to my first visit at the clinic?"),
        "A little preparation makes the talk easier for both sides.",
        (
            "Write down your questions, the most important one first.",
            "Bring a list of all the medicines you take.",
            "Note when the trouble began and what makes it better or worse.",
            "Take somebody with you if you would like support.",
        ),
        "If your trouble suddenly gets worse before the appointment, do not wait for it: call.",
    ),
    Topic(
        ("How can I deal with stress?", "I feel tense most of the day. What could I try?"),
        "Small breaks that you really take help more than big plans.",
        (
            "Breathe slowly for some minutes, out for longer than in.",
            "Go outside every day, even if only for a short walk.",
            "Write down what must be done today and what can wait.",
            "Talk with somebody you trust.",
        ),
        "If you feel hopeless or cannot cope with your days, please seek professional help soon.",
    ),
    Topic(
        ("My eyes get tired at the screen. What helps?", "How do I rest my eyes when I work at a computer?"),
        "Tired eyes mostly need pauses and a good place to work.",
        (
            "Look at something far away every twenty minutes.",
            "Blink often, because we blink less at a screen.",
            "Avoid glare from windows and lamps.",
            "Make the letters large enough to read with ease.",
        ),
        "Sudden changes of sight or pain in the eye should be examined at once.",
    ),
    Topic(
        ("How do I store my medicines?", "Where should medicines be kept at home?"),
        "Most medicines like it dry, cool and dark.",
        (
            "Keep them out of the reach of children.",
            "The bathroom is often too damp for them.",
            "Leave them in their package, together with the leaflet.",
            "Check the dates twice a year.",
        ),
        "Ask a pharmacist how to get rid of old medicines, and whether yours belongs in the fridge.",
    ),
)

FOLLOW_UPS = (
    ("Thank you. Is there anything I should look out for?", "{caution}"),
    ("When should I ask a professional?", "{caution}"),
    ("Is there anything else I can do?", "Yes. {more} {caution}"),
    ("Could you name one more thing?", "Gladly. {more} And please remember: {lower}"),
)


def conversation(topic: Topic, tips: tuple[str, str], random: Random) -> list[dict[str, str]]:
    """Question and answer, in half of the cases with one more turn."""
    ask = random.choice(topic.asks)
    if random.random() < 0.25:
        ask = f"Hello, my name is {random.choice(PEOPLE)}. {ask}"
    if random.random() < 0.5:
        return [
            {"from": "human", "value": ask},
            {"from": "gpt", "value": f"{topic.opening} {tips[0]} {tips[1]} {topic.caution}"},
        ]
    more = next(tip for tip in topic.advice if tip not in tips)
    question, answer = random.choice(FOLLOW_UPS)
    lower = topic.caution[0].lower() + topic.caution[1:]
    return [
        {"from": "human", "value": ask},
        {"from": "gpt", "value": f"{topic.opening} {tips[0]} {tips[1]}"},
        {"from": "human", "value": question},
        {"from": "gpt", "value": answer.format(caution=topic.caution, more=more, lower=lower)},
    ]


def rows(random: Random, count: int = 200) -> list[dict[str, list[dict[str, str]]]]:
    """`count` different rows in the sharegpt layout."""
    made: dict[str, list[dict[str, str]]] = {}
    turn = 0
    while len(made) < count:
        topic = TOPICS[turn % len(TOPICS)]
        pairs = list(combinations(topic.advice, 2))
        talk = conversation(topic, pairs[turn // len(TOPICS) % len(pairs)], random)
        made["\n".join(message["value"] for message in talk)] = talk
        turn += 1
    talks = list(made.values())
    random.shuffle(talks)
    return [{"conversations": talk} for talk in talks]
