"""What a command says to whoever made a mistake."""

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """A mistake that its user can mend. Commands print its one line and exit with code 2."""

    exit_code = 2


def listed(values: Sequence[Any]) -> str:
    """A few values, and how many there are beside these."""
    few = ", ".join(map(str, values[:6]))
    return few + (f" and {len(values) - 6} more" if len(values) > 6 else "")


def shown(text: object) -> str:
    """A name as part of one line: what cannot be printed, such as bytes that are not UTF-8, is escaped."""
    text = str(text)
    return text if text.isprintable() else repr(text)[1:-1]
