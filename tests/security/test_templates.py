"""Chat templates that mean harm: they see nothing of ours, run for a bounded time, and take bounded memory."""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.data import limits
from finetune.data.answers import AnswerFinder
from finetune.data.conversation import Conversation, Message
from finetune.data.jinja import TemplateRefusal
from finetune.data.template import ChatTemplate
from finetune.errors import BaseError

from .conftest import World

TALK = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASK = Conversation((Message("user", "Where?"), Message("assistant", "Here.")), "rows.jsonl:1")
PLAIN = "[user]Where?</s>[assistant]Here.</s>"

SPECIAL, DAY = {"bos_token": "<s>", "eos_token": "</s>"}, datetime.datetime(2026, 1, 2)

Way = Callable[[str], str]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(
        source + TALK, {"bos_token": "<s>", "eos_token": "</s>"}, "t.jinja", datetime.datetime(2026, 1, 2)
    )


def on_symbols(source: str) -> str:
    return AnswerFinder(template(source)).render(ASK, [1]).text


def on_texts(source: str) -> str:
    return template(source).render(ASK.messages)


ways = pytest.mark.parametrize("way", [on_symbols, on_texts])

# -- what a template can see --------------------------------------------------------------------------------------

RUN = "os.popen('touch canary').read()"
ESCAPES = {
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "mro of a content": "{{ messages[0].content.__class__.__base__.__subclasses__() }}",
    "cycler": f"{{{{ cycler.__init__.__globals__.{RUN} }}}}",
    "joiner": f"{{{{ joiner.__init__.__globals__.{RUN} }}}}",
    "namespace": f"{{{{ namespace.__init__.__globals__.{RUN} }}}}",
    "lipsum": f"{{{{ lipsum.__globals__.{RUN} }}}}",
    "own function": "{{ raise_exception.__globals__['json'].codecs.open('canary', 'w') }}",
    "attr filter": "{{ (''|attr('__class__')|attr('__mro__'))[1]|attr('__subclasses__')() }}",
    "map attribute": "{{ ['']|map(attribute='__class__')|first|attr('__base__')|attr('__subclasses__')() }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format of a content": "{{ (messages[0].content ~ '{0.__class__.__mro__}').format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "sort attribute": "{{ [messages]|sort(attribute='__class__.__base__')|first|attr('__class__')|attr('mro')() }}",
    "self": f"{{{{ self._TemplateReference__context.environment.{RUN} }}}}",
    "caller's frame": "{{ (messages|map(attribute='role')).gi_frame.f_globals }}",
    "block set": "{% set x = ''.__class__ %}{{ x.__base__.__subclasses__() }}",
    "import": "{% import 'os' as os %}{{ os.system('touch canary') }}",
    "include": "{% include '/etc/passwd' %}",
    "class method": "{{ dict.update(messages[0], {'content': 'something else'}) }}",
    "list method": "{{ messages.append(1) }}",
}


@ways
@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES.keys())
def test_no_way_out(way: Way, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(TemplateRefusal):
        assert way(source) == PLAIN  # what it asked for is not there, and says nothing
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "inner", ["session", "expression", "session.values", "strip.func", "strip.args", "strip.keywords"]
)
def test_what_makes_a_symbol_of_a_text_is_not_there_for_templates(inner: str) -> None:
    """Found here: a template could walk from a message's content to the proof that runs it."""
    path = [f"['{name}']" for name in inner.split(".")]
    for source in (f"{{{{ messages[0].content.{inner} }}}}", f"{{{{ messages[0].content{''.join(path)} }}}}"):
        seen = []
        for way in (on_symbols, on_texts):
            try:
                seen.append(way(source))
            except TemplateRefusal as refusal:
                seen.append(str(refusal))
        assert seen[0] == seen[1]
        assert "Session" not in seen[0]


# -- time and memory ----------------------------------------------------------------------------------------------

DOUBLE = "{%% set n = namespace(s=%s) %%}{%% for i in range(80) %%}{%% set n.s = %s %%}{%% endfor %%}{{ n.s }}"
BOMBS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "cycler": "{% set c = cycler(1) %}{% for a in range(99999) %}{% for b in range(99999) %}{{ c.next() }}"
    "{% endfor %}{% endfor %}",
    "contents": "{% for a in range(99999) %}{% for b in range(99) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
    "power": "{% set n = 10 ** 10 %}{{ 10 ** n }}",
    "constant power": "{{ 10 ** (10 ** 10) }}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "percent": "{{ '%1000000000000d' % 1 }}",
    "format": "{{ '{:10000000000d}'.format(1) }}",
    "center": "{{ 'a'|center(10 ** 10) }}",
    "ljust": "{{ messages[0].content.ljust(10 ** 10) }}",
    "indent": "{{ messages[0].content|indent(10 ** 10, true) }}",
    "JSON": "{{ messages|tojson(indent=10 ** 10) }}",
    "batch": "{{ [1]|batch(10 ** 10, 'x')|list }}",
    "bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "replace": "{{ messages[0].content.replace('', 'x' * 10 ** 7).replace('', 'x' * 1000) }}",
    "join": "{{ ('x' * 10 ** 6).join(range(100000)|map('string')) }}",
    "doubled text": DOUBLE % ("'aaaa'", "n.s ~ n.s"),
    "doubled content": DOUBLE % ("messages[0].content", "n.s + n.s"),
    "doubled list": DOUBLE % ("[1]", "n.s + n.s"),
    "nested lists": DOUBLE % ("[1]", "[n.s, n.s]"),
    "much output": "{% for a in range(9999) %}{{ 'a' * 10000 }}{% endfor %}",
    "compiling": "{{ " + "1 + " * 100_000 + "1 }}",
    "source": "{# " + "x" * 2**20 + " #}",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.1)
    monkeypatch.setattr(limits, "BYTES", 2**27)


@pytest.mark.fault("a chat template that loops or grows without end", stage="preparing data", outcome="stopped, named")
# The signal may come in a callback of the garbage collector, where what is raised is lost; then it comes again.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@ways
@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS.keys())
def test_no_template_runs_for_ever_or_fills_the_memory(impatient: None, way: Way, source: str) -> None:
    with pytest.raises(BaseError) as caught:
        way(source)
    assert not isinstance(caught.value, TemplateRefusal)  # that would be one row; this ends the preparation
    (problem,) = caught.value.problems
    assert problem.place == "t.jinja"
    assert "chat_template: chatml | plain | path.jinja" in (problem.hint or "")


@pytest.mark.parametrize("source", ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ " + "(" * 10_000])
def test_recursion_ends_by_itself(source: str) -> None:
    with pytest.raises(BaseError, match="recursion"):
        on_symbols(source)


def test_what_one_conversation_makes_of_an_outline_another_may_not(impatient: None) -> None:
    """An outline that was learnt from a short text is filled with a long one, without the template."""
    finder = AnswerFinder(template("{{ messages[0].content.replace('a', 'x' * 1000000) }}"))
    assert len(finder.render(ASK, [1]).text) == len("Where?" + PLAIN)
    bomb = Conversation((Message("user", "a" * 10_000), *ASK.messages[1:]), "rows.jsonl:2")
    with pytest.raises(BaseError, match="wants more than 128 MB"):
        finder.render(bomb, [1])
    repeating = AnswerFinder(template("{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"))
    repeating.render(ASK, [1])
    with pytest.raises(BaseError, match="characters of one conversation"):
        repeating.render(Conversation((Message("user", "a" * 100_000), *ASK.messages[1:]), "rows.jsonl:2"), [1])


def test_bounds_leave_nothing_behind(impatient: None) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    for source in (BOMBS["loop"], BOMBS["times"], "", "{{ raise_exception('no') }}"):
        with contextlib.suppress(BaseError):
            on_texts(source)
        assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before
        assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    # Long after: no signal comes any more.
    began = time.process_time()
    while time.process_time() < began + 0.2:
        pass


def test_the_clock_runs_for_templates_alone(impatient: None) -> None:
    with limits.bounds("t.jinja"):
        assert on_texts("") == PLAIN
        began = time.process_time()
        while time.process_time() < began + 0.2:  # reading rows, for instance
            pass
        with pytest.raises(BaseError, match=r"stopped after 0\.1 seconds"):
            on_texts(BOMBS["loop"])


def test_other_threads_render_too() -> None:
    made: list[str] = []
    thread = threading.Thread(target=lambda: made.append(on_texts("")))
    thread.start()
    thread.join()
    assert made == [PLAIN]


def test_a_limit_of_the_persons_own_stays() -> None:
    """`ulimit -v` below ours is what holds."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    own = pages * resource.getpagesize() + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (own, before[1]))
    try:
        with limits.bounds("t.jinja"):
            assert resource.getrlimit(resource.RLIMIT_AS)[0] == own
        assert resource.getrlimit(resource.RLIMIT_AS)[0] == own
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", ["meta-llama-Llama-3.1-8B-Instruct", "Qwen-Qwen3-0.6B", "google-gemma-4-31B-it"])
def test_a_long_conversation_is_no_bomb(assets: Path, name: str) -> None:
    """100,000 tokens, in 2 and in 200 messages."""
    source = (assets / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    own = ChatTemplate(source, SPECIAL, name, DAY)
    for turns in (1, 100):
        said = "word of law. " * (15_000 // turns)
        messages = tuple(Message(role, said) for _ in range(turns) for role in ("user", "assistant"))
        rendered = AnswerFinder(own, lenient=True).render(Conversation(messages, "here"), [2 * turns - 1])
        assert len(rendered.text) > 380_000


# -- the real commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("escape", ["cycler", "lipsum", "attr filter"])
def test_an_escape_through_the_real_command(world: World, escape: str) -> None:
    (world.folder / "t.jinja").write_text(ESCAPES[escape] + TALK)
    assert "refuses this conversation" in world.refused("data", "c.yaml", "-s", "chat_template=t.jinja")


@pytest.mark.parametrize("bomb", ["loop", "doubled content"])
def test_a_base_whose_template_is_a_bomb(world: World, bomb: str) -> None:
    (world.base / "chat_template.jinja").unlink()
    world.merge_json("base/tokenizer_config.json", chat_template=BOMBS[bomb] + TALK)
    said = world.refused("data", "c.yaml")
    assert "the chat template was stopped" in said
    assert "of base" in said
    assert "chat_template: chatml | plain | path.jinja" in said


def test_a_bomb_in_a_worker(world: World) -> None:
    """Many rows are rendered in processes of their own."""
    line = json.dumps({"question": "Where?", "answer": "Here."})
    (world.folder / "rows.jsonl").write_text((line + "\n") * 2200 + json.dumps({"question": "?", "answer": "!"}) + "\n")
    source = "{% if messages[0].content == '?' %}" + BOMBS["loop"] + "{% endif %}"
    (world.folder / "t.jinja").write_text(source + TALK)
    assert "t.jinja: the chat template was stopped" in world.refused("data", "c.yaml", "-s", "chat_template=t.jinja")
