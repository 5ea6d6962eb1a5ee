"""What predicts a block: the protocol, and how a worker gets a predictor by name.

`blockwise` knows no network. A run names a factory, ``"module:callable"``; every worker imports
it and calls it once with the run's options.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from agq.blockwise.predict.local_processes import OWN_END
from agq.errors import InputError


@runtime_checkable
class Prediction(Protocol):
    """What a predictor says of one block.

    It may also have ``memberships``, integers (1 + n_labels, anything): a row of coordinates per
    label, the more parallel the likelier two labels are one object, zero where nothing is known;
    and ``mask_weight``, from 0 to 1: how much that counts (`blocks.label_pairs`).
    """

    @property
    def labels(self) -> npt.NDArray[Any]:
        """Instance labels, uint16 or uint32, (z, y, x); 0 is background."""
        ...

    @property
    def affinities(self) -> npt.NDArray[np.uint8]:
        """Affinities (255 = 1.0), (3, z, y, x): channel c is to the voxel before on axis c."""
        ...

    @property
    def components(self) -> int:
        """Objects found."""
        ...

    @property
    def dropped(self) -> int:
        """Objects dropped by a limit of the predictor."""
        ...

    @property
    def n_labels(self) -> int:
        """Labels in `labels`."""
        ...


@runtime_checkable
class Predictor(Protocol):
    """Labels raw blocks; what it says of a block must depend on that block alone."""

    @property
    def batch_size(self) -> int:
        """Blocks that one call of `predict` takes at most."""
        ...

    def predict(self, blocks: Sequence[npt.NDArray[Any]], /) -> Sequence[Prediction]:
        """Return one prediction per raw block (z, y, x), in order."""
        ...


@runtime_checkable
class StagedPredictor(Predictor, Protocol):
    """A predictor in three parts, so that a device computes one block while the host does others.

    `predict` says what `finish` says of all that `begin` makes of what `prepare` makes of its
    blocks. Block threads, several at a time, call `prepare` and `finish`; one thread calls `begin`.
    """

    def prepare(self, block: npt.NDArray[Any], /) -> Any:
        """Return what `begin` takes of a raw block."""
        ...

    def begin(self, prepared: Sequence[Any], /) -> Sequence[Any]:
        """Return what `finish` takes, one per block, in order; at most `batch_size` blocks."""
        ...

    def finish(self, begun: Any, /) -> Prediction:
        """Return the prediction of a block."""
        ...


def resolve_factory(factory: str) -> Callable[..., Predictor]:
    """Import the callable that a factory name, ``"module:callable"``, means.

    Raises
    ------
    InputError
        If the name has another form, the module cannot be imported, or it has no such callable.
    """
    module_name, _, name = factory.partition(":")
    if not module_name or not name.isidentifier():
        raise InputError(f"predictor factory {factory!r}: expected 'module:callable'")
    try:
        module = importlib.import_module(module_name)
    except OWN_END:
        raise
    # A module of the user's may raise anything while it is imported.
    except BaseException as error:
        raise InputError(
            f"predictor factory {factory!r}: cannot import {module_name}: "
            f"{type(error).__name__}: {error} (workers look in installed packages and in "
            "PYTHONPATH, not in the current folder)"
        ) from error
    make: Callable[..., Predictor] | None = getattr(module, name, None)
    if not callable(make):
        raise InputError(f"predictor factory {factory!r}: {module_name} has no callable {name!r}")
    return make


def factory_code(factory: str) -> str | None:
    """Return a checksum of the source of a factory's module; None where it has no source."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(resolve_factory(factory)))
    except TypeError:
        return None
    return None if file is None else _file_sum(Path(file))


def option_files(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of the files that options name, such as a checkpoint, by option."""
    paths = {name: Path(value) for name, value in options.items() if isinstance(value, str)}
    sums = {name: _file_sum(path.expanduser()) for name, path in paths.items()}
    return {name: found for name, found in sums.items() if found is not None}


def _file_sum(path: Path) -> str | None:
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    # Any text may be an option: one too long for a path, too.
    except (OSError, ValueError):
        return None


def _require_files(options: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    found = option_files({name: options.get(name) for name in expected})
    for name, wanted in expected.items():
        if found.get(name) != wanted:
            now = f"is {found[name][:12]}..." if name in found else "cannot be read"
            raise InputError(
                f"{name} {options.get(name)} is not the file that the run was started with: its "
                f"SHA-256 {now}, not {wanted[:12]}...; put that file back, then run again"
            )


def load_predictor(
    factory: str,
    options: Mapping[str, Any],
    device_index: int | None = None,
    files: Mapping[str, str] | None = None,
) -> Predictor:
    """Make the predictor of a worker.

    Parameters
    ----------
    factory
        ``"module:callable"``.
    options
        Keyword arguments for it.
    device_index
        Index of the worker on its machine; places ``device: cuda`` (see `place_device`).
        None leaves the options as they are.
    files
        What `option_files` must say of the options, before and after the predictor has read them.

    Raises
    ------
    InputError
        If the factory cannot be found, what it makes is no predictor, or a file is another one.
        Errors of the factory itself are passed on.
    """
    make = resolve_factory(factory)
    _require_files(options, files or {})
    placed = dict(options) if device_index is None else place_device(options, device_index)
    predictor = make(**placed)
    _require_files(options, files or {})
    if not isinstance(predictor, Predictor):
        raise InputError(
            f"predictor factory {factory!r} made a {type(predictor).__name__}, which lacks "
            "predict() or batch_size"
        )
    if int(predictor.batch_size) < 1:
        raise InputError(
            f"predictor factory {factory!r}: batch_size {predictor.batch_size} is not positive"
        )
    return predictor


def place_device(options: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Give each worker of a machine its own GPU.

    ``device: cuda`` (and ``auto`` where there are GPUs) becomes ``cuda:{index % GPUs}``. Where a
    scheduler shows each process one GPU only (CUDA_VISIBLE_DEVICES), that is ``cuda:0``. Any
    other device, and options without a device, are left alone.
    """
    placed = dict(options)
    if placed.get("device") in ("cuda", "auto"):
        # Not at the top: predictors that need no torch must not pay for its import.
        import torch

        count = torch.cuda.device_count()
        if count:
            placed["device"] = f"cuda:{index % count}"
    return placed


def gpu_of(device: str) -> dict[str, Any]:
    """Return name and memory of a CUDA device, nothing for another one."""
    if not device.startswith("cuda"):
        return {}
    import torch  # its predictor has loaded it

    properties = torch.cuda.get_device_properties(device)
    return {"gpu": properties.name, "gpu_bytes": int(properties.total_memory)}
