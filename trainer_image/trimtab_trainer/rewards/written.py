"""Rewards that the user wrote: a function in a file of Python, called as TRL calls its reward functions.

The preflight reads the file and runs none of it; only the trainer does. What the function gives back is looked at, so
that a mistake is told by the row that shows it and never becomes a loss.
"""

from __future__ import annotations

import ast
import inspect
import logging
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from trimtab_api import inputs
from trimtab_api.conditions import Reason
from trimtab_api.contract import CodeInput, RunConfig
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalCode, Pins, read_code
from trimtab_trainer.rewards import Said

log = logging.getLogger(__name__)

GIVEN = ("prompts", "completions", "completion_ids")
"""What every function can ask for beside the rows' columns, each a list with one entry for each answer."""

Function = Callable[..., Any]


@dataclass(frozen=True)
class Look:
    """What a file says of a function without being run."""

    columns: frozenset[str]
    """Columns of the rows that it cannot be called without."""


def code_of(config: RunConfig, number: int) -> CodeInput:
    """The file of a grpo job's reward `number`, from 0."""
    return next(each for each in config.code if each.field == inputs.written_reward(number))


def look(source: CodeInput, function: str) -> Look:
    """Find a function in a file without running it.

    Raises Fault when the file is not there, is no Python, or has no such function.
    """
    tree = _parsed(read_code(source, Pins(())))
    found = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == function]
    if not found:
        known = ", ".join(each.name for each in tree.body if isinstance(each, ast.FunctionDef)) or "none"
        raise _unusable(source, function, f"no such function at the top of the file, which has {known}")
    return Look(frozenset(_required(found[-1].args)) - {*GIVEN})


class Written:
    """A function of the user's as a reward."""

    def __init__(self, source: CodeInput, name: str, function: Function):
        self._source = source
        self._name = name
        self._function = function
        taken = inspect.signature(function).parameters.values()
        self._all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken)
        self._names = {each.name for each in taken}

    @classmethod
    def open(cls, source: CodeInput, name: str, pins: Pins) -> Written:
        """Run the file and take the function out of it.

        Raises Fault when the file is not what it was at the start, or the function cannot be had.
        """
        local = read_code(source, pins)
        look(source, name)
        function = _module(local).__dict__.get(name)
        if not callable(function):
            raise _unusable(source, name, "it is no function once the file has run")
        return cls(source, name, function)

    def __call__(self, said: Sequence[Said]) -> Sequence[float | None]:
        """What the function gives for each answer.

        Raises Fault(SpecInvalid) when it raises, or gives what is not a finite number or None for each.
        """
        try:
            given = self._function(**self._arguments(said))
        except Exception as error:
            raise self._raised(error, said) from error
        if not hasattr(given, "__len__") or len(given) != len(said):
            count = f"{len(given)} rewards" if hasattr(given, "__len__") else f"a {type(given).__name__}"
            raise self._wrong(f"gave {count} for {len(said)} answers", said[0], "Return a list with a number for each.")
        return [self._number(each, answer) for each, answer in zip(given, said, strict=True)]

    def _arguments(self, said: Sequence[Said]) -> dict[str, list[Any]]:
        """In the form of TRL: conversations, answers as conversations of one turn, and columns; by name."""
        columns = {name for each in said for name in each.columns}
        known: dict[str, list[Any]] = {name: [each.columns.get(name) for each in said] for name in sorted(columns)}
        known["prompts"] = [each.messages for each in said]
        known["completions"] = [[{"role": "assistant", "content": each.text}] for each in said]
        known["completion_ids"] = [list(each.ids) for each in said]
        return {name: values for name, values in known.items() if self._all or name in self._names}

    def _number(self, given: Any, answer: Said) -> float | None:
        if given is None:
            return None
        try:
            number = float(given)
        except (TypeError, ValueError) as error:
            problem = f"gave {type(given).__name__} {str(given)[:80]!r}, which is no number"
            raise self._wrong(problem, answer, "Return a number, or None for no reward.") from error
        if not math.isfinite(number):
            raise self._wrong(f"gave {number}", answer, "Return a finite number, or None for no reward.")
        return number

    def _raised(self, error: Exception, said: Sequence[Said]) -> Fault:
        """Which answer it was is found by asking for each alone: the run is over in any case."""
        culprit = next((each for each in said if self._fails(each)), said[0])
        log.error("%s raised %s", self._name, "".join(traceback.format_exception(error)))
        lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == self._file]
        place = f" in line {lines[-1]}" if lines else ""
        text = str(error).splitlines()[0][:300] if str(error) else ""
        hint = (
            "Mend the function in its ConfigMap, delete the job and apply it again; return None to pass an answer over."
        )
        return self._wrong(f"raised {type(error).__name__}{place}: {text}", culprit, hint)

    def _fails(self, answer: Said) -> bool:
        try:
            self._function(**self._arguments([answer]))
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            log.debug("%s raises for %s: %s", self._name, answer.place, error)
            return True
        return False

    @property
    def _file(self) -> str:
        return self._source.path

    def _wrong(self, problem: str, answer: Said, hint: str) -> Fault:
        where = f"{self._source.field} {self._source.reference}"
        asked = f"{answer.place}, answer {answer.text[:120]!r}"
        return Fault(Reason.SPEC_INVALID, f"{where}: {self._name} {problem}, at {asked}", hint)


def _parsed(local: LocalCode) -> ast.Module:
    try:
        return ast.parse(local.content, local.source.path)
    except (SyntaxError, ValueError) as error:
        line = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
        problem = f"{local.source.field} {local.source.reference}: not Python{line}: {error.args[0]}"
        raise Fault(Reason.SPEC_INVALID, problem, "Correct the file; the job looks again by itself.") from error


def _required(arguments: ast.arguments) -> list[str]:
    """Names of the parameters that have no default."""
    plain = [*arguments.posonlyargs, *arguments.args]
    needed = plain[: len(plain) - len(arguments.defaults)]
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return [each.arg for each in (*needed, *(each for each, default in named if default is None))]


def _module(local: LocalCode) -> ModuleType:
    """The file, run. Its name is known to the interpreter, as classes in it may ask for it."""
    name = f"trimtab_reward_{local.digest.removeprefix('sha256:')[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = local.source.path
    sys.modules[name] = module
    try:
        # What the user wrote and the installation allows, from the bytes that were held against the pin.
        exec(compile(_parsed(local), local.source.path, "exec"), module.__dict__)  # noqa: S102
    except Exception as error:
        del sys.modules[name]
        log.error("the file raised %s", "".join(traceback.format_exception(error)))
        where = f"{local.source.field} {local.source.reference}"
        problem = f"{where}: raised {type(error).__name__} as it was imported: {str(error)[:300]}"
        raise Fault(
            Reason.SPEC_INVALID, problem, "Correct the file, and use what the trainer's image holds."
        ) from error
    return module


def _unusable(source: CodeInput, function: str, problem: str) -> Fault:
    where = f"{source.field}.function {function} in {source.reference}"
    return Fault(Reason.SPEC_INVALID, f"{where}: {problem}", "Correct function, or the file.")
