"""What the settings of every room are made of: strict, frozen, described."""

import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from agq.errors import InputError
from agq.paths import no_local_path

Size = tuple[PositiveInt, PositiveInt, PositiveInt]
"""Three positive whole numbers, (z, y, x)."""

Margin = tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt]
"""Three whole numbers from 0 on, (z, y, x)."""


def _local(path: str) -> str:
    if fault := no_local_path(path):
        raise ValueError(fault)
    return path


LocalPath = Annotated[str, AfterValidator(_local)]
"""A path that is kept as it was written; no address."""

# A record of a setting is read later, in another folder.
File = Annotated[Path, AfterValidator(Path.absolute)]
"""A file, by its absolute path."""


def _one_address(host: str) -> str:
    """Refuse what stands for all addresses of a machine: ``0.0.0.0``, ``0``, ``::``."""
    packed = host.encode()
    with suppress(OSError):
        packed = socket.inet_aton(host)
    with suppress(OSError):
        packed = socket.inet_pton(socket.AF_INET6, host.strip("[]"))
    if not any(packed):
        raise ValueError(
            "stands for all networks of a machine, and nobody can connect to it: name one address "
            "by which others reach it"
        )
    return host


Host = Annotated[str, AfterValidator(_one_address)]
"""Name or address by which others reach a machine."""


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, attribute docstrings are the schema.

    Numbers are finite, and whole ones fit 64 bits.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _fits_64_bits(cls, values: Any) -> Any:
        level: list[Any] = [values]
        while level:
            item = level.pop()
            if isinstance(item, int) and not -(2**63) <= item < 2**63:
                raise ValueError("a number does not fit 64 bits")
            if isinstance(item, Mapping | list | tuple):
                level += item.values() if isinstance(item, Mapping) else item
        return values

    @model_validator(mode="after")
    def _writes_no_address(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Path) and (fault := no_local_path(value)):
                raise ValueError(f"{name}: {fault}")
        return self

    @classmethod
    def from_values(cls, values: Any, source: str) -> Self:
        """Check values.

        Parameters
        ----------
        values
            A mapping of some of the fields; absent ones take their defaults.
        source
            Where the values come from, for the message.

        Raises
        ------
        InputError
            If a field is unknown or a value cannot be used; the message names every such field.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'all'}: {e['msg']}"
                for e in error.errors(include_url=False)
            )
            raise InputError(f"{source}: {problems}") from None
