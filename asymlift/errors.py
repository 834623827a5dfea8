"""Errors that a user can fix: one to three lines and an exit code, never a traceback."""

from enum import IntEnum

from asymlift.redact import redacted


class Exit(IntEnum):
    """Exit codes, in the style of sysexits.h, so that job scripts can branch on them."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    BAD_DATA = 65  # data or a checkpoint is broken, or does not belong here
    UNAVAILABLE = 69  # a package, file or service that is needed is missing
    CANNOT_WRITE = 73
    RESUMABLE = 75  # stopped early on request; the same command goes on
    BAD_RECIPE = 78
    INTERRUPTED = 130


class UserError(Exception):
    """What was given, why it cannot be, what to do; without the secrets that were given."""

    exit: Exit = Exit.UNEXPECTED

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class BadData(UserError):
    """Data, an artifact or a checkpoint is broken, or does not belong to this recipe."""

    exit = Exit.BAD_DATA


class Unavailable(UserError):
    """A package, file or service that is needed is missing here."""

    exit = Exit.UNAVAILABLE


class CannotWrite(UserError):
    """The output exists, the disk is full, or the folder is not writable."""

    exit = Exit.CANNOT_WRITE


class StoppedEarly(UserError):
    """Stopped on request after saving; running the same command again goes on."""

    def __init__(self, message: str, exit: Exit = Exit.RESUMABLE) -> None:  # noqa: A002
        super().__init__(message)
        self.exit = exit


class BadRecipe(UserError):
    """The recipe is wrong: an unknown key, a bad value, or a contradiction."""

    exit = Exit.BAD_RECIPE
