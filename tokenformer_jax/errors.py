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
