"""Errors a user can act on: one clear line that names the file, row, field, site or layer and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlprivError(Exception):
    """Base of every error flpriv raises on purpose; the command line shows it as one line and exits with 2."""


class ScenarioError(FlprivError):
    """The scenario is wrong: an unknown key or name, a value of the wrong type, a file that is not there."""


class DataError(FlprivError):
    """A site's data is wrong: an unreadable image, a missing column, a patient in two splits."""


class CaptureError(FlprivError):
    """A capture cannot be written or read: truncated, of another format, disk full."""


class ThreatError(FlprivError):
    """An attack needs what the threat model does not grant."""


class UpdateError(FlprivError):
    """A client's update cannot be used: NaN or infinite values, other keys or shapes than were sent."""


class ClaimError(FlprivError):
    """An attack's claim cannot be measured: a wrong number of scores, another image shape, NaN."""


class RunError(FlprivError):
    """A federation could not be run to its end."""


def near(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known``, else the list of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
