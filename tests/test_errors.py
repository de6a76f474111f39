"""The error tree: exit codes, and what an error says."""

from __future__ import annotations

import inspect

import pytest

from finetune import errors
from finetune.errors import ConfigError, FinetuneError, InputError, Problem, WorldError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, FinetuneError)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_the_input_exits_with_2_and_the_worlds_with_1(kind: type[FinetuneError]) -> None:
    assert kind("x").exit_code == (2 if issubclass(kind, InputError) else 1)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = {line.split("──")[1].split()[0] for line in (errors.__doc__ or "").splitlines() if "──" in line}
    assert drawn == {kind.__name__ for kind in KINDS if kind is not FinetuneError}
    for kind in set(KINDS) - {FinetuneError, InputError, WorldError}:
        assert issubclass(kind, InputError) != issubclass(kind, WorldError)


def test_one_problem() -> None:
    error = ConfigError("is wrong", place="a.yaml:3", hint="mend it")
    assert error.problems == (Problem("is wrong", "a.yaml:3", "mend it"),)
    assert str(error) == "a.yaml:3: is wrong"
    assert str(ConfigError("is wrong")) == "is wrong"


def test_several_problems() -> None:
    error = ConfigError([Problem("a", "x"), Problem("b")])
    assert str(error) == "x: a; b"
