"""The one base of errors that a user can cause and mend: their message is one true sentence with the way out."""

from __future__ import annotations


class SvamError(Exception):
    """What the user's files, parameters or machine are not, in one sentence. Anything else that is raised is a fault of this
    code, and keeps its traceback."""


class ParamsError(SvamError, ValueError):
    """A parameter is missing, unknown, out of range, or contradicts another or the data; the message names the key, its
    value and what is accepted."""


class MachineError(SvamError, RuntimeError):
    """The computer lacks something that a parameter asks for; the message says what and how to get it."""
