"""Four kinds of canaries, and where they are not: no file, log, traceback, tracker's folder, message or repr."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path

import pytest

from finetune.bugs import report
from finetune.config.load import load
from finetune.errors import ConfigError
from finetune.redaction import REMOVED, redacted, redacted_command, secrets_of
from finetune.runs.log import logged
from finetune.runs.manifest import provenance
from tests.privacy.conftest import CANARIES, CONFIG, ENVIRONMENT, KWARGS, LOGIN, URL, Journey, write_project


def holding(folder: Path, wanted: tuple[str, ...] = CANARIES) -> dict[str, list[str]]:
    """Files below a folder → what of `wanted` is in their bytes."""
    needles = {canary: canary.encode() for canary in wanted}
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if there := [canary for canary, needle in needles.items() if needle in content]:
                found[str(path.relative_to(folder))] = there
    return found


CONFIGS = ("tiny.yaml", "unknown.yaml", "number.yaml", "login.yaml", "file.yaml", "query.yaml")


def test_no_canary_in_any_file(journey: Journey) -> None:
    """Runs (also a failed one, and wandb's folder in one), the log, the Modelfile, what came out on the side."""
    found = {name: there for name, there in holding(journey.folder).items() if name not in CONFIGS}
    assert {name: there for name, there in found.items() if not name.endswith("/config.yaml")} == {}
    top = journey.folder.parent
    assert holding(top / "tmp") == {}
    assert set(holding(top / "home")) == {".cache/huggingface/token"}
    assert (journey.folder / "failed" / "tiny" / "log.txt").is_file()


def test_transformers_arguments_are_not_kept(journey: Journey) -> None:
    """training_args.bin is a pickle, and would hold the token of the Hub if one were ever handed to the trainer."""
    assert (journey.folder / "before" / "tiny" / "checkpoints").is_dir()
    assert list(journey.folder.rglob("training_args*")) == []


def test_a_comment_of_the_config_does_not_bring_a_token_into_the_run(journey: Journey) -> None:
    assert "remember: [removed]" in (journey.folder / "before" / "tiny" / "config.yaml").read_text("utf-8")
    assert set(holding(journey.folder)) <= set(CONFIGS)


def test_the_manifest_keeps_no_secret_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(tmp_path)
    command = ["ft", "train", "tiny.yaml", "--api-key", KWARGS, "--runs", LOGIN]
    monkeypatch.setattr(sys, "argv", command)
    kept = provenance(load(tmp_path / "tiny.yaml", [f"chat_template={tmp_path / CONFIG}.jinja"], references=False))
    assert kept["command"] == ["ft", "train", "tiny.yaml", "--api-key", REMOVED, "--runs", REMOVED]
    assert kept["overrides"] == [f"chat_template={tmp_path}/{REMOVED}.jinja"]


def test_no_canary_in_what_a_person_sees(journey: Journey) -> None:
    shown = {" ".join(one.arguments): c for one in journey.outcomes for c in CANARIES if c in one.stdout + one.stderr}
    assert shown == {}
    refused = journey.outcomes[:10]
    assert all(one.code == 2 and "error: " in one.stderr for one in refused)
    assert "hub_token: unknown key" in refused[0].stderr
    assert REMOVED in refused[1].stderr  # the value of a wrong type, which is repeated
    assert "models.example" in refused[2].stderr, "what is not secret is still said"


def test_the_tracker_is_told_numbers_and_nothing_else(journey: Journey) -> None:
    pytest.importorskip("wandb")
    tracked = journey.folder / "tracked" / "tiny" / "wandb"
    (record,) = tracked.glob("offline-run-*/*.wandb")
    content = record.read_bytes()
    assert b"learning_rate" in content
    assert b"--runs" not in content, "the command line"
    assert not list(tracked.rglob("output.log")), "what was printed"


def test_a_config_that_loads_has_no_secret_to_show(tmp_path: Path) -> None:
    write_project(tmp_path)
    loaded = load(tmp_path / "tiny.yaml")
    assert not [canary for canary in CANARIES if canary in repr(loaded)]
    for name in ("unknown", "number", "login", "file", "query"):
        with pytest.raises(ConfigError):
            load(tmp_path / f"{name}.yaml")


def test_the_file_of_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    everything = " ".join((*ENVIRONMENT.values(), CONFIG, f"https://user:{URL[0]}@host/x?token={URL[1]}"))
    try:
        try:
            raise KeyError(everything)
        except KeyError as cause:
            raise ValueError(f"no {everything}") from cause
    except ValueError as error:
        said = report(error)
    text = str(said) + str(said.problems[0].hint)
    path = Path(text.partition("the traceback is in ")[2].partition(";")[0])
    try:
        written = path.read_text("utf-8")
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        path.unlink()
    assert "ValueError: no " in written
    assert "test_secrets.py" in written
    assert not [canary for canary in (*ENVIRONMENT.values(), CONFIG, *URL) if canary in written + text]


@pytest.mark.fault("no room for the file of a traceback", stage="any", outcome="one line without secrets; no traceback")
@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_traceback_that_cannot_be_written(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> tuple[int, str]:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT["HF_TOKEN"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if where == "folder":
        monkeypatch.setattr(tempfile, "mkstemp", full)
    else:
        monkeypatch.setattr("builtins.open", full)
    (problem,) = report(ValueError(f"no {ENVIRONMENT['HF_TOKEN']}\nand more")).problems
    assert problem.message == f"this is a bug in ft: ValueError: no {REMOVED}"
    assert "no file could be written" in str(problem.hint)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_cannot_say_what_it_is() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    said = report(Mute())
    assert "Mute: it cannot say what" in str(said)
    Path(str(said.problems[0].hint).removeprefix("the traceback is in ").partition(";")[0]).unlink()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("hf_abcdefghijklmnopqrstuvwxyz012345678", REMOVED),
        ("api_key = 0123456789abcdef0123456789abcdef01234567", f"api_key = {REMOVED}"),
        ("wandb_v1_abcdefghijklmnop_qrst", REMOVED),
        ("sk-proj-abcdefghij0123456789", REMOVED),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", REMOVED),
        ("https://user:pa@ss@host/x", f"https://{REMOVED}@host/x"),
        ("/home/me/https:/user:pass@host/x.jsonl", f"/home/me/https:/{REMOVED}@host/x.jsonl"),
        ("https://host/x?token=abcdefgh&a=1", f"https://host/x?token={REMOVED}&a=1"),
        ("https://s3/x?X-Amz-Signature=0123456789ab", f"https://s3/x?X-Amz-Signature={REMOVED}"),
        ("{'hub_token': 'abcd1234efgh'}", f"{{'hub_token': '{REMOVED}'}}"),
        (r"{\"api-key\": \"Zx9Zx9Zx9Zx9\"}", rf"{{\"api-key\": \"{REMOVED}\"}}"),
        ("password: hunter2x", f"password: {REMOVED}"),
        ("password=correct-horse-battery-staple", f"password={REMOVED}"),
        (
            "DefaultEndpointsProtocol=https;AccountKey=Zm9vYmFyYmF6+/x0==;x",
            f"DefaultEndpointsProtocol=https;AccountKey={REMOVED};x",
        ),
        ("OPENAI_KEY=0a1b2c3d4e5f6a7b", f"OPENAI_KEY={REMOVED}"),
        ("nvapi-abcdefghijklmnopqrst", REMOVED),
        ("gsk_abcdefghijklmnopqrstuvwxyz", REMOVED),
        ("Bearer aBcDeFgHiJkL", f"Bearer {REMOVED}"),
        ("Authorization: Bearer abcdefgh", f"Authorization: Bearer {REMOVED}"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0xxx.abcdefghijklmnop", REMOVED),
        ("q-eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0xxx.abcdefghijklmnop", f"q-{REMOVED}"),
    ],
)
def test_what_is_recognised(text: str, left: str) -> None:
    assert redacted(text, ()) == left
    assert redacted(left, ()) == left
    assert redacted(f"a\n{text}\nb", ()) == f"a\n{left}\nb"


@pytest.mark.parametrize(
    "text",
    [
        "revision 0123456789abcdef0123456789abcdef01234567",
        "sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "pad_token='<|endoftext|>', eos_token_id=151645, max_new_tokens=100000000",
        "special token: something, stop_token=endofturn",
        "tokens: 123456789 of 200000000",
        "git@github.com:owner/repository.git",
        "somebody@example.com, see https://example.com/a",
        "sk-learn-is-not-what-this-is",
        "12,345 tokens with loss",
        "token: assistant",
        "signature: contract_clause",
        "data/secret:2021-contracts.jsonl: not a file",
        "secret:Qwen2.5-7B-Instruct",
        "token: LlamaForCausalLM",
        "Basic understanding, Bearer instruments",
        "signature: 合同条款合同条款合同条款合同条款",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert redacted(text, ()) == text


def test_values_of_the_environment_are_found_wherever_they_stand(tmp_path: Path) -> None:
    environment = {
        "HF_TOKEN": "swordfish1",
        "MY_DB_PASSWORD": "swordfish-12",
        "TOKENIZERS_PARALLELISM": "true-enough",
        "HF_TOKEN_PATH": "some/where/token",
        "SHORT_SECRET": "abc",
        "MAX_TOKENS": "123456789",
        "SECRETS_AT": "/run/secrets/all",
        "SECRETS_HERE": str(tmp_path),
        "HOME": "/home/swordfish",
        "DB_PASSWORD": "contract",
        "ACCESS_KEY": "contract_clause",
        "EOS_TOKEN": "<|im_end|>",
        "SECRET_DATA": "2021-contracts.jsonl",
        "AWS_SECRET_ACCESS_KEY": "/wJalrXUtnFEMI/K7MDENG/bPxRfiCYZX0TESTKE",
        "OPENAI_KEY": "correct horse battery staple",
        "WANDB_KEY": "p&ssword",
    }
    found = (environment["AWS_SECRET_ACCESS_KEY"], environment["OPENAI_KEY"], "swordfish-12", "swordfish1", "p&ssword")
    assert secrets_of(environment) == found
    assert redacted("xswordfish-12x /home/swordfish", found) == f"x{REMOVED}x /home/swordfish"


def test_command_lines() -> None:
    command = [
        "ft",
        "serve",
        "x",
        "--api-key",
        "short",
        "--api-key=canary-1",
        "-s",
        "hub_token=canary-2",
        "--port",
        "1",
    ]
    kept = [
        "ft",
        "serve",
        "x",
        "--api-key",
        REMOVED,
        f"--api-key={REMOVED}",
        "-s",
        f"hub_token={REMOVED}",
        "--port",
        "1",
    ]
    assert redacted_command(command) == kept


@pytest.mark.parametrize(
    "piece",
    [
        *("a", "token", "-sk-", "hf_", "gho_", "wandb_v1", ":/a", ":/@", ".eyJ", "eyJ", "eyJaaaaaaaaaa.", "=", "?sig="),
        *("Bearer ", "token = ", "token=\"'", "password=aB3", "token=%", "A:/" + "a" * 50 + "@", "eyJ" + "a" * 99),
        '{"role": "user", "content": "The signature of the tenant is required."}, ',
    ],
)
def test_long_lines_cost_little(piece: str) -> None:
    """No text of a library, however long, makes the log wait. 100 kB took 30 ms at most; where each of many places
    reads the rest of the text it took over a second."""
    text = piece * (100_000 // len(piece)) + "@a://b@c token .eyJ"
    began = time.process_time()
    redacted(text, ())
    assert time.process_time() - began < 0.3


def test_the_log_takes_no_secret_whoever_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT["HF_TOKEN"])
    monkeypatch.setattr(sys, "argv", ["ft", "serve", "x", "--api-key", KWARGS])
    path = tmp_path / "log.txt"
    with logged(path):
        print("a library has", ENVIRONMENT["HF_TOKEN"])
        print("and", CONFIG, file=sys.stderr)
        logging.getLogger("library").warning("cannot fetch https://user:%s@host/x", URL[0])
    log = path.read_text("utf-8")
    assert not [canary for canary in CANARIES if canary in log]
    for said in (
        "ft serve x --api-key [removed]",
        "a library has [removed]",
        "and [removed]",
        "https://[removed]@host/x",
    ):
        assert said in log
