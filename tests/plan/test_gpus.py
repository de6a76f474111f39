"""The table of cards: found by any of their names, plausible, and dated."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
import yaml

from finetune.errors import ConfigError
from finetune.plan import gpus
from finetune.plan.gpus import GIB, Card, card_here, card_like, card_of_vram, cards, find_card, slug

TABLE = yaml.safe_load(gpus.TABLE.read_text("utf-8"))

each_card = pytest.mark.parametrize("card", cards(), ids=lambda card: slug(card.name))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx-4090", "RTX 4090"),
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("nvidia_geforce_rtx_3060", "RTX 3060"),
        ("rtx-3060-8gb", "RTX 3060 8 GB"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("Tesla T4", "T4"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Tesla V100-SXM2-16GB", "V100 16 GB"),
        ("a100", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_a_card_is_found_however_it_is_written(text: str, name: str) -> None:
    assert find_card(text).name == name


@each_card
def test_every_card_is_found_by_its_own_names(card: Card) -> None:
    assert find_card(card.name) == card
    assert find_card(slug(card.name)) == card
    for name in card.called:  # shared by some, which the memory then tells apart
        assert card_like(name, card.memory).name in {card.name, find_card(name).name}


def test_names_are_unique() -> None:
    names = [slug(card.name) for card in cards()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("text", ["rtx-4099", "RTX 4090 Laptop GPU", "rtx 40900"])
def test_an_unknown_card_names_the_nearest(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--gpu {text}")) as caught:
        find_card(text)
    assert "did you mean rtx-4090?" in str(caught.value.problems[0].hint)


@pytest.mark.parametrize("text", ["", "  ", "nvidia", "\x1b[31m", "0" * 1000])
def test_what_is_no_name_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="not in the table"):
        find_card(text)


# -- by memory ----------------------------------------------------------------------------------------------------


def test_the_memory_tells_cards_of_one_name_apart() -> None:
    name = "NVIDIA GeForce RTX 3080"
    assert card_like(name, int(9.7 * GIB)).name == "RTX 3080"
    assert card_like(name, int(11.7 * GIB)).name == "RTX 3080 12 GB"
    assert card_like(name, 12345).memory == 12345  # what the driver says, not what the table does


def test_an_unknown_card_that_is_here_gets_the_speed_of_one_with_no_more_memory() -> None:
    card = card_like("NVIDIA GeForce RTX 9090", 26 * GIB)
    assert (card.name, card.memory, card.price) == ("NVIDIA GeForce RTX 9090", 26 * GIB, None)
    like = [one for one in cards() if one.rate == card.rate and one.bandwidth == card.bandwidth]
    assert like
    assert all(one.memory <= 26 * GIB for one in like)
    assert card_like("tiny", 2**20).rate > 0


@pytest.mark.parametrize("text", ["12GB", "12", "12 gb", "12GiB"])
def test_a_card_of_so_much_memory_is_the_slowest_that_has_it(text: str) -> None:
    card = card_of_vram(text)
    same = [one for one in cards() if one.gb == 12]
    assert card.rate == min(one.rate for one in same)
    assert card.memory == min(same, key=lambda one: one.rate).memory
    assert card.price is None


def test_a_size_that_no_card_has_takes_the_next_smaller_ones_speed() -> None:
    card = card_of_vram("20GB")
    assert card.rate == card_of_vram("16GB").rate
    assert 18.0 * GIB < card.memory < 20 * GIB


@pytest.mark.parametrize(("text", "message"), [("4GB", "smallest card"), ("12TB", "not a size"), ("", "not a size")])
def test_a_size_that_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        card_of_vram(text)


# -- on this machine ----------------------------------------------------------------------------------------------


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver's program that says what stands in the file `answer`."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncat "{tmp_path}/answer"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "answer"


def test_the_card_that_is_here(smi: Path) -> None:
    smi.write_text("NVIDIA GeForce RTX 4090, 24564, 1204\nNVIDIA GeForce RTX 3060, 12288, 0\n")
    card = card_here()
    assert card is not None
    assert (card.name, card.in_use) == ("RTX 4090", 1204 * 2**20)
    assert card.memory == find_card("rtx-4090").memory  # what CUDA gives, less than what nvidia-smi says


@pytest.mark.parametrize("answer", ["", "No devices were found\n", "a, b, c\n", "NVIDIA X, [N/A], 3\n"])
def test_a_driver_that_says_nothing_useful_is_no_card(smi: Path, answer: str) -> None:
    smi.write_text(answer)
    assert card_here() is None


def test_without_a_driver_there_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert card_here() is None


def test_a_driver_that_hangs_is_not_waited_for(smi: Path) -> None:
    (smi.parent / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 20\n")
    assert card_here(timeout=0.2) is None


# -- what the table says ------------------------------------------------------------------------------------------


@each_card
def test_a_card_is_plausible(card: Card) -> None:
    # CUDA reports less than what is on the box: down to 91 % of it where error correction takes its share.
    assert 0.9 < card.memory / (card.gb * GIB) < 1
    assert 200e9 < card.bandwidth < 10e12
    assert 20e12 < card.rate < 2e15
    assert 50 < card.watts < 1000
    assert card.price is None or 0.05 < card.price < 10


def test_every_price_says_where_and_when_it_was_one() -> None:
    assert {row["from"] for row in TABLE["cards"] if row["price"] is not None} == set(TABLE["prices"])
    assert all(re.search(r"20\d\d-\d\d", source) for source in TABLE["prices"].values())
    assert all("from" not in row for row in TABLE["cards"] if row["price"] is None)


def test_the_sizes_that_recipes_are_for_are_there() -> None:
    assert {8, 12, 16, 24, 40, 80, 141} <= {card.gb for card in cards()}


@pytest.mark.parametrize(
    ("name", "cores", "clock", "per_core"),
    # Tensor rate with float32 sums, in operations per shader core and clock: 4 on GeForce, 8 on the others
    # of Ampere and Ada. NVIDIA's white papers (GA102, Ada, Blackwell): cores and boost clock in GHz.
    [
        ("RTX 3060", 3584, 1.777, 4),
        ("RTX 3090", 10496, 1.695, 4),
        ("RTX 4070", 5888, 2.475, 4),
        ("RTX 4090", 16384, 2.520, 4),
        ("RTX 5090", 21760, 2.407, 4),
        ("RTX A6000", 10752, 1.800, 8),
        ("RTX 6000 Ada", 18176, 2.505, 8),
    ],
)
def test_the_rate_follows_from_cores_and_clock(name: str, cores: int, clock: float, per_core: int) -> None:
    assert find_card(name).rate == pytest.approx(cores * clock * 1e9 * per_core, rel=0.01)
