"""`ft plan`: what a config will need, before anything large is downloaded or loaded. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from finetune.config.load import load
from finetune.config.schema import Config
from finetune.console import Console, duration, size
from finetune.errors import ConfigError
from finetune.plan.amount import CHARACTERS_A_TOKEN, Amount, amount_of, guessed_amount
from finetune.plan.estimate import (
    Estimate,
    as_written,
    chosen_fit,
    estimate,
    evaluates,
    expected_kernels,
    kept_offload,
    kept_recomputed,
    setup_of,
)
from finetune.plan.facts import Base, base_of
from finetune.plan.fit import RESERVE, Wish, budget, changes_that_fit, cut_as, largest_micro_batch, longest_sequence
from finetune.plan.gpus import Card, card_of_vram, cards, find_card
from finetune.plan.here import card_here
from finetune.plan.memory import adapter_parameters, parameters
from finetune.plan.setup import Setup
from finetune.plan.time import EFFICIENCY

NOT_MEASURED = "estimated, not measured: how far off this is has not been measured on a GPU yet (docs/plan.md)"

ERROR_BOUNDS = "not measured yet"
"""How far off the estimate is, for `--json`."""

BAR = 24
"""Characters of the longest bar."""


@dataclass(frozen=True)
class Outcome:
    """What comes out for one card."""

    card: Card
    setup: Setup
    """As it would run, or as it is written where nothing fits."""
    estimate: Estimate | None
    """None: it does not fit, whatever is changed."""
    changes: tuple[str, ...] = ()


def plan(
    path: Path, overrides: Sequence[str], runs: Path, console: Console, *, gpu: str | None, vram: str | None
) -> None:
    """Memory, time and cost on the card that is asked for, or is here; else a line for every card that is known.

    Raises ConfigError for a config that is wrong or a card that is unknown, BaseError for a base that the plan does not
    know, DataError for data that cannot be prepared.
    """
    if gpu is not None and vram is not None:
        raise ConfigError("--gpu and --vram: both say which card is meant", hint="give one of them")
    card = find_card(gpu) if gpu is not None else card_of_vram(vram) if vram is not None else card_here()
    config = load(path, overrides).config
    base = base_of(config)
    amount = _amount(config, base, runs, console)
    shape = base.shape
    adapter = adapter_parameters(shape, config.lora.rank, config.lora.targets)
    console.say(
        f"base: {config.base}, {_count(parameters(shape))} parameters in {shape.layers} layers ({base.source}); "
        f"{config.quantization}, an adapter of {_count(adapter)}"
    )
    if base.quantised is not None:
        console.warn(
            f"{config.base} is quantised already ({base.quantised}), and is planned as if it were not; `ft train` "
            "takes no such base, but for bitsandbytes' 4 bit as `nf4`: give the one in 16 bit that it was made from"
        )
    if card is not None:
        if card.note is not None:
            console.say(f"planned for {card.note}")
        _show_card(config, base, amount, outcome(config, base, amount, card), console)
    else:
        _show_cards([outcome(config, base, amount, card) for card in cards()], console)
    if not console.json_events:
        console.say(NOT_MEASURED)


def _amount(config: Config, base: Base, runs: Path, console: Console) -> Amount:
    """The tokens of the data: counted where there is a tokenizer, guessed from the characters otherwise."""
    if base.folder is not None:
        from finetune.pipeline import CACHE, prepare_shown

        return amount_of(prepare_shown(config, base.folder, runs / CACHE, console))
    from finetune.data.read import read_rows

    rows, characters = 0.0, 0.0
    with console.progress("reading", unit="rows") as progress:
        for source in config.data:
            for row in islice(read_rows(source), source.take):
                rows += source.weight
                characters += source.weight * _characters(row.values)
                progress.advance()
    held_out = 0.0 if config.evaluation.path is not None else config.evaluation.split
    kept = 1 - held_out if held_out < 1 else max(0.0, 1 - held_out / rows)
    console.warn(
        f"{config.base} {base.why_not}: without its tokenizer, tokens are guessed, "
        f"{CHARACTERS_A_TOKEN} characters each, and all taken to carry loss"
    )
    return guessed_amount(round(characters * kept), max(1, round(rows * kept)), config.train)


def _characters(value: object) -> int:
    """Of all texts in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def outcome(config: Config, base: Base, amount: Amount, card: Card) -> Outcome:
    """Whether and how a config runs on a card, and with which changes if not as it is."""
    setup = setup_of(
        config,
        base.shape,
        kernels=expected_kernels(config, base.shape, card),
        longest_row=amount.longest_row,
        sequence=amount.longest,
        supervised=amount.share,
        device="cuda",
    )
    changes: tuple[str, ...] = ()
    fit = chosen_fit(config, setup, amount, card)
    if fit is None:
        wish = Wish(
            setup,
            amount,
            config.lora.alpha,
            cut=as_written(config, base.shape.layers, "cuda") if config.train.fit == "as-written" else None,
            recomputed=kept_recomputed(config, base.shape.layers),
            offload=kept_offload(config),
        )
        changed = changes_that_fit(wish, config.train.effective_batch, budget(card), card, evaluated=evaluates(config))
        if changed is None:
            return Outcome(card, setup, None)
        setup, amount, fit, changes = changed.wish.setup, changed.wish.amount, changed.fit, changed.changes
    setup = cut_as(setup, fit, amount)
    found = estimate(config, setup, amount, card, stored_bytes=base.stored_bytes, here=base.here)
    return Outcome(card, setup, found, changes)


# -- what a person sees -------------------------------------------------------------------------------------------


def _show_cards(outcomes: Sequence[Outcome], console: Console) -> None:
    """A line for each card."""
    if console.json_events:
        for one in outcomes:
            console.event("plan", **_event(one))
        return
    rows = []
    for one in outcomes:
        found = one.estimate
        if found is None:
            rows.append([one.card.label, "", "", "", "", "", "does not fit"])
            continue
        rows.append(
            [
                one.card.label,
                f"{found.peak / 2**30:.1f} of {found.available / 2**30:.1f} GiB",
                f"{found.fit.micro_batch} × {found.fit.accumulation}",
                f"{found.fit.recomputed} of {one.setup.shape.layers}{', offloaded' if found.fit.offload else ''}",
                duration(found.seconds),
                _cost(found),
                "fits" if not one.changes else "with " + " ".join(f"-s {change}" for change in one.changes),
            ]
        )
    console.table(["card", "memory", "step", "recomputed", "time", "cost", ""], rows, stdout=True)
    console.say("`--gpu NAME` shows one of them in full; $ is rent, kWh what a card of one's own uses at full power")


def _show_card(config: Config, base: Base, amount: Amount, one: Outcome, console: Console) -> None:
    """All there is to say of one card."""
    if console.json_events:
        console.event("plan", **_event(one))
        return
    card, found = one.card, one.estimate
    if found is None:
        console.data(f"{card.label}: does not fit, whatever is changed; take a smaller base, or a larger card")
        return
    if one.changes:
        changes = " ".join(f"-s {change}" for change in one.changes)
        console.data(f"{card.label}: does not fit as it is written, but with {changes}:")
    else:
        console.data(f"{card.label}: fits")
    console.data("")
    parts = {name: part for name, part in found.memory.as_dict().items() if part} | {"total": found.memory.total}
    unit = max(found.memory.total, found.evaluation) / BAR
    if found.evaluation:
        parts["evaluation, a row at a time"] = found.evaluation
    rows = [[name, size(part), "█" * round(part / unit)] for name, part in parts.items()]
    console.table(["memory at the peak", "", ""], rows, stdout=True)
    console.data("")
    console.table(["", "", "from"], list(_lines(config, base, amount, one, found)), stdout=True)


def _lines(config: Config, base: Base, amount: Amount, one: Outcome, found: Estimate) -> Iterator[list[str]]:
    card, setup = one.card, one.setup
    used = f", {size(card.in_use)} in use" if card.in_use else ""
    yield ["may be used", size(found.available), f"{size(card.memory)} less {RESERVE:.0%} in reserve{used}"]
    written = as_written(config, base.shape.layers, "cuda")
    chosen = "as it is written" if written == found.fit else f"chosen by the plan; written: {written}"
    yield ["step", str(found.fit), chosen]
    largest = largest_micro_batch(setup, found.available)
    yield ["most at once", f"{largest:,} sequences", f"of {setup.sequence:,} tokens, every layer recomputed"]
    longest = longest_sequence(setup, found.available)
    yield ["longest", f"{longest:,} tokens", f"one sequence; the base was made for {base.shape.context:,}"]
    counted = "counted" if found.tokens_counted else f"guessed, {CHARACTERS_A_TOKEN} characters each"
    yield ["tokens", f"{found.tokens:,}", f"{counted}; in {found.steps:,} steps"]
    speed = f"{found.tokens_per_second:,.0f} tokens a second"
    yield ["speed", speed, f"operations and bytes, at {EFFICIENCY:.0%} of what the card could"]
    if setup.kernels.fused:
        yield ["", "liger-kernel", "assumed to be there (the extra `fast`); without it, slower, in the same memory"]
    yield ["time", duration(found.seconds), "training alone, without loading and evaluation"]
    price = (
        "nobody was found who rents it out" if card.price is None else f"${card.price:.2f} an hour: {card.price_from}"
    )
    yield ["cost", _cost(found), price]
    yield ["electricity", _energy(found), f"at most: {card.watts} W all the time"]
    disk, ram = found.disk, found.ram
    yield ["disk", size(disk.download), "download of the base" if disk.download else "the base is here"]
    yield [
        "",
        size(disk.checkpoints),
        f"adapter and {config.train.keep_checkpoints} checkpoints, one more while written",
    ]
    yield ["", size(disk.merged), "merged (`ft merge`)"]
    yield ["", f"{size(disk.gguf_q8_0)} · {size(disk.gguf_q4_k_m)}", "GGUF in q8_0 · q4_k_m (`ft export`)"]
    yield ["RAM", size(ram.training), "training; libraries as with torch's build for CPUs, CUDA's is larger"]
    yield ["", size(ram.merging), "merging, as measured on bases of 1.1 to 8 billion parameters"]
    yield ["", size(ram.exporting), "exporting to GGUF, with the proof"]


def _cost(found: Estimate) -> str:
    return _energy(found) if found.dollars is None else f"${max(0.01, found.dollars):,.2f}"


def _energy(found: Estimate) -> str:
    return f"{max(0.01, found.kilowatt_hours):,.2f} kWh"


def _count(parameters: int) -> str:
    """`8030261248` → `8.03 billion`."""
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


def _event(one: Outcome) -> dict[str, object]:
    """A card's outcome for `--json`."""
    found = {} if one.estimate is None else one.estimate.as_dict()
    said = {
        "card": one.card.label,
        # As it is written; and what makes it fit where it does not: nothing where nothing does.
        "fits": one.estimate is not None and not one.changes,
        "fits_with": list(one.changes),
        "error_bounds": ERROR_BOUNDS,
        "setup": _settings(one.setup),
    }
    return found | said


def _settings(setup: Setup) -> dict[str, object]:
    """The setup without the shape of its base."""
    return {name: value for name, value in asdict(setup).items() if name != "shape"}
