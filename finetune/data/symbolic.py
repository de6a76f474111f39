"""Running a chat template on texts that know where they come from.

A template is rendered with a `Symbol` in place of each message's content. Symbols are put together, stripped, split and
so on like text, but remember what they were made from; a question about one (does it contain `</think>`? is it
empty?) is answered from the real text and written down. The result is an outline: literal texts and expressions over
the contents, which holds for every conversation that answers the questions alike. So where an answer stands in the
output is known by where it came from, not by searching, and a million conversations need no more renderings than there
are shapes. (The idea is that of concolic testing: Godefroid, Klarlund, Sen, "DART", PLDI 2005.)

Whatever a symbol cannot follow raises `Untracked`; then the template is rendered on the real text instead. Symbols
carry a placeholder as their text, so one that slipped through unseen is found in the output, or found to be missing.
"""

from __future__ import annotations

import datetime
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jinja2 import compiler, nodes
from jinja2.utils import _PassArg

from finetune.data.jinja import ChatEnvironment


class Untracked(Exception):
    """A template did something with a content that cannot be followed."""


@dataclass(frozen=True)
class Operation:
    """A pure function of a text: a method of str, a filter or test of Jinja, or an operator."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    trims: bool = False
    """Only takes white space away at the ends."""
    grows: bool = False
    """May make much more of a text than it is, by what it puts in or around it."""

    def __call__(self, value: str) -> Any:
        return self.function(value, *self.args)


@dataclass(frozen=True)
class Content:
    """One of the conversation's texts, by its number."""

    index: int

    def of(self, values: Sequence[str]) -> str:
        return values[self.index]

    def sources(self) -> frozenset[int]:
        return frozenset((self.index,))


@dataclass(frozen=True)
class Made:
    """What an operation makes of an expression; of a list of texts, its piece number `piece`."""

    base: Expression
    operation: Operation
    piece: int | None = None

    def of(self, values: Sequence[str]) -> str:
        made = self.operation(self.base.of(values))
        text: str = made if self.piece is None else made[self.piece]
        return text

    def sources(self) -> frozenset[int]:
        return self.base.sources()


@dataclass(frozen=True)
class Joined:
    """Literals and expressions, one after the other."""

    parts: tuple[str | Expression, ...]

    def of(self, values: Sequence[str]) -> str:
        return "".join([part if isinstance(part, str) else part.of(values) for part in self.parts])

    def sources(self) -> frozenset[int]:
        return frozenset().union(*(part.sources() for part in self.parts if not isinstance(part, str)))


Expression = Content | Made | Joined
Part = str | Expression


@dataclass(frozen=True)
class Condition:
    """A question that a template asked, and the answer it got."""

    base: Expression
    operation: Operation
    answer: Any

    def sources(self) -> frozenset[int]:
        return self.base.sources()

    def holds(self, values: Sequence[str]) -> bool:
        found = self.operation(self.base.of(values))
        answer = len(found) if isinstance(found, list) else found
        return type(answer) is type(self.answer) and repr(answer) == repr(self.answer)


@dataclass(frozen=True)
class Same:
    """That two expressions give the same text, as they did for the conversation at hand."""

    one: Expression
    other: Expression

    def sources(self) -> frozenset[int]:
        return self.one.sources() | self.other.sources()

    def holds(self, values: Sequence[str]) -> bool:
        return self.one.of(values) == self.other.of(values)


def whole(expression: Expression) -> bool:
    """Whether nothing but white space at the ends of a content is missing."""
    while isinstance(expression, Made) and expression.operation.trims:
        expression = expression.base
    return isinstance(expression, Content)


def grows(made: Part | Condition | Same) -> bool:
    """Whether there is an operation in it that may make much more of a text than it is."""
    match made:
        case Made() | Condition():
            return made.operation.grows or grows(made.base)
        case Joined():
            return any(map(grows, made.parts))
        case Same():
            return grows(made.one) or grows(made.other)
        case _:
            return False


@dataclass
class Session:
    """The symbols of one conversation, and what was asked about them."""

    values: Sequence[str]
    conditions: list[Condition | Same] = field(default_factory=list)

    def __post_init__(self) -> None:
        # With characters in it that quoting, escaping and formatting change, so that none of them goes unnoticed.
        self._secret = secrets.token_hex(8)
        self._mark = f"\x02{self._secret}<\"'&\\\n%s{{}}"
        self._found = re.compile(re.escape(self._mark) + r"(\d+)\x03")
        self._expressions: list[Expression] = []

    def symbol(self, expression: Expression) -> Symbol:
        self._expressions.append(expression)
        return Symbol(f"{self._mark}{len(self._expressions) - 1}\x03", expression, self)

    def parts(self, text: str) -> list[Part]:
        """A text that may hold placeholders, taken apart. Adjacent literals are one."""
        found: list[Part] = []
        literal = ""
        for number, piece in enumerate(self._found.split(text)):
            expression = None if number % 2 == 0 else self._expressions[int(piece)]
            for part in (piece,) if expression is None else _flat(expression):
                if isinstance(part, str):
                    literal += part
                    continue
                if literal:
                    found.append(literal)
                found.append(part)
                literal = ""
        if literal:
            found.append(literal)
        if any("\x02" in part or self._secret in part.lower() for part in found if isinstance(part, str)):
            raise Untracked("a placeholder was changed")
        return found

    def same(self, one: Part, other: Part) -> bool:
        """Whether two parts are equal: because they are made alike, or for what the contents happen to be."""
        if one == other:
            return True
        if isinstance(one, str) or isinstance(other, str) or one.of(self.values) != other.of(self.values):
            return False
        self.conditions.append(Same(one, other))
        return True

    def tracked(self, value: Any) -> Any:
        """A text that was put together out of our sight, as a symbol again."""
        if type(value) is str and "\x02" in value:
            return self.symbol(Joined(tuple(self.parts(value))))
        return value

    def apply(self, symbol: Symbol, operation: Operation) -> Any:
        """What an operation gives: a symbol for a text; anything else as it is, with the answer written down."""
        if _holds_symbol(operation.args):
            raise Untracked("two contents are compared")
        try:
            hash(operation)
        except TypeError as error:
            raise Untracked("an argument that is no constant") from error
        expression = symbol.expression
        try:
            result = operation(expression.of(self.values))
        except Exception as error:  # Jinja makes some of these undefined values, which other texts would not be
            raise Untracked("an operation that fails") from error
        if isinstance(result, str) and type(result) is not str:
            raise Untracked("text that is marked as safe")
        if isinstance(result, str):
            return self.symbol(Made(expression, operation))
        if isinstance(result, list | tuple) and all(isinstance(piece, str) for piece in result):
            counted = Operation(_as_list, (operation,), grows=operation.grows)
            self.conditions.append(Condition(expression, counted, len(result)))
            pieces = [self.symbol(Made(expression, operation, number)) for number in range(len(result))]
            return tuple(pieces) if isinstance(result, tuple) else pieces
        if not isinstance(result, bool | int | float | None):
            raise Untracked("a result that is neither text nor number")
        self.conditions.append(Condition(expression, operation, result))
        return result


def _as_list(value: str, operation: Operation) -> list[str]:
    return list(operation(value))


def _flat(expression: Expression) -> Iterator[Part]:
    if isinstance(expression, Joined):
        for part in expression.parts:
            if isinstance(part, str):
                yield part
            else:
                yield from _flat(part)
    else:
        yield expression


_TRIMMING = ("strip", "lstrip", "rstrip")
_GROWING = ("center", "expandtabs", "join", "ljust", "replace", "rjust", "translate", "zfill")
_METHODS = frozenset(name for name in dir(str) if not name.startswith("_")) - {"format", "format_map", "encode"}


class Symbol(str):
    """A text whose origin is known. Its characters are a placeholder; every way to look at them is followed."""

    __slots__ = ("expression", "session")
    expression: Expression
    session: Session

    def __new__(cls, placeholder: str, expression: Expression, session: Session) -> Symbol:
        made = super().__new__(cls, placeholder)
        made.expression, made.session = expression, session
        return made

    def __getattribute__(self, name: str) -> Any:
        if name in _METHODS:
            return partial(_method, self, name)
        if name in ("format", "format_map", "encode"):
            raise Untracked(name)
        return super().__getattribute__(name)

    def _ask(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.session.apply(self, Operation(function, args))

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return _join(self.session, self, other) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return _join(self.session, other, self) if isinstance(other, str) else NotImplemented

    def __bool__(self) -> bool:
        return bool(self._ask(bool))

    def __len__(self) -> int:
        return int(self._ask(len))

    def __eq__(self, other: object) -> bool:
        return bool(self._ask(str.__eq__, other)) if isinstance(other, str) else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __contains__(self, other: object) -> bool:
        return bool(self._ask(str.__contains__, other))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self._ask(_slice, key.start, key.stop, key.step)
        if not isinstance(key, int):
            raise TypeError("string indices must be integers")
        return self._ask(str.__getitem__, key)

    def __iter__(self) -> Iterator[str]:
        # Made when asked whether it could be; only walking through it looks at the text.
        raise Untracked("a walk through its characters")
        yield ""

    def _refuse(self, *_: Any) -> Any:
        raise Untracked("an operator")

    __hash__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __mul__ = __rmul__ = __mod__ = __rmod__ = __format__ = __repr__ = _refuse


Symbol.__module__, Symbol.__name__ = "builtins", "str"  # as Jinja names it when it says what has no such attribute


def _join(session: Session, left: str, right: str) -> Symbol:
    parts = [*session.parts(str.__str__(left)), *session.parts(str.__str__(right))]
    return session.symbol(Joined(tuple(parts)))


def _slice(value: str, start: int | None, stop: int | None, step: int | None) -> str:
    return value[start:stop:step]


def _within(value: str, container: str) -> bool:
    return value in container


def _method(symbol: Symbol, name: str, *args: Any) -> Any:
    args = tuple(tuple(arg) if isinstance(arg, list) else arg for arg in args)
    if name == "join" or any(isinstance(arg, Symbol) for arg in args):
        raise Untracked(name)
    trims = name in _TRIMMING and (not args or args[0] is None or not str(args[0]).strip())
    return symbol.session.apply(symbol, Operation(getattr(str, name), args, trims, name in _GROWING))


class SymbolicEnvironment(ChatEnvironment):
    """Renders with symbols. `session` is the one whose conversation is being rendered."""

    intercepted_binops = frozenset(["%", "*"])
    session: Session

    def __init__(self, today: datetime.datetime) -> None:
        super().__init__(today)
        self.session = Session(())
        self.code_generator_class = _CodeGenerator
        self.concat = self._concat  # type: ignore[method-assign,assignment,unused-ignore]
        for name, function in list(self.filters.items()):
            self.filters[name] = self._following(name, function, is_test=False)
        for name, function in list(self.tests.items()):
            self.tests[name] = self._following(name, function, is_test=True)  # type: ignore[arg-type]

    def _concat(self, pieces: Any) -> str:
        text: str = self.session.tracked("".join(pieces))
        return text

    def contains(self, item: Any, container: Any) -> bool:
        """`item in container`, which Python would answer from the characters."""
        item, container = self.session.tracked(item), self.session.tracked(container)
        if isinstance(item, Symbol) and not isinstance(container, list | tuple):
            if type(container) is not str:
                raise Untracked("a content is looked up")
            return bool(self.session.apply(item, Operation(_within, (container,))))
        return item in container

    def give_up(self) -> None:
        raise Untracked("a chain of comparisons")

    def concatenated(self, pieces: Sequence[Any]) -> str:
        """`a ~ b`."""
        return self._concat(str(piece) for piece in pieces)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(self.session.tracked(left), Symbol) or _holds_symbol((right,)):
            raise Untracked(operator)
        return self.session.tracked(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, Symbol):
            raise Untracked("a content is looked up")
        return super().getitem(self.session.tracked(obj), argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return super().getattr(self.session.tracked(obj), attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """What makes a symbol of a text is not the template's: a text has no such attributes."""
        if isinstance(obj, partial) or (isinstance(obj, Symbol) and attr not in _METHODS):
            raise Untracked("an attribute that texts do not have")
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and not isinstance(owner, Symbol):
            if getattr(__obj, "__name__", "") == "join" and len(args) == 1:
                pieces = list(args[0])
                return __self.session.tracked(str(owner).join(pieces))
            if _holds_symbol(args):
                raise Untracked("a method with a content as its argument")
        elif __obj in (__self.globals["strftime_now"], __self.globals["raise_exception"]) and _holds_symbol(args):
            raise Untracked("a function with a content as its argument")
        return __self.session.tracked(super().call(__context, __obj, *args, **kwargs))

    def _following(self, name: str, function: Callable[..., Any], *, is_test: bool) -> Callable[..., Any]:
        """A filter or test that follows symbols."""
        passed = _PassArg.from_obj(function)  # type: ignore[arg-type,unused-ignore]

        def followed(*args: Any, **kwargs: Any) -> Any:
            before, args = (args[:1], args[1:]) if passed is not None else ((), args)
            args = tuple(self.session.tracked(arg) for arg in args)
            value = args[0] if args else None
            if not isinstance(value, Symbol):
                if any(isinstance(arg, Symbol) for arg in (*args[1:], *kwargs.values())):
                    raise Untracked(name)
                return self.session.tracked(function(*before, *args, **kwargs))
            if is_test and name in _TYPE_TESTS:
                return function(*before, "any text", *args[1:], **kwargs)
            if not is_test and name in _UNCHANGING and len(args) < 3 and not kwargs:
                return value
            fixed = partial(function, *before) if before else function
            if kwargs:
                fixed = partial(fixed, **kwargs)
            known = self._known.setdefault((name, is_test, tuple(sorted(kwargs.items()))), fixed)
            trims = name == "trim" and not args[1:]
            return self.session.apply(value, Operation(known, args[1:], trims, not is_test and name not in _SHORT))

        if passed is not None:
            followed.jinja_pass_arg = passed  # type: ignore[attr-defined]
        return followed

    @property
    def _known(self) -> dict[Any, Callable[..., Any]]:
        """Filters with their keywords: the same one each time, so that equal expressions are equal."""
        found: dict[Any, Callable[..., Any]] = self.__dict__.setdefault("_known_filters", {})
        return found


_UNCHANGING = ("string", "default", "d")
"""Filters that give a text back as it is."""

_SHORT = ("count", "first", "int", "last", "length", "lower", "trim", "upper")
"""Filters whose result is about as long as the text, or shorter."""

_TYPE_TESTS = (
    *("string", "mapping", "iterable", "sequence", "number", "integer", "float", "boolean", "callable"),
    *("none", "defined", "undefined", "true", "false", "escaped"),
)
"""Tests whose answer is the same for every text."""


def _holds_symbol(args: Sequence[Any]) -> bool:
    return any(isinstance(arg, str) and "\x02" in str.__str__(arg) for arg in args)


class _CodeGenerator(compiler.CodeGenerator):
    """Sends to the environment what compiled templates otherwise do on their own."""

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        asked = [operand for operand in node.ops if operand.op in ("in", "notin")]
        if not asked:
            super().visit_Compare(node, frame)
            return
        if len(node.ops) > 1:
            self.write("environment.give_up()")
            return
        self.write("(" if node.ops[0].op == "in" else "(not ")
        self.write("environment.contains(")
        self.visit(node.expr, frame)
        self.write(", ")
        self.visit(node.ops[0].expr, frame)
        self.write("))")

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")
