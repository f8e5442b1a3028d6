"""Cron expressions in a time zone: the moments that they name, one after another.

croniter knows the calendar. At a change of the clocks it moves what falls into the gap to the end
of the gap, as cron does, but gives what lies in the repeated hour twice; that is mended here.
"""

from __future__ import annotations

import re
from datetime import datetime
from math import floor
from typing import Any, Final
from zoneinfo import ZoneInfo

from croniter import croniter
from croniter.croniter import CroniterBadDateError

__all__ = ["Cron"]

_LONGEST: Final = 200
_FIELDS: Final = (5, 6)
_HOUR: Final = 1
# croniter's own: a moment by chance, or by a hash. Two orchestrators would not agree on it.
_BY_CHANCE: Final = re.compile(r"(?:^|[\s,])[rh]", re.IGNORECASE)


class Cron:
    """When something is due, on the clocks of a time zone.

    A time that the clocks skip is due when they go on: 02:30 at 03:00. One that they repeat is due
    the first time only, unless every hour is asked for (``*`` as the hour).

    Args:
        expression: Five fields (minute, hour, day, month, weekday), six with seconds first, or one
            of ``@hourly``, ``@daily``, ``@weekly``, ``@monthly``, ``@yearly``.
        zone: Its name in the IANA database, as ``Europe/Berlin``.

    Raises:
        ValueError: The expression names no moment, or there is no such zone.

    >>> Cron("0 3 * * *", "Europe/Berlin").after(1_774_746_000.0)
    1774746000.0
    """

    def __init__(self, expression: str, zone: str) -> None:
        self._expression = _checked(expression)
        self._zone = _zone(zone)
        try:
            expanded, _ = croniter.expand(self._expression, second_at_beginning=True)
        except ValueError as problem:
            raise ValueError(f"cron {expression!r}: {problem}") from problem
        self._every_hour = expanded[_HOUR] == ["*"]

    def after(self, moment: float) -> float | None:
        """The first moment later than this one; None if none ever comes.

        Args:
            moment: In seconds since 1970.
        """
        return self._walk("get_next", moment)

    def until(self, moment: float) -> float | None:
        """The last moment that is not later than this one; None if there was none."""
        # croniter counts in whole seconds, and gives only what is earlier.
        return self._walk("get_prev", floor(moment) + 1.0)

    def between(self, first: float, last: float, most: int) -> list[float]:
        """The moments from ``first`` to ``last``, both included; of more the latest.

        Args:
            first: In seconds since 1970.
            last: The same.
            most: At most so many.
        """
        found: list[float] = []
        at = self.until(last)
        while at is not None and at >= first and len(found) < most:
            found.append(at)
            at = self._walk("get_prev", at)
        return found[::-1]

    def _walk(self, step: str, start: float) -> float | None:
        local = datetime.fromtimestamp(start, self._zone)
        walker = croniter(self._expression, local, second_at_beginning=True)
        try:
            while True:
                moment: float = getattr(walker, step)(float)
                if not self._is_repeated(moment):
                    return moment
        except CroniterBadDateError:
            return None

    def _is_repeated(self, moment: float) -> bool:
        return not self._every_hour and datetime.fromtimestamp(moment, self._zone).fold == 1


def _checked(expression: Any) -> str:
    if not isinstance(expression, str) or len(expression) > _LONGEST:
        raise ValueError(f"cron {str(expression)[:20]!r}…: expected five fields as '0 3 * * *'")
    if not expression.startswith("@") and len(expression.split()) not in _FIELDS:
        raise ValueError(
            f"cron {expression!r}: expected five fields as '0 3 * * *' (minute, hour, day, month, "
            "weekday), or six with seconds first"
        )
    if _BY_CHANCE.search(expression):
        raise ValueError(f"cron {expression!r}: R and H, for moments by chance, are not known here")
    return expression


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, TypeError) as problem:  # the first where it names a folder
        raise ValueError(f"timezone {name!r}: expected a name as 'Europe/Berlin'") from problem
    except LookupError as problem:
        raise ValueError(
            f"timezone {name!r}: the orchestrator's machine knows no such zone; expected a name as "
            "'Europe/Berlin'"
        ) from problem
