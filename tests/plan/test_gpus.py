"""The table of cards: found by any of their names, plausible, and dated."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
import yaml

from finetune.errors import ConfigError
from finetune.plan import gpus
from finetune.plan.gpus import GIB, Card, card_like, card_of_vram, cards, find_card, slug
from finetune.plan.here import card_here

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
        ("RTX 4090, 24 GB", "RTX 4090"),
        ("T4 16GB", "T4"),
        ("T4, 16 GB", "T4"),
        ("H100 80GB", "H100 PCIe"),
        ("RTX 3080, 12 GB", "RTX 3080 12 GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("NVIDIA RTX 4000 Ada Generation", "RTX 4000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA H100 NVL", "H100 NVL"),
    ],
)
def test_a_card_is_found_however_it_is_written(text: str, name: str) -> None:
    assert find_card(text).name == name


@each_card
def test_every_card_is_found_by_its_own_names(card: Card) -> None:
    assert find_card(card.name) == card
    assert find_card(slug(card.name)) == card
    assert find_card(card.label) == card
    for name in card.called:  # shared by some, which the memory then tells apart
        assert card_like(name, card.memory).name in {card.name, find_card(name).name}


def test_names_are_unique() -> None:
    names = [slug(card.name) for card in cards()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("text", ["rtx-4099", "RTX 4090 D", "rtx 40900"])
def test_an_unknown_card_names_the_nearest(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--gpu {text}")) as caught:
        find_card(text)
    assert "did you mean rtx-4090?" in str(caught.value.problems[0].hint)


@pytest.mark.parametrize("text", ["", "  ", "nvidia", "\x1b[31m", "0" * 1000, "24 GB"])
def test_what_is_no_name_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not in the table|no name of a card"):
        find_card(text)


# -- by memory ----------------------------------------------------------------------------------------------------


def test_the_memory_tells_cards_of_one_name_apart() -> None:
    name = "NVIDIA GeForce RTX 3080"
    assert card_like(name, int(9.7 * GIB)).name == "RTX 3080"
    assert card_like(name, int(11.7 * GIB)).name == "RTX 3080 12 GB"
    assert card_like(name, 12345).memory == 12345  # what the driver says, not what the table does


@pytest.mark.parametrize(
    ("name", "gib", "capability", "bf16", "like"),
    [
        ("NVIDIA GeForce RTX 5090 D", 31, (12, 0), True, "RTX 5090"),
        ("NVIDIA RTX A4500", 19.6, (8, 6), True, "RTX A4000"),
        ("NVIDIA TITAN RTX", 23.6, (7, 5), False, "T4"),
        ("Quadro RTX 4000", 7.6, (7, 5), False, "RTX 2060 Super"),
        ("NVIDIA GeForce GTX 1080", 7.9, (6, 1), False, "V100 16 GB"),  # older than all: the oldest there is
        ("NVIDIA GB300", 270, (10, 3), True, "B200"),
        ("tiny", 0.001, None, None, None),
    ],
)
def test_an_unknown_card_that_is_here_is_of_its_own_class(
    name: str, gib: float, capability: tuple[int, int] | None, bf16: bool | None, like: str | None
) -> None:
    card = card_like(name, int(gib * GIB), capability)
    assert (card.name, card.memory, card.price) == (name, int(gib * GIB), None)
    assert card.gb == max(1, round(gib))
    if like is not None:
        assert card.bf16 == bf16
        assert card.capability == capability
        assert (card.rate, card.bandwidth) == (find_card(like).rate, find_card(like).bandwidth)


@pytest.mark.parametrize("text", ["16GB", "16", "16 gb", "16GiB", "16000MB", "16384 MiB", "16.0GB"])
def test_a_card_of_so_much_memory_is_no_better_than_any_that_has_it(text: str) -> None:
    card = card_of_vram(text)
    same = [one for one in cards() if one.gb == 16]
    assert card.memory == min(one.memory for one in same) == find_card("t4").memory
    assert card.rate == min(one.rate for one in same) < find_card("t4").rate
    assert card.bandwidth == min(one.bandwidth for one in same)
    assert not card.bf16  # nor has a T4
    assert card.watts / card.rate == pytest.approx(max(one.watts / one.rate for one in same), rel=0.01)
    assert (card.price, card.label) == (None, "a card of 16 GB")


@pytest.mark.parametrize(("text", "like"), [("18GB", "16GB"), ("7.5GB", "6GB"), ("500GB", "180GB")])
def test_a_size_that_no_card_has_takes_the_next_smaller_ones_speed(text: str, like: str) -> None:
    card, smaller = card_of_vram(text), card_of_vram(like)
    assert (card.rate, card.capability) == (smaller.rate, smaller.capability)
    assert card.memory / card.gb == pytest.approx(smaller.memory / smaller.gb)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4GB", "smallest card"),
        ("0", "smallest card"),
        ("12TB", "not a size"),
        ("", "not a size"),
        ("1.2.3GB", "not a size"),
        ("9999GB", "no card has so much"),
        ("9999999", "no card has so much"),
    ],
)
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
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return tmp_path / "answer"


def test_the_card_that_is_here(smi: Path) -> None:
    smi.write_text("0, GPU-a1, 24564, 1204, 8.9, NVIDIA GeForce RTX 4090\n")
    card = card_here()
    assert card is not None
    assert (card.name, card.in_use, card.note) == ("RTX 4090", 1204 * 2**20, None)
    assert card.memory == find_card("rtx-4090").memory  # what CUDA gives, less than what nvidia-smi says


def test_an_unknown_card_keeps_its_class(smi: Path) -> None:
    smi.write_text("0, GPU-a1, 20470, 0, 8.6, NVIDIA RTX A4500\n")
    card = card_here()
    assert card is not None
    assert (card.label, card.bf16) == ("NVIDIA RTX A4500, 20 GB", True)
    assert 19 * GIB < card.memory < 20470 * 2**20


THREE = (
    "0, GPU-11aa, 12288, 0, 8.6, NVIDIA GeForce RTX 3060\n"
    "1, GPU-22bb, 24564, 0, 8.9, NVIDIA GeForce RTX 4090\n"
    "2, GPU-33cc, 15360, 0, 7.5, Tesla T4\n"
)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "RTX 4090"),  # the fastest is CUDA's first
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, "RTX 4090"),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, "RTX 3060"),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "T4"),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, "RTX 3060"),
        ({"CUDA_VISIBLE_DEVICES": "2", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, "T4"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-33"}, "T4"),
        ({"CUDA_VISIBLE_DEVICES": " GPU-11aa , 0"}, "RTX 3060"),
        ({"CUDA_VISIBLE_DEVICES": "0,7"}, "RTX 4090"),
        ({"CUDA_VISIBLE_DEVICES": "7,0"}, None),  # what comes after one that is not there is not seen
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "GPU-"}, None),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1234"}, None),
    ],
)
def test_of_several_cards_it_is_the_one_that_cuda_numbers_0(
    environment: dict[str, str], name: str | None, smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    smi.write_text(THREE)
    card = card_here()
    assert (None if card is None else card.name) == name
    several = environment.get("CUDA_VISIBLE_DEVICES", "0,1,2") in {"0,1,2", "2,0", "GPU-11aa , 0", " GPU-11aa , 0"}
    if card is not None:
        assert (card.note is not None) == several
    if several and card is not None and card.note is not None:
        assert card.name in card.note
        assert "CUDA_VISIBLE_DEVICES" in card.note


def test_an_old_driver_does_not_know_of_capabilities(smi: Path) -> None:
    (smi.parent / "nvidia-smi").write_text(
        "#!/bin/sh\ncase \"$*\" in *compute_cap*) exit 6;; esac\necho '0, GPU-a1, 15360, 0, Tesla T4'\n"
    )
    card = card_here()
    assert card is not None
    assert card.name == "T4"


@pytest.mark.parametrize("answer", ["", "No devices were found\n", "a, b, c\n", "0, GPU-a, [N/A], 3, 8.6, NVIDIA X\n"])
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
    assert 18e12 < card.rate < 3e15
    assert 50 < card.watts <= 1000
    assert (7, 0) <= card.capability <= (12, 0)
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
        ("RTX 2060", 1920, 1.680, 8),  # Turing has half as many of these cores for each of its tensor cores
        ("RTX 2080", 2944, 1.710, 8),
        ("RTX 3050", 2560, 1.777, 4),
        ("RTX 3080 Ti", 10240, 1.665, 4),
        ("RTX PRO 6000 Blackwell", 24064, 2.617, 8),
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
