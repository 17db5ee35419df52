"""Rules that a config's values must keep, and the errors that name what to use."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from tokenformer_jax.errors import UserError


class Rule(NamedTuple):
    """What a value must be."""

    holds: Callable[[Any], bool]
    need: str


def one_of(*choices: str) -> Rule:
    return Rule(lambda value: value in choices, f"must be one of {', '.join(choices)}")


ABOVE_0 = Rule(lambda value: 0 < value < math.inf, "must be above 0")
NOT_NEGATIVE = Rule(lambda value: 0 <= value < math.inf, "must be 0 or above")
RISES_TO_1 = Rule(
    lambda parts: (
        not parts or (len(parts) > 1 and sorted(set(parts)) == list(parts) and min(parts) > 0 and parts[-1] == 1)
    ),
    "must rise from above 0 to 1.0, such as (0.25, 0.5, 1.0); () for one size",
)
PositiveInt = Annotated[int, ABOVE_0]
PositiveFloat = Annotated[float, ABOVE_0]
NotNegativeInt = Annotated[int, NOT_NEGATIVE]
NotNegativeFloat = Annotated[float, NOT_NEGATIVE]
Fraction = Annotated[float, Rule(lambda value: 0 <= value <= 1, "must lie between 0 and 1")]
BelowOne = Annotated[float, Rule(lambda value: 0 <= value < 1, "must be 0 or above, and below 1")]


def read_floats(value: Any, name: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not all(type(part) in (int, float) for part in value):
        raise UserError(f"{name} = {value!r}: must be a list of numbers")
    return tuple(float(part) for part in value)


def read_groups(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(group, Mapping) for group in value):
        raise UserError(f"{name} = {value!r}: must be a list of groups of keys")
    return tuple(json.loads(json.dumps(group, default=dict)) for group in value)  # plain dicts all through


def require(ok: bool, key: str, value: Any, need: str) -> None:
    if not ok:
        raise UserError(f"{key} = {value!r}: {need}")


def divisors(n: int, near: int) -> str:
    """The divisors of n around `near`, in words."""
    divisors = sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - near))
    return " or ".join(map(str, sorted(divisors[:2])))


def require_divisible(
    key: str,
    value: int,
    divisor_key: str,
    divisor: int,
    fits: Callable[[int], bool] = lambda n: True,
    way_out: str = "",
) -> None:
    """Raises a UserError with the nearest values above and below to use; of those only such that `fits`."""
    if value % divisor == 0:
        return
    down = value // divisor * divisor
    below = next((n for n in range(down, 0, -divisor) if fits(n)), 0)
    above = next((n for n in range(down + divisor, divisor * (value + 2), divisor) if fits(n)), 0)
    near = " or ".join(str(n) for n in (below, above) if n)
    what = f"{near}{way_out}" if near else f"a {divisor_key} that divides it"
    raise UserError(f"{key} = {value!r}: must divide by {divisor_key} = {divisor}; use {what}")
