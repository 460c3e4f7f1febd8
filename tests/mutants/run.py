"""mutmut, made to fit this package; its arguments are those of ``mutmut`` (``python tests/mutants/run.py run``).

Three things differ. mutmut passes over functions with a decorator, which here are ``BlockRTRL.step``, ``sync`` and
``reset`` of all things: they are mutated under their decorator, which stays as it is. It changes the letters of string
literals, which in an error's message is noise: those are left alone (that a message is there at all, and the numbers
computed for it, are not). And of the tests that reach a mutant, those that kill most run before the others.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import libcst as cst
import libcst.matchers as m
from mutmut.__main__ import cli
from mutmut.configuration import config
from mutmut.mutation import file_mutation
from mutmut.runners import harness

Visitor = file_mutation.MutationVisitor
skip, arrange = Visitor._skip_node_and_children, file_mutation.function_trampoline_arrangement

run_tests = harness.PytestRunner.run_tests
# What is not needed costs half a second a mutant.
OFF = ("unraisableexception", "threadexception", "doctest", "junitxml", "pastebin", "faulthandler", "logging")

BUILT_IN = m.Name("staticmethod") | m.Name("classmethod")  # which mutmut knows how to handle
TOO_EARLY = {"_should_skip_dynamo"}  # PyTorch calls it while the class is made, when there are no mutants yet
TEXT = m.SimpleString() | m.FormattedStringText()


def skip_node_and_children(self: Visitor, node: cst.CSTNode) -> bool:
    if isinstance(node, cst.Raise):
        self.__dict__.setdefault("messages", set()).update(id(text) for text in m.findall(node, TEXT))
    if id(node) in self.__dict__.get("messages", ()):
        return True
    if isinstance(node, cst.FunctionDef) and node.name.value in TOO_EARLY:
        return True
    if isinstance(node, cst.FunctionDef) and len(node.decorators) == 1:
        return False
    return skip(self, node)


def function_trampoline_arrangement(
    function: cst.FunctionDef, mutants: Iterable[Any], class_name: str | None
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any], Sequence[str]]:
    if not function.decorators or m.matches(function.decorators[0].decorator, BUILT_IN):
        return arrange(function, mutants, class_name)
    before, (trampoline, *bodies), after, names = arrange(function.with_changes(decorators=[]), mutants, class_name)
    assert isinstance(trampoline, cst.FunctionDef)
    trampoline = trampoline.with_changes(decorators=[*function.decorators, *trampoline.decorators])
    return before, [trampoline, *bodies], after, names


def in_order(self: harness.PytestRunner, *, mutant_name: str | None, tests: Iterable[str]) -> int:
    """A mutant that crashes dies in any test; one that computes something else, in a comparison with an oracle."""
    ordered = list(tests)  # the quickest first
    some, rest = ordered[:6], ordered[6:]
    return run_tests(self, mutant_name=mutant_name, tests=[*some, *sorted(rest, key=lambda t: "[" in t and "bad" in t)])


Visitor._skip_node_and_children = skip_node_and_children  # type: ignore[method-assign]
file_mutation.function_trampoline_arrangement = function_trampoline_arrangement
harness.PytestRunner.run_tests = in_order  # type: ignore[method-assign]

if __name__ == "__main__":
    config().pytest_add_cli_args.extend(f"-pno:{plugin}" for plugin in OFF)
    cli()
