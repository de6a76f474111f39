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

NOTICEABLE = 0.25
"""From this share of what training changed on, what the encoding changes is worth a warning."""

LOST = 0.9
"""From this share on, nothing of the training is left. Less than 1: the base itself is at 1 only up to rounding."""


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
    problems, warnings = [], []
    if measured.different:
        count, first = len(measured.different), measured.different[0]
        problems.append(
            f"{count} of {measured.texts} texts have other token ids than in training, the first: {first!r}"
        )
    if measured.prompt_as_trained is False:
        problems.append("its chat template gives another prompt than the one that was trained with")
    if not measured.ends:
        problems.append("it would not stop at the token that ends an answer")
    if measured.normalised:
        warnings.append(
            f"{measured.normalised} texts that are not in Unicode's composed form (NFC) have other token ids than in "
            "training: the runtime does not compose them"
        )
    limit = _limit(reference, measured)
    if not measured.apart.mean <= limit:  # NaN is not less or equal either
        problems.append(
            f"it differs from what was trained by {measured.apart.mean:.2g} nats on average, "
            f"where {measured.precision} may cost {limit:.2g}"
        )
    problems_of_base, warnings_of_base = _against_base(reference, measured)
    return Verdict((*problems, *problems_of_base), (*warnings, *warnings_of_base))


def _limit(reference: Reference, measured: Measured) -> float:
    limit = LIMITS[measured.precision]
    return max(limit, MIXTURE_LIMIT) if reference.mixture and measured.precision != "f32" else limit


def _against_base(reference: Reference, measured: Measured) -> tuple[list[str], list[str]]:
    """Whether it is the trained model rather than the base: it must be nearer to the former than the latter is."""
    on_rows = bool(len(reference.base_apart_on_rows.divergence))
    trained = (reference.base_apart_on_rows if on_rows else reference.base_apart).mean
    lost = (measured.apart_on_rows if on_rows else measured.apart).mean
    if trained < 1e-9:
        return ["the adapter changes nothing that can be measured: base and trained model say the same"], []
    if lost >= LOST * trained:
        return [
            f"it is no nearer to what was trained ({lost:.2g} nats) than the base is ({trained:.2g}): "
            "what was learned is lost in it"
        ], []
    if lost >= NOTICEABLE * trained:
        share = lost / trained
        return [], [
            f"{measured.precision} changes the model {share:.0%} as much as training did: more bits keep more of it"
        ]
    return [], []


def table(reference: Reference, found: Sequence[Measured]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that `ft export` prints."""
    header = ["", "nats apart", "worst 1 %", "same token", "perplexity", "greedy", "stops"]
    names = {"stored": "adapter on the 16-bit base", "nf4": "adapter on the NF4 base"}
    rows = [["base, untrained", *_apart(reference.base_apart), _number(reference.perplexity.get("base")), "", ""]]
    other = {"stored": "nf4", "nf4": "stored"}[reference.onto]
    if reference.merges_apart is not None:
        rows.append(
            [f"{names[other]}", *_apart(reference.merges_apart), _number(reference.perplexity.get(other)), "", ""]
        )
    rows.append([f"{names[reference.onto]} (reference)", "0", "0", "100.0%",
                 _number(reference.perplexity.get(reference.onto)), "", ""])  # fmt: skip
    for one in found:
        greedy = f"{one.same_tokens}/{one.tokens}" if one.tokens else "–"
        stops = f"{one.stopped}/{one.answers}" if one.answers else "–"
        rows.append([one.name, *_apart(one.apart), _number(one.perplexity), greedy, stops])
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
            "texts": measured.texts,
            "different": measured.different,
            "same_once_composed": measured.normalised,
        },
        "prompt_as_trained": measured.prompt_as_trained,
        "ends_an_answer": measured.ends,
        "compared_on": {"sequences": reference.sequences, "positions": reference.positions, "rows": reference.rows_are},
        "from_what_was_merged": _distance(measured.apart) | {"limit": _limit(reference, measured)},
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
