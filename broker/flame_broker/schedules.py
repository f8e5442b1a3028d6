"""What both ends know of schedules: how they are named, and what follows a downtime."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final

__all__ = ["CatchUp", "check_schedule"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class CatchUp(StrEnum):
    """What becomes of times that nobody was there to meet.

    ``NONE``: nothing; a call that would start over a minute late is not made. ``LATEST``: one call,
    for the latest of them. ``ALL``: a call for each, but of more than 100 only for the latest 100.
    """

    NONE = "none"
    LATEST = "latest"
    ALL = "all"


def check_schedule(name: object, catch_up: object, overlap: object) -> CatchUp:
    """The policy, if a schedule can be called so and these two go together.

    Raises:
        TypeError: A value of a wrong type.
        ValueError: A value that it cannot have; the message says what was expected.
    """
    if not isinstance(name, str) or not isinstance(overlap, bool):
        raise TypeError(f"name={name!r}, overlap={overlap!r}: expected text, and True or False")
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"name={name!r}: expected letters, digits, '.', '_' and '-', up to 100 of them, the "
            "first a letter or digit"
        )
    try:
        policy = CatchUp(catch_up)  # type: ignore[arg-type]  # what is none is refused
    except ValueError:
        names = ", ".join(repr(one.value) for one in CatchUp)
        raise ValueError(f"catch_up={catch_up!r}: expected one of {names}") from None
    if policy is CatchUp.ALL and not overlap:
        raise ValueError(
            "catch_up='all' has the calls that were missed run at once, which overlap=False "
            "forbids: leave one of the two out"
        )
    return policy
