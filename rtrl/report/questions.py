"""The five questions of the results page, answered from the verdicts and measurements of a record alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from rtrl.report.model import ClaimResult, Plot, Question, Record, Verdict
from rtrl.report.tables import tally

QUESTIONS: dict[Question, str] = {
    "exact": "Are the gradients exact?",
    "learns": "Does it learn?",
    "memory": "Does it need less memory, and from where on?",
    "clock": "Is it faster by the clock?",
    "rivals": "Is it better than its rivals?",
}
WORDS: dict[Verdict, str] = {
    "holds": "Yes",
    "holds when": "In part",
    "does not hold": "No",
    "not measured at the claimed size": "Not measured at the claimed size",
    "not measured": "Not measured",
}
_SEVEREST_FIRST: tuple[Verdict, ...] = (
    "does not hold",
    "not measured at the claimed size",
    "holds when",
    "not measured",
    "holds",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question.

    Attributes:
        name: the question's short name.
        question: the question.
        verdict: what the claims of the question come to together.
        sentences: at most three: what was measured, what limits it, and what all claims of the question came to.
        claims: the claims of the question, its main ones first.
        figure: the first picture of these claims, and the claim that it belongs to; None without one.
    """

    name: Question
    question: str
    verdict: Verdict
    sentences: list[str]
    claims: list[ClaimResult]
    figure: tuple[ClaimResult, Plot] | None

    @property
    def word(self) -> str:
        """The answer in a word."""
        return WORDS[self.verdict]


def answers(record: Record) -> list[Answer]:
    """Answer all five questions; none where no claim of the record belongs to any of them."""
    if not any(claim.question for claim in record.claims):
        return []
    return [
        _answer(name, [claim for claim in record.claims if claim.question == name], record.mode) for name in QUESTIONS
    ]


def _answer(name: Question, found: Sequence[ClaimResult], mode: str) -> Answer:
    claims = sorted(found, key=lambda claim: not claim.headline)  # the main ones first, else in the record's order
    if not claims:
        return Answer(name, QUESTIONS[name], "not measured", ["This record has no claim about it."], [], None)
    figure = next(((claim, claim.plots[0]) for claim in claims if claim.plots), None)
    count, came_to = tally(claims).split(": ", 1)
    belong = "belongs" if len(claims) == 1 else "belong"
    sentences = [*_findings(claims), f"{count} {belong} to this question; measured in the {mode} form, {came_to}."]
    return Answer(name, QUESTIONS[name], _together(claims), sentences, claims, figure)


def _together(claims: Sequence[ClaimResult]) -> Verdict:
    """Their common verdict; of several "holds when", so that a claim that was not measured leaves no plain yes."""
    verdicts = {claim.verdict for claim in claims}
    if len(verdicts) == 1:
        return verdicts.pop()
    measured = any(not verdict.startswith("not measured") for verdict in verdicts)
    return "holds when" if measured else "not measured at the claimed size"


def _findings(claims: Sequence[ClaimResult]) -> list[str]:
    """Two sentences: what the first claim found, and what the second one found or what limits the answer most."""
    first, *others = claims
    lines = [_sentence(first.headline or f"{first.id}: {first.result or first.verdict}")]
    if others and others[0].headline:
        return [*lines, _sentence(others[0].headline)]
    for verdict in _SEVEREST_FIRST:
        for claim in claims:
            if claim.verdict == verdict and claim.condition:
                said = f"was {verdict}:" if verdict.startswith("not measured") else verdict
                said = f"{verdict}:" if verdict == "does not hold" else said
                return [*lines, _sentence(f"{claim.id} {said} {claim.condition}")]
    more = f"{others[0].id}: {others[0].result}" if others else f"The threshold was: {first.threshold}"
    return [*lines, _sentence(more)]


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
