"""Errors that mean "the input is wrong": one line for the user, no traceback."""


class InputError(Exception):
    """Input or configuration that cannot work; the message names the field or file and the fix."""
