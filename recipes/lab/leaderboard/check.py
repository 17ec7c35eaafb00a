"""One point of the checklist of a report."""

from dataclasses import dataclass

__all__ = ["Check", "checklist", "refusing"]

_MARKS = {True: "[x]", False: "[ ]", None: "[?]"}


@dataclass(frozen=True)
class Check:
    """One point of the checklist.

    Attributes:
        passed: Whether it is in order; None if it could not be checked here.
        text: What was checked, and what was found.
        required: Whether a report that fails is refused.
    """

    passed: bool | None
    text: str
    required: bool = True


def checklist(checks: list[Check]) -> str:
    """The checks as a list of Markdown: [x] in order, [ ] not, [?] could not be checked here."""
    return "\n".join(f"- {_MARKS[check.passed]} {check.text}" for check in checks)


def refusing(checks: list[Check]) -> list[Check]:
    """Those for which a report is refused."""
    return [check for check in checks if check.required and check.passed is False]
