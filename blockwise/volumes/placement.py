"""Where the voxels of an array lie in the world: axis order, voxel size and offset.

World units are integers in funlib.geometry, so a voxel size of 4.2 nm cannot be held in
nanometres. It is never rounded: such a volume is refused with the advice to work in a smaller
unit (``unit: pm``), in which it is exact. All volumes of a run share one unit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from funlib.geometry import Coordinate

from agq.errors import InputError

UNITS = ("nm", "angstrom", "pm")
"""Units in which world coordinates can be counted."""

AXES = ("z", "y", "x")

_NAMES: dict[int, tuple[str, ...]] = {
    -12: ("pm", "picometer", "picometre", "picometers"),
    -10: ("angstrom", "angstroms", "å"),
    -9: ("nm", "nanometer", "nanometre", "nanometers", "nanometres"),
    -6: ("um", "µm", "μm", "micrometer", "micrometre", "micrometers", "micron", "microns"),
    -3: ("mm", "millimeter", "millimetre", "millimeters"),
    -2: ("cm", "centimeter", "centimetre"),
    0: ("m", "meter", "metre", "meters"),
}
_EXPONENTS = {name: exponent for exponent, names in _NAMES.items() for name in names}

# Metadata often went through binary floats (0.03 as 0.030000000000000002, or as a float32).
_RELATIVE_ERROR = Decimal("1e-6")


@dataclass(frozen=True)
class Placement:
    """What the metadata of an array say, in the order (z, y, x) and in the declared units.

    Attributes
    ----------
    axes
        Array dimension of each of z, y, x; None: not said.
    voxel_size, offset
        Declared numbers, or None.
    units
        Declared unit of each axis; None where none is declared.
    unit_is_optional
        Whether a missing unit means the world unit (attributes of the funlib and N5 families) or
        makes the numbers unusable (OME-Zarr, where a scale without unit is only a ratio).
    """

    axes: tuple[int, ...] | None = None
    voxel_size: tuple[Decimal, ...] | None = None
    offset: tuple[Decimal, ...] | None = None
    units: tuple[str | None, ...] = (None, None, None)
    unit_is_optional: bool = True


def from_attributes(
    attributes: Mapping[str, Any], ndim: int, *, reversed_axes: bool, where: str
) -> Placement:
    """Read the attribute conventions of funlib/daisy, N5 and COSEM.

    Understood are ``voxel_size`` or ``resolution`` with ``offset``, ``units`` and ``axis_names``
    (funlib.persistence), ``pixelResolution`` with ``downsamplingFactors`` (N5 viewers), and
    ``transform`` with axes, scale, translate and units (COSEM). N5 stores axes and all triples
    reversed, as (x, y, z). `where` names the array in messages.

    Raises
    ------
    InputError
        If an attribute is there but makes no sense.
    """
    transform = attributes.get("transform")
    if isinstance(transform, Mapping) and "scale" in transform:
        return _from_transform(transform, where)
    axes = _named_axes(attributes.get("axis_names"), ndim)
    full = axes or ((2, 1, 0) if reversed_axes else (ndim - 3, ndim - 2, ndim - 1))
    spatial = tuple(sorted(full).index(axis) for axis in full)

    def numbers(values: Any, name: str) -> tuple[Decimal, ...] | None:
        return None if values is None else _spatial(values, spatial, full, f"{where}: {name}")

    units = attributes.get("units", attributes.get("unit"))
    name = "voxel_size" if "voxel_size" in attributes else "resolution"
    size = attributes.get(name)
    if size is None and (pixel := attributes.get("pixelResolution")) is not None:
        name, size = "pixelResolution", pixel
        if isinstance(pixel, Mapping):
            size, units = pixel.get("dimensions"), pixel.get("unit", units)
    voxel_size = numbers(size, name)
    if voxel_size is not None:
        factors = numbers(attributes.get("downsamplingFactors"), "downsamplingFactors")
        if factors is not None:
            voxel_size = tuple(v * f for v, f in zip(voxel_size, factors, strict=True))
    return Placement(
        axes=axes,
        voxel_size=voxel_size,
        offset=numbers(attributes.get("offset"), "offset"),
        units=_units(units, spatial),
    )


def _from_transform(transform: Mapping[str, Any], where: str) -> Placement:
    names = [str(axis).lower() for axis in transform.get("axes", AXES)]
    order = _axis_order(names, where)
    units = transform.get("units", [None] * len(names))
    return Placement(
        axes=None,  # names of the metadata's order, which here need not be the array's
        voxel_size=_pick(transform["scale"], order, f"{where}: transform.scale"),
        offset=_pick(transform["translate"], order, f"{where}: transform.translate")
        if "translate" in transform
        else None,
        units=tuple(_unit(units[i]) for i in order),
    )


def from_multiscale(multiscale: Mapping[str, Any], level: int, where: str) -> Placement:
    """Read one level of an OME-Zarr multiscale (NGFF 0.1 to 0.5).

    NGFF translations place the centre of the first voxel, so a coarser level that covers the same
    space is translated by half the growth of its voxel; many writers leave that out. Offsets here
    are corners, and the corner of level 0 is taken to be its own translation: both ways of
    writing then give all levels of one pyramid the same offset.

    Raises
    ------
    InputError
        If the axes are not z, y, x (and size-1 others), or the transformations are not scale and
        translation.

    Notes
    -----
    https://ngff.openmicroscopy.org/0.5/#multiscale-md : the transformations of the level come
    first, those of the whole multiscale are applied to the result.
    """
    declared = multiscale.get("axes")
    if declared is None:
        return Placement(unit_is_optional=False)
    axes = [axis if isinstance(axis, Mapping) else {"name": axis} for axis in declared]
    order = _axis_order([str(axis.get("name", "")).lower() for axis in axes], where)
    first_scale, first_shift, _ = _transformed(multiscale, 0, len(axes), where)
    scale, shift, scaled = _transformed(multiscale, level, len(axes), where)
    corner = [
        start if abs(place - start) <= _RELATIVE_ERROR * size else place - (size - first) / 2
        for place, start, size, first in zip(shift, first_shift, scale, first_scale, strict=True)
    ]
    return Placement(
        axes=order,
        voxel_size=tuple(scale[i] for i in order) if scaled else None,
        offset=tuple(corner[i] for i in order),
        units=tuple(_unit(axes[i].get("unit")) for i in order),
        unit_is_optional=False,
    )


def _transformed(
    multiscale: Mapping[str, Any], level: int, ndim: int, where: str
) -> tuple[list[Decimal], list[Decimal], bool]:
    """Return scale and translation of a level, and whether any scale was declared."""
    scale = [Decimal(1)] * ndim
    shift = [Decimal(0)] * ndim
    scaled = False
    for transform in [
        *(multiscale["datasets"][level].get("coordinateTransformations") or []),
        *(multiscale.get("coordinateTransformations") or []),
    ]:
        kind = transform.get("type")
        if kind == "identity":
            continue
        if kind not in ("scale", "translation") or kind not in transform:
            raise InputError(
                f"{where}: OME coordinate transformation {kind!r} cannot be used; only scale and "
                "translation given in the metadata can"
            )
        values = _numbers(transform[kind], f"{where}: {kind}")
        if len(values) != ndim:
            raise InputError(f"{where}: OME {kind} {transform[kind]} does not fit {ndim} axes")
        if kind == "scale":
            scaled = True
            scale = [a * b for a, b in zip(scale, values, strict=True)]
            shift = [a * b for a, b in zip(shift, values, strict=True)]
        else:
            shift = [a + b for a, b in zip(shift, values, strict=True)]
    return scale, shift, scaled


def to_world(
    placement: Placement,
    voxel_size: Sequence[float] | None,
    offset: Sequence[float] | None,
    unit: str,
    where: str,
) -> tuple[Coordinate, Coordinate]:
    """Settle voxel size and offset from what the metadata say and what the user says.

    Parameters
    ----------
    placement
        What the metadata say.
    voxel_size, offset
        What the user says, (z, y, x) in `unit`; None: nothing.
    unit
        World unit, one of `UNITS`.
    where
        Name of the array for messages.

    Returns
    -------
    tuple
        Voxel size and offset, (z, y, x) in whole numbers of `unit`.

    Raises
    ------
    InputError
        If neither says the voxel size, both say different things, or a number is not whole.
    """
    if unit not in UNITS:
        raise InputError(f"unit {unit!r} cannot be used; choose one of {', '.join(UNITS)}")
    declared_size, declared_offset = _convert(placement, unit, where)
    settled_size = _settle(declared_size, voxel_size, "voxel_size", unit, where)
    if settled_size is None:
        reason = "declares no voxel size"
        if placement.voxel_size is not None:
            reason = f"declares the scale {_show(placement.voxel_size)} without a unit"
        raise InputError(f"{where} {reason}; give voxel_size (z, y, x) in {unit} (--voxel-size)")
    position = _settle(declared_offset, offset, "offset", unit, where)
    size = _whole(settled_size, "voxel size", unit, where)
    if min(size) <= 0:
        raise InputError(f"{where}: voxel size {tuple(size)} must be positive")
    if position is None and placement.offset is not None and placement.voxel_size is not None:
        # A unitless OME translation: its ratio to the unitless scale still says the place.
        position = tuple(
            t / s * v for t, s, v in zip(placement.offset, placement.voxel_size, size, strict=True)
        )
    return size, _whole(position or (Decimal(0),) * 3, "offset", unit, where)


def _settle(
    declared: tuple[Decimal, ...] | None,
    given: Sequence[float] | None,
    name: str,
    unit: str,
    where: str,
) -> tuple[Decimal, ...] | None:
    """Return what the metadata declare or the user gives; both must say the same."""
    if given is None:
        return declared
    numbers = _numbers(given, name)
    if len(numbers) != 3:
        raise InputError(f"{name} {list(given)} must be three numbers (z, y, x)")
    if declared is not None and not _same(declared, numbers):
        raise InputError(
            f"{where} declares the {name.replace('_', ' ')} {_show(declared)} {unit}, but {name} "
            f"is given as {_show(numbers)}; correct or remove {name}"
        )
    return declared or numbers


def _convert(
    placement: Placement, unit: str, where: str
) -> tuple[tuple[Decimal, ...] | None, tuple[Decimal, ...] | None]:
    factors: list[Decimal] = []
    for name in placement.units:
        if name is None and not placement.unit_is_optional:
            return None, None
        exponent = _EXPONENTS.get(unit if name is None else name)
        if exponent is None:
            raise InputError(f"{where}: unknown unit {name!r}; use nm, um, mm, angstrom or pm")
        factors.append(Decimal(1).scaleb(exponent - _EXPONENTS[unit]))

    def scaled(values: tuple[Decimal, ...] | None) -> tuple[Decimal, ...] | None:
        if values is None:
            return None
        return tuple(v * f for v, f in zip(values, factors, strict=True))

    return scaled(placement.voxel_size), scaled(placement.offset)


def _whole(values: Iterable[Decimal], name: str, unit: str, where: str) -> Coordinate:
    values = tuple(values)
    rounded = [round(value) for value in values]
    for value, whole in zip(values, rounded, strict=True):
        if abs(value - whole) > _RELATIVE_ERROR * max(abs(value), Decimal(1)):
            finer = [u for u in UNITS if _EXPONENTS[u] < _EXPONENTS[unit]]
            raise InputError(
                f"{where}: {name} {_show(values)} {unit} is not a whole number of {unit}, and "
                "world coordinates are whole numbers; "
                + (f"set unit: {finer[-1]}" if finer else "give whole numbers")
            )
    return Coordinate(rounded)


def _same(one: Sequence[Decimal], other: Sequence[Decimal]) -> bool:
    return all(
        abs(a - b) <= _RELATIVE_ERROR * max(abs(a), abs(b), Decimal(1))
        for a, b in zip(one, other, strict=True)
    )


def _numbers(values: Any, name: str) -> tuple[Decimal, ...]:
    try:
        numbers = tuple(Decimal(str(value)) for value in values)
    except (TypeError, InvalidOperation):
        numbers = ()
    if not numbers or not all(number.is_finite() for number in numbers):
        raise InputError(f"{name} {values!r} is not a list of numbers")
    return numbers


def _pick(values: Any, order: Sequence[int], name: str) -> tuple[Decimal, ...]:
    numbers = _numbers(values, name)
    if len(numbers) <= max(order):
        raise InputError(f"{name} {values!r} has too few numbers")
    return tuple(numbers[i] for i in order)


def _spatial(
    values: Any, spatial: Sequence[int], full: Sequence[int], name: str
) -> tuple[Decimal, ...]:
    """Return z, y, x of a list that has one number per spatial axis, or one per array axis."""
    numbers = _numbers(values, name)
    if len(numbers) == 3:
        return tuple(numbers[i] for i in spatial)
    if len(numbers) <= max(full):
        raise InputError(f"{name} {list(values)} must have three numbers")
    return tuple(numbers[i] for i in full)


def _axis_order(names: Sequence[str], where: str) -> tuple[int, ...]:
    """Return the positions of z, y, x among axis names."""
    if any(names.count(axis) != 1 for axis in AXES):
        raise InputError(f"{where}: axes {list(names)} do not have z, y and x; it must be 3-D")
    return tuple(names.index(axis) for axis in AXES)


def _named_axes(names: Any, ndim: int) -> tuple[int, ...] | None:
    """Return the array dimensions of z, y, x; None for names such as d0, d1, d2."""
    if not isinstance(names, Sequence) or isinstance(names, str) or len(names) != ndim:
        return None
    lower = [str(name).lower() for name in names]
    if any(lower.count(axis) != 1 for axis in AXES):
        return None
    return tuple(lower.index(axis) for axis in AXES)


def _units(units: Any, spatial: Sequence[int]) -> tuple[str | None, ...]:
    if isinstance(units, Sequence) and not isinstance(units, str) and len(units) >= 3:
        last = list(units)[-3:]
        return tuple(_unit(last[i]) for i in spatial)
    if isinstance(units, Sequence) and not isinstance(units, str):
        units = units[0] if len(units) == 1 else None
    return (_unit(units),) * 3


def _unit(name: Any) -> str | None:
    text = str(name).strip().lower() if name is not None else ""
    return None if text in ("", "none", "pixel", "pixels", "voxel", "voxels", "px") else text


def _show(values: Iterable[Decimal]) -> str:
    return "(" + ", ".join(f"{value.normalize():f}" for value in values) + ")"
