"""Measurements → a verdict, a table for people, and verification.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.export.verify.metrics import Distance
from finetune.export.verify.proof import Measured, Reference

LIMITS = {
    "f32": 1e-6, "f16": 1e-4, "bf16": 1e-3, "q8_0": 0.01, "q6_k": 0.05,
    "q5_0": 0.1, "q5_1": 0.1, "q5_k_s": 0.1, "q5_k_m": 0.1,
    "q4_0": 0.3, "q4_1": 0.3, "q4_k_s": 0.3, "q4_k_m": 0.3, "iq4_nl": 0.3, "iq4_xs": 0.3,
    "q3_k_s": 1.0, "q3_k_m": 0.6, "q3_k_l": 0.6, "q2_k": 2.0,
}  # fmt: skip
"""The largest mean divergence in nats, per precision, from what was trained: ten times and more what sound files of a
small model show (docs/export.md), which suffers more from few bits than a large one. Errors of a conversion (rows in
another order, a lost layer) cost whole nats."""

MIXTURE_LIMIT = 0.1
"""The limit of a mixture of experts, where the table's is smaller: wherever two experts are all but equally good,
rounding sends a token to the other one. Random mixtures show up to 0.03 in bf16 (docs/export.md)."""

FAR_ALLOWANCE = 4.0
"""By how much the mean over the few positions at the end of a long sequence may exceed the limit: they are fewer."""

KEPT, KEPT_FEW_BITS = (0.9, 1.1), (0.75, 1.6)
"""How much of what training changed an artifact must have (`metrics.Shift`), with 8 and more bits and with fewer. Sound
files showed 1.00 to 1.01 and 0.95 to 1.2, half an adapter 0.5 to 0.7, the base 0 to 0.2."""

EXACT = ("f32", "f16", "bf16", "q8_0")

GAPS = {"f32": 0.01, "f16": 0.25}
"""By how much, in logits, the reference may prefer another token than the one that was written, where that can be told
apart from rounding."""

NOTICEABLE = 0.5
"""From this share of what training changed on, what the encoding changes is worth a warning."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with an artifact (nothing, if it is proven), and what a person should know."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def proven(self) -> bool:
        return not self.problems


def judge(reference: Reference, measured: Measured) -> Verdict:
    """Pure: from what was measured to a verdict."""
    problems, warnings = _words(measured)
    limit = limit_of(reference, measured)
    apart, far = measured.apart.mean, measured.apart_far
    if not apart <= limit:  # NaN is not less or equal either
        problems.append(
            f"it differs from what was trained by {apart:.2g} nats on average, "
            f"where {measured.precision} may cost {limit:.2g}"
        )
    elif far is not None and not far.mean <= FAR_ALLOWANCE * limit:
        problems.append(
            f"after {reference.long:,} tokens it differs from what was trained by {far.mean:.2g} nats, at the "
            f"beginning by {apart:.2g}: positions or attention windows are not those of training"
        )
    allowed = GAPS.get(measured.precision)
    if allowed is not None and not reference.mixture and measured.worst_gap > allowed:
        problems.append(f"it writes a token that the trained model finds {measured.worst_gap:.2g} logits less likely")
    of_training, about_training = _training(reference, measured)
    return Verdict((*problems, *of_training), (*warnings, *about_training))


def limit_of(reference: Reference, measured: Measured) -> float:
    """The largest mean divergence that passes."""
    limit = LIMITS[measured.precision]
    return max(limit, MIXTURE_LIMIT) if reference.mixture and measured.precision != "f32" else limit


def _words(measured: Measured) -> tuple[list[str], list[str]]:
    """Token ids, prompts, and where it stops."""
    asked = measured.asked
    problems: list[str] = []
    warnings: list[str] = []
    if asked.different:
        count, first = len(asked.different), asked.different[0]
        problems.append(f"{count} of {asked.texts} texts have other token ids than in training, the first: {first!r}")
    if not asked.template_as_trained:
        problems.append("its chat template is not the one that was trained with")
    elif asked.other_prompts:
        # The template is the same, so it is the runtime that fills it differently: a date, thinking switched on.
        which = "; ".join(asked.other_prompts)
        warnings.append(f"the runtime fills the chat template otherwise than training did, for messages by {which}")
    if asked.framed is not None:
        problems.append(f"it puts other special tokens around a prompt than training did: {asked.framed} for 'a'")
    if not asked.ends:
        problems.append("it would not stop at the token that ends an answer")
    return problems, warnings


def _training(reference: Reference, measured: Measured) -> tuple[list[str], list[str]]:
    """Whether it is the trained model rather than the base."""
    kept = measured.shift.kept
    if kept is None or reference.base_apart.mean < 1e-9:
        return ["the adapter changes nothing that can be measured: base and trained model say the same"], []
    least, most = KEPT if measured.precision in EXACT else KEPT_FEW_BITS
    if not least <= kept <= most:
        return [
            f"it has {kept:.0%} of what training changed, where {least:.0%} to {most:.0%} is sound: "
            "is the adapter in it, once and in full?"
        ], []
    on_rows = bool(len(reference.base_apart_on_rows.divergence))
    trained = (reference.base_apart_on_rows if on_rows else reference.base_apart).mean
    share = (measured.apart_on_rows if on_rows else measured.apart).mean / trained
    if share >= NOTICEABLE:
        said = f"{measured.precision} changes the model {share:.0%} as much as training did: more bits keep more of it"
        return [], [said]
    return [], []


def table(reference: Reference, found: Sequence[Measured]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that `ft export` prints."""
    header = ["", "nats apart", "worst 1 %", "same token", "of training", "perplexity", "greedy", "stops"]
    names = {"stored": "adapter on the 16-bit base", "nf4": "adapter on the NF4 base"}
    perplexity = reference.perplexity
    rows = [["base, untrained", *_apart(reference.base_apart), "0%", _number(perplexity.get("base")), "", ""]]
    other = {"stored": "nf4", "nf4": "stored"}[reference.onto]
    if reference.merges_apart is not None:
        rows.append([names[other], *_apart(reference.merges_apart), "", _number(perplexity.get(other)), "", ""])
    exact = ["0", "0", "100.0%", "100%"]
    rows.append([f"{names[reference.onto]} (reference)", *exact, _number(perplexity.get(reference.onto)), "", ""])
    for one in found:
        greedy = f"{one.same_tokens}/{one.tokens}" if one.tokens else "–"
        stops = f"{one.stopped}/{one.answers}" if one.answers else "–"
        kept = "–" if one.shift.kept is None else f"{one.shift.kept:.0%}"
        rows.append([one.name, *_apart(one.apart), kept, _number(one.perplexity), greedy, stops])
    return header, rows


def as_dict(reference: Reference, measured: Measured, verdict: Verdict) -> dict[str, Any]:
    """One artifact's part of verification.json."""
    return {
        "proven": verdict.proven,
        "problems": list(verdict.problems),
        "warnings": list(verdict.warnings),
        "precision": measured.precision,
        "merged_onto": reference.onto,
        "token_ids": {
            "texts": measured.asked.texts,
            "different": measured.asked.different,
            "same_once_composed": measured.asked.normalised,
        },
        "framed_otherwise": measured.asked.framed,
        "template_as_trained": measured.asked.template_as_trained,
        "prompts": {"tried": measured.asked.prompts, "different": measured.asked.other_prompts},
        "ends_an_answer": measured.asked.ends,
        "compared_on": {"sequences": reference.sequences, "positions": reference.positions, "rows": reference.rows_are},
        "from_what_was_merged": _distance(measured.apart) | {"limit": limit_of(reference, measured)},
        "far_from_the_beginning": None
        if measured.apart_far is None
        else _distance(measured.apart_far) | {"tokens_before": reference.long},
        "share_of_training": measured.shift.kept,
        "from_what_was_trained": _distance(measured.apart_from_training or measured.apart),
        "base_from_what_was_merged": _distance(reference.base_apart),
        "merges_apart": None if reference.merges_apart is None else _distance(reference.merges_apart),
        "perplexity": {**reference.perplexity, "artifact": measured.perplexity},
        "greedy": {
            "answers": measured.answers,
            "stopped": measured.stopped,
            "tokens": measured.tokens,
            "same_tokens": measured.same_tokens,
            "worst_logit_gap": measured.worst_gap,
        },
    }


def _distance(distance: Distance) -> dict[str, float]:
    return {"mean_nats": distance.mean, "p99_nats": distance.worst, "same_top_token": distance.agreement}


def _apart(distance: Distance) -> list[str]:
    return [f"{distance.mean:.2g}", f"{distance.worst:.2g}", f"{distance.agreement:.1%}"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3f}"
