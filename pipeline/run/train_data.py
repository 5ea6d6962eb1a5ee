"""The volumes a training configuration names: synthetic ones are made, optional ones may lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.model.training.config import TrainConfig, VolumeConfig
from agq.pipeline.data.synthetic import volume as synthetic
from agq.pipeline.run.fit import Size, fits, misfit, nanometres, show
from agq.pipeline.status.progress import step_progress


def ready(plan: TrainConfig, say: Callable[[str], None], *, alone: bool = True) -> TrainConfig:
    """Make the synthetic volumes, and leave out optional volumes that do not exist.

    A volume being made has another name until it is whole, so an interrupted command leaves
    nothing that could be taken for one.

    Parameters
    ----------
    plan
        The run.
    say
        Called with a line for every volume that is left out.
    alone
        Whether this is the only process of the run; several must find all volumes made.

    Returns
    -------
    TrainConfig
        With the volumes that are there, and with their voxel size where the configuration has none.

    Raises
    ------
    InputError
        If no volume is left to train on, voxel sizes of the volumes do not fit each other, or a
        volume has to be made and there are other processes.
    """

    def there(volume: VolumeConfig) -> bool:
        if volume.container.exists():
            return True
        if volume.synthetic is not None:
            if not alone:
                raise InputError(
                    f"{volume.container} has to be made first: agq synthetic {volume.container} "
                    f"--shape {','.join(map(str, volume.synthetic.shape))} "
                    f"--seed {volume.synthetic.seed}"
                )
            make(volume)
            return True
        if volume.optional:
            say(f"{volume.container} does not exist and is optional: training without it")
        return not volume.optional

    volumes = [volume for volume in plan.volumes if there(volume)]
    if not volumes:
        raise InputError("volumes: none of the optional volumes exists; name one that does")
    validation = [volume for volume in plan.validation if there(volume)]
    size = _voxel_size(plan.network.voxel_size, volumes, say)
    network = plan.network.model_copy(update={"voxel_size": size})
    return plan.model_copy(
        update={"volumes": volumes, "validation": validation, "network": network}
    )


def _voxel_size(
    given: Size | None, volumes: list[VolumeConfig], say: Callable[[str], None]
) -> Size | None:
    """Return the voxel size (nm) that the checkpoint will say it was trained at."""
    sizes: dict[Path, Size] = {}
    for volume in (volume for volume in volumes if volume.container.exists()):
        try:
            opened = open_volume(volume.container, volume.raw, unit=None)
        except InputError as error:
            say(f"{error}; training goes on, and does not know the voxel size of this volume")
            continue
        if not opened.is_stored_zyx:
            raise InputError(
                f"{opened.name} names its axes in another order, and training reads z, y, x as "
                "stored: write raw and labels so"
            )
        sizes[volume.container] = nanometres(opened)
    if given is None and sizes:
        given = sizes[max(volumes, key=lambda v: (v.container in sizes, v.weight)).container]
        for container, size in sizes.items():
            if not fits(size, given):
                raise InputError(
                    f"{container} has voxels of {show(size)}, another volume of {show(given)}: "
                    f"{misfit(size, given)}; leave one out, or set network.voxel_size to that "
                    "which the checkpoint is for"
                )
    if given is None:
        say("set network.voxel_size, or the checkpoint will not say what volumes it is for")
        return None
    for container, size in sizes.items():
        if not fits(size, given):
            say(
                f"{container} has voxels of {show(size)}, network.voxel_size is {show(given)}: "
                f"{misfit(size, given)}"
            )
    return given


def make(volume: VolumeConfig) -> None:
    """Write the synthetic volume of an entry, whole or not at all."""
    assert volume.synthetic is not None
    if (volume.raw, volume.labels, volume.mask) != ("raw", "labels", None):
        raise InputError(
            f"{volume.container}: a synthetic volume has raw and labels, and no mask; "
            "leave these names out"
        )
    container = volume.container
    container.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: another command may be making the same volume.
    with (
        TemporaryDirectory(prefix=f"{container.name}.unfinished-", dir=container.parent) as folder,
        step_progress(f"making {container.name}") as report,
    ):
        unfinished = Path(folder) / container.name
        synthetic.write(
            unfinished,
            volume.synthetic.shape,
            seed=volume.synthetic.seed,
            on_progress=report,
        )
        try:
            unfinished.rename(container)
        except OSError:
            if not container.exists():
                raise
            # The other command was first, with the same volume.
