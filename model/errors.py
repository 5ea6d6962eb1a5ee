"""Errors that mean "the input is wrong": one line for the user, no traceback."""


class ModelInputError(Exception):
    """A checkpoint, configuration or block the model cannot use; the message names the fix."""
