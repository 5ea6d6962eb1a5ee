"""The volume that trainings of tests learn from."""

from tests.helpers.training import volume

__all__ = ["volume"]
