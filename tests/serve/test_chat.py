"""`ft chat`: what a line of input does, with an answerer that is told what to say, and with the real command."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from finetune.console import Console
from finetune.data.conversation import Message
from finetune.data.jinja import TemplateRefusal
from finetune.errors import ExportError, RunError
from finetune.runs.folder import RunFolder
from finetune.serve import chat, server
from finetune.serve.artifact import Artifact, newest_artifact
from finetune.serve.chat import Conversation, _lines
from tests.conftest import RunFt
from tests.serve.conftest import ONCE
from tests.serve.test_server import free_port, posix


class Answerer:
    """Answers `1`, `2`, … and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self.fails_with: BaseException | None = None
        self.closed = 0

    def __call__(self, history: list[Message]) -> Generator[str, None, None]:
        self.asked.append([(message.role, message.content) for message in history])
        try:
            yield "answer "
            if self.fails_with is not None:
                raise self.fails_with
            yield str(len(self.asked))
        finally:
            self.closed += 1


@pytest.fixture
def answerer() -> Answerer:
    return Answerer()


def conversation(answerer: Answerer, system: str | None = None) -> Conversation:
    return Conversation(answerer, system, Console())


def test_what_was_said_is_sent_along(answerer: Answerer, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(answerer, "be kind")
    assert talk.take("one")
    assert talk.take("two")
    assert answerer.asked[1] == [("system", "be kind"), ("user", "one"), ("assistant", "answer 1"), ("user", "two")]
    assert capsys.readouterr().out == "answer 1\nanswer 2\n"


def test_reset_forgets_the_conversation_and_keeps_the_system_message(answerer: Answerer) -> None:
    talk = conversation(answerer, "be kind")
    for line in ("one", "/reset", "two"):
        assert talk.take(line)
    assert answerer.asked[1] == [("system", "be kind"), ("user", "two")]


def test_the_system_message_is_replaced_and_removed(answerer: Answerer) -> None:
    talk = conversation(answerer, "be kind")
    for line in ("/system be  short\nand clear", "one", "/system", "two"):
        assert talk.take(line)
    assert answerer.asked[0][0] == ("system", "be  short\nand clear")
    assert [role for role, _ in answerer.asked[1]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("line", ["/rest", "/system_x", "/", "/Reset"])
def test_an_unknown_command_is_said_so_and_not_sent(
    answerer: Answerer, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    assert conversation(answerer).take(line)
    assert f"there is no command {line};" in capsys.readouterr().err
    assert answerer.asked == []


@pytest.mark.parametrize("line", [" /reset", "/etc/passwd is what?", "what does /help do?"])
def test_other_texts_with_a_slash_are_sent(answerer: Answerer, line: str) -> None:
    assert conversation(answerer).take(line)
    assert answerer.asked == [[("user", line.strip())]]


def test_help_lists_every_command(answerer: Answerer, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(answerer)
    assert talk.take("/help")
    shown = capsys.readouterr().err
    for command in re.findall(r"^  (/\w+)", shown, re.MULTILINE):
        assert talk.take(command) is (command != "/quit")
    assert "there is no command" not in capsys.readouterr().err
    assert len(re.findall(r"^  /", shown, re.MULTILINE)) == 4


def test_an_empty_line_is_nothing(answerer: Answerer) -> None:
    assert conversation(answerer).take("  ")
    assert answerer.asked == []


def test_an_interrupted_answer_stays_as_far_as_it_came(answerer: Answerer, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(answerer)
    answerer.fails_with = KeyboardInterrupt()
    assert talk.take("one")
    answerer.fails_with = None
    assert talk.take("two")
    assert answerer.asked[1] == [("user", "one"), ("assistant", "answer "), ("user", "two")]
    assert answerer.closed == 2
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ExportError("the context is full"), TemplateRefusal("no system, please")])
def test_a_question_that_cannot_be_answered_is_left_out(
    answerer: Answerer, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = conversation(answerer)
    answerer.fails_with = error
    assert talk.take("one")
    answerer.fails_with = None
    assert talk.take("two")
    assert answerer.asked[1] == [("user", "two")]
    assert f"error: {error}" in capsys.readouterr().err


def test_a_backslash_at_the_end_joins_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one \\\ntwo\\\nthree\r\n\nfour\nfive\\"))
    assert list(_lines(Console())) == ["one \ntwo\nthree", "", "four", "five\n"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ESCAPES = "a\x1b]0;owned\x07b\x1b[2Jc\x1b]52;c;cm0=\x07d\x9b2J\x7f\r\n\té"


def test_a_terminal_is_not_commanded_by_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(history: list[Message]) -> Generator[str, None, None]:
        yield from (ESCAPES[:2], ESCAPES[2:])  # a sequence in two pieces

    terminal = Terminal()
    talk = Conversation(answer, None, Console())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert talk.take("one")
    assert terminal.getvalue() == r"a\x1b]0;owned\x07b\x1b[2Jc\x1b]52;c;cm0=\x07d\x9b2J\x7f\r" + "\n\té\n"
    assert talk.turns[1].content == ESCAPES  # the model is told what it said


def test_a_file_gets_what_the_model_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(history: list[Message]) -> Generator[str, None, None]:
        yield ESCAPES

    assert Conversation(answer, None, Console()).take("one")
    assert capsys.readouterr().out == ESCAPES + "\n"


# -- which artifact -----------------------------------------------------------------------------------------------


def test_the_newest_artifact_is_taken(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "legal")
    paths = [run.merged, run.gguf / "legal-q8_0.gguf", run.adapter, run.gguf / "legal-lora-f16.gguf"]
    run.gguf.mkdir(parents=True)
    for age, path in enumerate(paths):
        if path.suffix:
            path.touch()
        else:
            path.mkdir()
        os.utime(path, (1000 - age, 1000 - age))
    assert newest_artifact(run, "auto", "chat").path == run.merged
    os.utime(run.gguf / "legal-q8_0.gguf", (2000, 2000))
    os.utime(run.gguf / "legal-lora-f16.gguf", (3000, 3000))  # an adapter alone is no model
    assert newest_artifact(run, "auto", "chat").path == run.gguf / "legal-q8_0.gguf"
    assert newest_artifact(run, "adapter", "chat").kind == "adapter"
    with pytest.raises(RunError, match="--using is one of"):
        newest_artifact(run, "best", "chat")


def exported(run: RunFolder, name: str, age: int, weights: bytes | None) -> Path:
    """An artifact, and in verification.json the adapter that it was made of (None: there is no such record)."""
    path = run.path / name
    if path.suffix:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    else:
        path.mkdir()
    os.utime(path, (5000 - age, 5000 - age))
    known = json.loads(run.verification.read_text("utf-8")) if run.verification.exists() else {}
    if weights is not None:
        adapter = {"adapter_model.safetensors": hashlib.sha256(weights).hexdigest()}
        run.verification.write_text(json.dumps(known | {name: {"sha256": "0" * 64, "adapter": adapter}}))
    return path


def test_what_was_made_of_the_adapter_as_it_is_now_comes_first(tmp_path: Path) -> None:
    """A run that was given more steps has another adapter than the one that was exported."""
    run = RunFolder(tmp_path / "legal")
    run.adapter.mkdir(parents=True)
    (run.adapter / "adapter_model.safetensors").write_bytes(b"six steps")
    os.utime(run.adapter, (1000, 1000))
    old = exported(run, "gguf/legal-q8_0.gguf", 1, b"four steps")
    merged = exported(run, "merged", 2, b"four steps")
    assert newest_artifact(run, "auto", "chat") == Artifact("adapter", run.adapter)
    assert newest_artifact(run, "gguf", "chat") == Artifact("gguf", old, of_another=True)
    assert newest_artifact(run, "merged", "chat") == Artifact("merged", merged, of_another=True)
    now = exported(run, "gguf/legal-f16.gguf", 3, b"six steps")
    assert newest_artifact(run, "gguf", "chat") == Artifact("gguf", now)
    unrecorded = exported(run, "gguf/legal-f32.gguf", 2, None)  # nothing is known against it
    assert newest_artifact(run, "gguf", "chat") == Artifact("gguf", unrecorded)


@pytest.mark.parametrize("known", ["[1]", "{", '{"merged": 1}', '{"merged": {"adapter": "x"}}'])
def test_a_record_that_says_nothing_about_an_adapter(tmp_path: Path, known: str) -> None:
    run = RunFolder(tmp_path / "legal")
    run.adapter.mkdir(parents=True)
    exported(run, "merged", 0, None)
    run.verification.write_text(known)
    assert newest_artifact(run, "merged", "chat") == Artifact("merged", run.merged)


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_an_answer_of_another_adapter_is_announced_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    run = RunFolder(tmp_path / "legal")
    run.adapter.mkdir(parents=True)
    file = exported(run, "gguf/legal-q8_0.gguf", 0, b"four steps")
    for module in (chat, server):
        monkeypatch.setattr(module, "check_artifact", lambda *_: None)
    monkeypatch.setattr(chat, "open_answers", lambda *_: Answerer())
    monkeypatch.setattr(server, "_serve_gguf", lambda *_: None)
    if command == "chat":
        chat.talk(run, chat.Settings("gguf", None, 5, 0.0), "hello", Console())
    else:
        server.serve(run, server.Settings("auto", "127.0.0.1", free_port(), None, 64, 0, 1), Console())
    assert capsys.readouterr().err.startswith(
        f"warning: {file} was made of another adapter than this run has now: remove it, and "
        f"`ft export {run.path} --to gguf` makes it anew\n"
    )


# -- the real command ---------------------------------------------------------------------------------------------


def test_a_prompt_from_stdin_is_answered(story_run: Path) -> None:
    command = [sys.executable, "-m", "finetune.cli", "chat", str(story_run), "--max-tokens", "12", "--prompt"]
    piped = subprocess.run([*command, "-"], input=f"{ONCE}\n", capture_output=True, text=True)
    given = subprocess.run([*command, ONCE], capture_output=True, text=True)
    assert piped.stdout == given.stdout
    assert piped.stdout.startswith(", there was")
    empty = subprocess.run([*command, "-"], input="", capture_output=True, text=True)
    assert empty.returncode == 2
    assert "the prompt is empty" in empty.stderr


@posix
def test_bytes_that_are_no_text_are_read_as_such(story_run: Path) -> None:
    command = [sys.executable, "-m", "finetune.cli", "chat", str(story_run), "--max-tokens", "4", "--using", "gguf"]
    for more, given in (
        ([b"--prompt", b"Once \xff upon"], b""),
        ([b"--prompt", b"-", b"--system", b"\xfe"], b"Once \xff upon"),
        ([], b"Once \xff upon\nOnce\n"),
    ):
        done = subprocess.run([*map(os.fsencode, command), *more], input=given, capture_output=True)
        assert (done.returncode, b"error" in done.stderr) == (0, False), done.stderr
        assert done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("how", [["--prompt", ONCE], []], ids=["prompt", "conversation"])
def test_an_answer_that_cannot_be_written_is_an_error(story_run: Path, how: list[str]) -> None:
    command = [sys.executable, "-m", "finetune.cli", "chat", str(story_run), "--max-tokens", "4", *how]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, input=f"{ONCE}\n", stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: stdout: the answer cannot be written: No space left on device"


@pytest.mark.parametrize("temperature", ["nan", "inf"])
def test_a_temperature_is_a_number(story_run: Path, run_ft: RunFt, temperature: str) -> None:
    result = run_ft("chat", story_run, "--prompt", "Hi", "--temperature", temperature)
    assert result.code == 2
    assert f"--temperature: {temperature} is no temperature" in result.stderr


def test_a_whole_conversation(story_run: Path) -> None:
    entered = f"{ONCE}\n/nonsense\n/reset\n{ONCE}\n/quit\nnever read\n"
    command = [sys.executable, "-m", "finetune.cli", "chat", str(story_run), "--max-tokens", "12"]
    done = subprocess.run(command, input=entered, capture_output=True, text=True)
    assert done.returncode == 0
    first, second = done.stdout.splitlines()
    assert first == second
    assert "there is no command /nonsense" in done.stderr


def test_a_file_that_is_no_model_is_an_error(story_run: Path, tmp_path: Path, run_ft: RunFt) -> None:
    run = tmp_path / "broken"
    (run / "gguf").mkdir(parents=True)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "manifest.json").write_text("{}")
    (run / "gguf" / "broken-f16.gguf").write_bytes(b"GGUF and nothing more")
    result = run_ft("chat", run, "--prompt", "hello", "--using", "gguf")
    assert result.code == 1
    assert "broken-f16.gguf: is GGUF of version 1684955424, and only 2 and 3 are known" in result.stderr


@posix
def test_ctrl_c_stops_the_answer_and_not_the_conversation(story_run: Path) -> None:
    command = [sys.executable, "-m", "finetune.cli", "chat", str(story_run), "--max-tokens", "450"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{ONCE}\n".encode())
    begun = b""
    while len(begun) < 8:
        begun += process.stdout.read(8 - len(begun))
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(f"/reset\n{ONCE}\n/quit\n".encode(), timeout=60)
    assert process.returncode == 0
    assert b"stopped" in said
    assert b"forgotten" in said
    # The first answer is the beginning of the second, which is whole.
    assert begun == b", there "
    first, second = rest.split(begun, 1)
    assert second.startswith(first)
    assert len(first) < len(second)
