"""Where the voxels of an array lie in the world: the one rule, for every format and every input.

Each way in which a file says it is a `Source`; `place` compares them with each other and with what
the user gives, and settles axis order, voxel size and offset. `docs/placement.md` has the sources
in order. World units are integers in funlib.geometry, so a voxel size of 4.2 nm cannot be held in
nanometres; in a smaller unit (``unit: pm``) it is exact.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Context, Decimal, InvalidOperation
from typing import Any

from funlib.geometry import Coordinate

from agq.blockwise.volumes.triples import Triple
from agq.errors import InputError

UNITS = ("nm", "angstrom", "pm")
"""Units in which world coordinates can be counted, the coarsest first."""

PER_NANOMETRE = {"nm": 1, "angstrom": 10, "pm": 1000}
"""How many of each unit are a nanometre."""

AXES = ("z", "y", "x")

Numbers = tuple[Decimal, ...]

_NAMES: dict[str, tuple[str, ...]] = {
    "1e-6": ("fm", "femtometer", "femtometre", "femtometers"),
    "1e-3": ("pm", "picometer", "picometre", "picometers", "picometres"),
    "0.1": ("angstrom", "angstroms", "ångström", "å", "\u212b", "a"),
    "1": ("nm", "nanometer", "nanometre", "nanometers", "nanometres"),
    "1e3": (
        *("um", "µm", "μm", "micrometer", "micrometre", "micrometers", "micrometres"),
        *("micron", "microns"),
    ),
    "1e6": ("mm", "millimeter", "millimetre", "millimeters", "millimetres"),
    "1e7": ("cm", "centimeter", "centimetre", "centimeters", "centimetres"),
    "1e9": ("m", "meter", "metre", "meters", "metres"),
    "25.4e6": ("inch", "inches", "in"),
}
_NANOMETRES = {name: Decimal(size) for size, names in _NAMES.items() for name in names}

_FINEST = UNITS[-1]

_NOT_SPACE = ("t", "time", "c", "ch", "channel", "channels")

_PIXELS = ("pixel", "pixels", "voxel", "voxels", "px")

# Metadata often went through binary floats (0.03 as 0.030000000000000002, or as a float32).
_RELATIVE_ERROR = Decimal("1e-6")

_SHOWN = Context(prec=12)

# Larger numbers would not fit 64 bits.
_LARGEST = Decimal(2**61)


@dataclass(frozen=True)
class Source:
    """One way in which a file says where an array lies; the values are as they stand in the file.

    Attributes
    ----------
    name
        What says it, for messages: "resolution of a.zarr:raw".
    axis_names
        Names of the axes, in the order of the array's axes; names other than z, y and x are
        allowed.
    voxel_size, offset
        One number per spatial axis or per axis of the array, in the array's order; the offset is
        the corner of the first voxel.
    units
        One unit, or as many as there are numbers; None: nanometres.
    order
        Names that order the numbers, where these are not in the array's order.
    needs_unit
        Whether numbers without a unit are only ratios, as in OME-Zarr.
    """

    name: str
    axis_names: Any = None
    voxel_size: Any = None
    offset: Any = None
    units: Any = None
    order: Any = None
    needs_unit: bool = False


@dataclass(frozen=True)
class Place:
    """Where an array lies.

    Attributes
    ----------
    axes
        Dimension of the array for each of z, y and x.
    voxel_size, offset
        (z, y, x), whole numbers of `unit`.
    unit
        One of `UNITS`.
    notes
        What the user should know: what was rounded or decided, and what differs.
    """

    axes: Triple
    voxel_size: Coordinate
    offset: Coordinate
    unit: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Said:
    """The numbers of one source, (z, y, x): nanometres, or only a ratio."""

    name: str
    size: Numbers | None
    offset: Numbers | None
    is_ratio: bool

    def corner(self, size: Numbers) -> Numbers | None:
        """Return the offset; one without a unit still says the place in voxels."""
        if self.offset is None or not self.is_ratio:
            return self.offset
        ratio = self.size or (Decimal(1),) * 3
        return tuple(o / r * v for o, r, v in zip(self.offset, ratio, size, strict=True))


def place(
    sources: Sequence[Source],
    shape: Sequence[int],
    *,
    voxel_size: Sequence[Any] | None = None,
    offset: Sequence[Any] | None = None,
    unit: str | None = "nm",
    given_by: str | None = None,
    x_first: bool = False,
    where: str,
) -> Place:
    """Settle where an array lies, from all that its file says and what the user gives.

    Sources must agree. What the user gives is compared with what they say; where they do not
    agree with each other, it decides. A voxel size that is not whole in picometres is rounded, and
    positions with it, if no voxel is moved by half its size; or the user gives a whole number next
    to it.

    Parameters
    ----------
    sources
        What the file says.
    shape
        The array's shape, in its own order.
    voxel_size, offset
        What the user gives, (z, y, x) in `unit` (nm, if that is None); None: nothing.
    given_by
        Whose numbers `voxel_size` and `offset` are, if not the user's own.
    unit
        World unit, one of `UNITS`; None: the first of them in which all numbers are whole.
    x_first
        Whether an array without names of its axes has its x axis first, as N5.
    where
        Name of the array for messages.

    Raises
    ------
    InputError
        If it has no three spatial axes, nothing says the voxel size, two ways say different
        things, or a number is not positive, not whole or makes no sense.
    """
    if unit is not None and unit not in UNITS:
        raise InputError(f"unit {unit!r} cannot be used; choose one of {', '.join(UNITS)}")
    axes = axes_of(sources, shape, where, x_first=x_first)
    said = [_read(source, axes, len(shape)) for source in sources]
    rule = _Rule(where, unit or "nm", given_by)
    given = rule.given(voxel_size, "voxel_size")
    exact = rule.agreed([(s.name, s.size) for s in said if not s.is_ratio], given, "voxel_size")
    if exact is None:
        ratio = next((s.size for s in said if s.size), None)
        reason = f"the scale {_show(ratio)} without a unit" if ratio else "no voxel size"
        raise InputError(
            f"{where} declares {reason}; give voxel_size (z, y, x) in {rule.unit} (--voxel-size)"
        )
    corners = [(s.name, s.corner(exact)) for s in said]
    given_corner = rule.given(offset, "offset")
    if unit is None:
        every = [*exact, *(n for _, corner in [*corners, ("", given_corner)] for n in corner or ())]
        unit = next((u for u in UNITS if all(_is_whole(n, u) for n in every)), UNITS[-1])
        rule = replace(rule, unit=unit)
    voxels = [shape[axis] for axis in axes]
    size = rule.whole_size(exact, given, voxels, next((c for _, c in corners if c), None))
    if not _same(size, exact):
        # Positions keep their place in voxels, so that volumes of one source stay aligned.
        moved = [(name, c and rule.with_voxels(c, exact, size)) for name, c in corners]
        for (_, before), (_, after) in zip(corners, moved, strict=True):
            if given_corner and before and _same(before, given_corner):
                given_corner = after
        corners = moved
    corner = rule.agreed(corners, given_corner, "offset") or (Decimal(0),) * 3
    return Place(
        axes, rule.world(size), rule.world(rule.whole_offset(corner)), unit, tuple(rule.notes)
    )


@dataclass(frozen=True)
class _Rule:
    """Settles numbers, all in nanometres and (z, y, x), for one array and world unit."""

    where: str
    unit: str
    given_by: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> Decimal:
        """Nanometres of a world unit."""
        return _NANOMETRES[self.unit]

    def show(self, values: Numbers) -> str:
        """Return numbers in world units for messages."""
        return f"{_show(tuple(n / self.step for n in values))} {self.unit}"

    def given(self, values: Any, name: str) -> Numbers | None:
        """Return what the user gives."""
        if values is None:
            return None
        numbers = tuple(n * self.step for n in numbers_of(values, name))
        if len(numbers) != 3:
            raise InputError(f"{name} {list(values)} must be three numbers (z, y, x)")
        if name == "voxel_size" and min(numbers) <= 0:
            raise InputError(f"{name} {list(values)} must be positive")
        return numbers

    def agreed(
        self, declared: Iterable[tuple[str, Numbers | None]], given: Numbers | None, name: str
    ) -> Numbers | None:
        """Return what all sources and the user say; None if nobody says anything.

        Where sources differ, the one that the user agrees with counts. A number next to one that
        is whole in no unit agrees with it.
        """
        label = name.replace("_", " ")
        sources = [(source, values) for source, values in declared if values is not None]
        if not sources:
            return given
        chosen = sources[0]
        if given is not None:
            close = [s for s in sources if _same(s[1], given)]
            close += [s for s in sources if self._next_to(s[1], given)]
            if not close and self.given_by:
                numbers = _show(tuple(n / self.step for n in chosen[1]))
                raise InputError(
                    f"{self.where}: the numbers of its {label} {numbers} are not those of "
                    f"{self.given_by}, {self.show(given)} ({chosen[0]})"
                )
            if not close:
                raise InputError(
                    f"{self.where} declares the {label} {self.show(chosen[1])}, but {name} is "
                    f"given as {self.show(given)} ({chosen[0]}); correct or remove {name}"
                )
            chosen = close[0]
        for source, values in sources:
            if not _same(values, chosen[1]):
                differ = (
                    f"{self.where}: {chosen[0]} says the {label} {self.show(chosen[1])}, but "
                    f"{source} says {self.show(values)}"
                )
                if given is None:
                    raise InputError(f"{differ}; correct one, or give {name} to decide")
                self.notes.append(f"{differ}; the former is taken, because {name} is given")
        return chosen[1]

    def _next_to(self, values: Numbers, given: Numbers) -> bool:
        return all(
            _same((value,), (number,))
            or (abs(value - number) < self.step and not _is_whole(value, _FINEST))
            for value, number in zip(values, given, strict=True)
        )

    def whole_size(
        self, exact: Numbers, given: Numbers | None, shape: Sequence[int], corner: Numbers | None
    ) -> Numbers:
        """Return a voxel size in whole world units, rounded only where that moves no voxel far."""
        finest = _NANOMETRES[_FINEST]
        rounded = tuple(max(1, round(n / finest)) * finest for n in exact)
        wanted = exact if given is None else given

        def moved(size: Numbers) -> Decimal:
            """Return by how many voxels the far end of the volume moves."""
            corners = corner or (Decimal(0),) * 3
            return max(
                abs(s - e) / e * (n + abs(c) / e)
                for s, e, n, c in zip(size, exact, shape, corners, strict=True)
            )

        whole = tuple(round(n / self.step) * self.step for n in wanted)
        if not all(_is_whole(n, self.unit) for n in wanted):
            in_finest = f"({', '.join(str(int(n / finest)) for n in rounded)})"
            is_far = moved(rounded) >= Decimal("0.5")
            if self.unit != _FINEST:
                value = f" and voxel_size: {in_finest}" if is_far else ""
                raise InputError(
                    f"{self.where}: voxel size {self.show(wanted)} is not a whole number of "
                    f"{self.unit}, and world coordinates are whole numbers; set unit: {_FINEST}"
                    f"{value} (--unit {_FINEST})"
                )
            if is_far:
                raise InputError(
                    f"{self.where}: voxel size {self.show(exact)} is not a whole number, and "
                    f"rounded the far end of the volume would lie {moved(rounded):.2f} voxels off; "
                    f"to accept that, give voxel_size: {in_finest} (--voxel-size)"
                )
            whole = rounded
        if min(whole) <= 0:
            raise InputError(f"{self.where}: voxel size {self.show(whole)} must be positive")
        if not _same(whole, exact):
            self.notes.append(
                f"{self.where}: the voxel size {self.show(exact)} is taken as {self.show(whole)}; "
                f"the far end of the volume lies {moved(whole):.2f} voxels off"
            )
        return whole

    def with_voxels(self, corner: Numbers, exact: Numbers, size: Numbers) -> Numbers:
        """Return an offset that is as many voxels of `size` as the corner is of `exact`."""
        return tuple(
            round(c / e * s / self.step) * self.step
            for c, e, s in zip(corner, exact, size, strict=True)
        )

    def whole_offset(self, corner: Numbers) -> Numbers:
        """Return an offset in whole world units; less than a picometre is rounded."""
        if self.unit != _FINEST and not all(_is_whole(n, self.unit) for n in corner):
            raise InputError(
                f"{self.where}: offset {self.show(corner)} is not a whole number of {self.unit}, "
                f"and world coordinates are whole numbers; set unit: {_FINEST} (--unit {_FINEST})"
            )
        return corner

    def world(self, values: Numbers) -> Coordinate:
        """Return numbers in world units."""
        if max(map(abs, values)) > _LARGEST * self.step:
            raise InputError(f"{self.where}: {self.show(values)} is too large; correct it")
        return Coordinate(round(n / self.step) for n in values)


def axes_of(
    sources: Sequence[Source], shape: Sequence[int], where: str, *, x_first: bool = False
) -> Triple:
    """Return the array's dimension of z, y and x; arguments and errors are those of `place`."""
    ndim = len(shape)
    if ndim < 3:
        raise InputError(f"{where} is {ndim}-D with shape {tuple(shape)}; it must be 3-D (z, y, x)")
    named = [
        (source, order)
        for source in sources
        if source.axis_names is not None
        and (order := _axis_order(source.axis_names, ndim, source.name)) is not None
    ]
    for source, order in named:
        if order != named[0][1]:
            first = named[0][0]
            raise InputError(
                f"{where}: {first.name} says the axes are {list(first.axis_names)}, but "
                f"{source.name} says {list(source.axis_names)}; correct one"
            )
    if named:
        return named[0][1]
    return (2, 1, 0) if x_first else (ndim - 3, ndim - 2, ndim - 1)


def _axis_order(names: Any, ndim: int, where: str) -> Triple | None:
    """Return the positions of z, y, x among names; None for names such as d0, d1, d2."""
    if not isinstance(names, Sequence) or len(names) != ndim:
        raise InputError(f"{where}: {names!r} does not name {ndim} axes")
    lower = [str(name).strip().rstrip("^").lower() for name in names]
    missing = [axis for axis in AXES if axis not in lower]
    if len(missing) == 3:
        return None
    others = [i for i, name in enumerate(lower) if name not in AXES and name not in _NOT_SPACE]
    if len(missing) == 1 and len(others) == 1:
        lower[others[0]] = missing.pop()
    if missing or any(lower.count(axis) > 1 for axis in AXES):
        raise InputError(f"{where}: axes {list(names)} do not have z, y and x; it must be 3-D")
    return lower.index("z"), lower.index("y"), lower.index("x")


def _read(source: Source, axes: Triple, ndim: int) -> _Said:
    """Return the numbers of a source in (z, y, x) and, if a unit counts, in nanometres."""

    def ordered(values: Sequence[Any]) -> tuple[Any, Any, Any]:
        places = None
        if source.order is not None and len(values) == len(source.order):
            places = _axis_order(source.order, len(values), source.name)
        if places is None and len(values) == ndim:
            places = axes
        elif places is None and len(values) == 3:
            ranks = sorted(axes)
            places = ranks.index(axes[0]), ranks.index(axes[1]), ranks.index(axes[2])
        if places is None:
            raise InputError(f"{source.name}: {list(values)} must have three numbers")
        z, y, x = places
        return values[z], values[y], values[x]

    def numbers(values: Any) -> Numbers | None:
        return None if values is None else ordered(numbers_of(values, source.name))

    size, offset = numbers(source.voxel_size), numbers(source.offset)
    if size is not None and min(size) <= 0:
        raise InputError(f"{source.name}: voxel size {_show(size)} must be positive")
    units = source.units
    if units is None or isinstance(units, str):
        units = [units] * 3
    elif not isinstance(units, Sequence):
        raise InputError(f"{source.name}: units {units!r} are not a unit, or one for each axis")
    elif len(units) == 1:
        units = [*units] * 3
    factors = [f for name in ordered(units) if (f := _factor(name, source)) is not None]
    if len(factors) < 3:
        return _Said(source.name, size, offset, is_ratio=True)
    return _Said(
        source.name,
        size and tuple(n * f for n, f in zip(size, factors, strict=True)),
        offset and tuple(n * f for n, f in zip(offset, factors, strict=True)),
        is_ratio=False,
    )


def _factor(name: Any, source: Source) -> Decimal | None:
    """Return the nanometres of a unit; None if numbers in it are only ratios."""
    text = "" if name is None else str(name).strip().lower()
    if text in ("", "none"):
        return None if source.needs_unit else Decimal(1)
    if text in _PIXELS:
        return None
    if text not in _NANOMETRES:
        raise InputError(f"{source.name}: unknown unit {name!r}; use nm, um, mm, angstrom or pm")
    return _NANOMETRES[text]


def numbers_of(values: Any, name: str) -> Numbers:
    """Return a list of numbers of any kind exactly as written.

    Raises
    ------
    InputError
        If it is not one, or a number is not finite or too large; it begins with `name`.
    """
    try:
        numbers = [Decimal(str(value)) for value in values]
    except (TypeError, InvalidOperation):
        numbers = []
    if (
        isinstance(values, str | bytes | Mapping)
        or not numbers
        or not all(map(_is_usable, numbers))
    ):
        raise InputError(f"{name}: {values!r} is not a list of numbers")
    return tuple(numbers)


def _is_usable(number: Decimal) -> bool:
    return number.is_finite() and abs(number) < _LARGEST


def _is_whole(value: Decimal, unit: str) -> bool:
    number = value / _NANOMETRES[unit]
    return abs(number - round(number)) <= _RELATIVE_ERROR * max(abs(number), Decimal(1))


def _same(one: Numbers, other: Numbers) -> bool:
    return all(
        abs(a - b) <= _RELATIVE_ERROR * max(abs(a), abs(b), _NANOMETRES[_FINEST])
        for a, b in zip(one, other, strict=True)
    )


def _show(values: Numbers) -> str:
    return "(" + ", ".join(f"{value.normalize(_SHOWN):f}" for value in values) + ")"
