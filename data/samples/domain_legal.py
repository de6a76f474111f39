"""Questions about the clauses of invented contracts, with answers a reader without a law degree can follow."""

from __future__ import annotations

from random import Random

from invented import fill

QUESTIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "{A} shall pay each invoice within {days} days of receiving it. Sums paid late bear interest of 6 percent a"
        " year.",
        (
            (
                "By when must an invoice be paid?",
                "Within {days} days. The time starts when {a} receives the invoice, not when it is dated.",
            ),
            (
                "What happens if an invoice is paid late?",
                "Interest of 6 percent a year is added. It runs on the unpaid sum for as long as {a} is late.",
            ),
            ("Who has to pay under this clause?", "{A} has to pay. {b} only sends the invoices."),
        ),
    ),
    (
        "Either party may end this agreement by giving {days} days' notice in writing. {a} may end it at once if "
        "{b} commits "
        "a serious breach.",
        (
            (
                "How can the contract be ended without a breach?",
                "Either party can do so by written notice of {days} days. No reason is needed.",
            ),
            ("Who may end the contract at once?", "Only {a}, and only if {b} has committed a serious breach."),
            (
                "Is a phone call enough to end the contract?",
                "No. The clause asks for notice in writing, so a phone call does not count.",
            ),
        ),
    ),
    (
        "{A} shall keep all confidential information of {b} secret for {years} years after this agreement ends.",
        (
            (
                "How long does the duty of secrecy last?",
                "For as long as the agreement runs and for {years} years after it has ended.",
            ),
            (
                "Does the clause protect the secrets of both parties?",
                "No. It binds {a} alone and protects the information of {b}. For mutual protection, {b} would have "
                "to make the same promise.",
            ),
            (
                "Does the duty end together with the agreement?",
                "No. It goes on for {years} more years after the agreement ends.",
            ),
        ),
    ),
    (
        "The total liability of {a} under this agreement is limited to {amount} crowns. The limit does not apply to"
        " harm "
        "caused on purpose.",
        (
            (
                "What is the most that {b} can claim?",
                "{amount} crowns in total, as long as the harm was not caused on purpose.",
            ),
            (
                "When does the limit not apply?",
                "When {a} caused the harm on purpose. In that case the full loss can be claimed.",
            ),
            (
                "Does the limit count for each event or for all events together?",
                "For all events together: the clause speaks of the total liability under the agreement.",
            ),
        ),
    ),
    (
        "{A} may not assign this agreement without the written consent of {b}. {b} shall not refuse without good "
        "reason.",
        (
            ("Can {a} hand the contract to another company?", "Yes, but only if {b} agrees in writing first."),
            (
                "May {b} refuse consent for any reason?",
                "No. It needs a good reason, for instance doubts that the new party can do the work.",
            ),
            ("Does {b} need consent to assign the contract?", "The clause does not say so. It restricts {a} only."),
        ),
    ),
    (
        "{A} warrants that the {goods} are free from defects for {years} years from delivery and shall repair or "
        "replace "
        "defective {goods} free of charge.",
        (
            (
                "What can {b} ask for if the {goods} are defective?",
                "Repair or replacement, free of charge, as long as the defect appears within {years} years of "
                "delivery.",
            ),
            ("When does the time of the warranty begin?", "On the day of delivery, and it runs for {years} years."),
            (
                "Does {b} get its money back under this clause?",
                "The clause promises repair or replacement. It does not mention a refund.",
            ),
        ),
    ),
    (
        "Neither party is responsible for delay caused by events beyond its control, such as flood, war or "
        "epidemic. If the "
        "event lasts more than {days} days, either party may end this agreement.",
        (
            (
                "Is a flood an excuse for late delivery?",
                "Yes, as long as the flood caused the delay. The clause names floods as events beyond a party's "
                "control.",
            ),
            (
                "What can the parties do if the event does not end?",
                "After {days} days either of them may end the agreement.",
            ),
            (
                "Is the list of events complete?",
                "No. The words `such as` show that flood, war and epidemic are examples.",
            ),
        ),
    ),
    (
        "This agreement is governed by the laws of {place}. The courts of {place} alone may hear disputes.",
        (
            ("Which law applies to the contract?", "The law of {place}."),
            (
                "Where can a party bring a lawsuit?",
                "Only before the courts of {place}, because the clause says that they alone may hear disputes.",
            ),
            (
                "Does this clause ask the parties to try mediation?",
                "No. It settles the law and the courts, and says nothing about mediation.",
            ),
        ),
    ),
    (
        "All inventions made during the work belong to {a}. {b} receives a licence to use them for {years} years.",
        (
            ("Who owns an invention made during the work?", "{A} owns it, whoever made it."),
            ("May {b} use the inventions?", "Yes, for {years} years. It holds a licence, but it does not own them."),
            (
                "What happens when the licence runs out?",
                "{B} must stop using the inventions unless the parties agree on a new licence.",
            ),
        ),
    ),
    (
        "{A} shall not compete with {b} in {place} for {years} years after this agreement ends.",
        (
            (
                "May {a} work for a competitor in another town?",
                "The clause forbids competing in {place} only. Work elsewhere is not covered by it.",
            ),
            (
                "When does the ban begin and end?",
                "The {years} years begin when the agreement ends. The clause says nothing about the time before that.",
            ),
            ("Who is bound by the ban?", "{A} is. {b} stays free to do as it likes."),
        ),
    ),
    (
        "{A} shall carry insurance of at least {amount} crowns and shall show a certificate on request.",
        (
            ("How high must the insurance be?", "At least {amount} crowns. {a} may choose a higher sum."),
            ("Does {a} have to send the certificate every year?", "No. It has to show it when {b} asks for it."),
            (
                "Who pays for the insurance?",
                "The clause tells {a} to carry it, so {a} bears the cost unless another clause says otherwise.",
            ),
        ),
    ),
    (
        "{A} shall defend {b} against claims of third parties that arise from the {goods} and shall hold it harmless.",
        (
            (
                "What must {a} do if a stranger sues {b} over the {goods}?",
                "It must take over the defence and pay what {b} would otherwise lose through the claim.",
            ),
            (
                "Does the clause cover claims between {a} and {b}?",
                "No. It covers claims of third parties, that is, of people outside the contract.",
            ),
            (
                "What does `hold harmless` mean here?",
                "It means that {a} bears the loss, so that {b} is no worse off because of the claim.",
            ),
        ),
    ),
    (
        "Every notice shall be in writing. A letter counts as received {days} days after posting; an email counts "
        "as received "
        "on the next working day.",
        (
            (
                "When does a letter count as received?",
                "{days} days after it was posted, whether or not it has been read.",
            ),
            (
                "An email is sent on a Friday. When does it count as received?",
                "On the next working day, which is usually Monday.",
            ),
            (
                "Are emails allowed for notices?",
                "Yes. The clause says when an email counts as received, so email is a valid form of writing here.",
            ),
        ),
    ),
    (
        "{A} shall deliver the {goods} to {place} by the last day of {month}. For each week of delay the price "
        "falls by 2 "
        "percent, but by no more than 10 percent.",
        (
            ("By when must the {goods} arrive?", "By the last day of {month}, in {place}."),
            (
                "By how much does the price fall after three weeks of delay?",
                "By 6 percent: 2 percent for each of the three weeks.",
            ),
            (
                "By how much does the price fall after eight weeks of delay?",
                "By 10 percent. Eight weeks would make 16 percent, but the clause stops at 10.",
            ),
        ),
    ),
    (
        "This agreement runs for {years} years. It is renewed for one more year unless a party objects {days} days "
        "before "
        "its end.",
        (
            (
                "What must a party do to stop the renewal?",
                "It must object at least {days} days before the agreement ends.",
            ),
            ("What happens if nobody objects?", "The agreement goes on for one more year."),
            ("How long is the first term?", "It is {years} years."),
        ),
    ),
    (
        "If a part of this agreement is void, the other parts remain in force. Changes to this agreement are valid "
        "only in "
        "writing and signed by both parties.",
        (
            ("Does one void clause bring down the whole contract?", "No. The other parts stay in force."),
            (
                "Can {a} change the contract by email?",
                "Not by itself. A change must be in writing and signed by both {a} and {b}.",
            ),
            (
                "Does a spoken promise change the contract?",
                "No. Changes are valid only in writing with both signatures.",
            ),
        ),
    ),
)

OPENINGS = (
    'The contract between {a} and {b} says: "{clause}" {question}',
    'Clause {number} reads: "{clause}" {question}',
    "{question}\n\nClause {number}: {clause}",
)


def rows(random: Random, count: int = 200) -> list[dict[str, str]]:
    """`count` different rows with the columns `question` and `answer`."""
    made: dict[str, str] = {}
    pairs = [(clause, pair) for clause, several in QUESTIONS for pair in several]
    turn = 0
    while len(made) < count:
        clause, (question, answer) = pairs[turn % len(pairs)]
        turn += 1
        opening = random.choice(OPENINGS)
        asked = opening.replace("{clause}", clause).replace("{question}", question)
        asked = asked.replace("{number}", str(random.randint(2, 19)))
        text, reply = fill(f"{asked}\f{answer}", random).split("\f")
        made[text] = reply
    shuffled = list(made.items())
    random.shuffle(shuffled)
    return [{"question": question, "answer": answer} for question, answer in shuffled]
