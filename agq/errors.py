"""Errors that the user is told in one line, without a traceback."""


class InputError(Exception):
    """Input or configuration that cannot work; the message names the field or file and the fix."""


class RunStoppedError(Exception):
    """A run that could not go on (full disk, workers that keep dying); running again resumes it."""
