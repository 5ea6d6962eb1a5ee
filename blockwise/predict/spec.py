"""What the processes of one prediction share: the specification and the session.

Everything a worker needs is in the run folder, so a worker that a scheduler starts on another
machine, at any time, is told nothing but that folder:

- ``predict.json``: `PredictSpec`, written once; ``predict.secrets.json`` beside it has what only
  its owner may read of it (`storage.addresses`);
- ``session.json``: `Session`, where the dispatcher listens now; replaced by every new dispatcher.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
)

from agq.blockwise.blocks.grid import GridSpec
from agq.blockwise.predict.paths import session_path, spec_path
from agq.blockwise.predict.settings import AttemptSettings
from agq.blockwise.storage.addresses import put_away, put_back
from agq.blockwise.storage.files import require_folder, write_atomic
from agq.blockwise.storage.portable import from_portable, to_portable
from agq.blockwise.volumes.content import Content
from agq.errors import InputError
from agq.owners import require_own
from agq.reading import read_record


class PredictSpec(AttemptSettings, GridSpec):
    """One prediction: what is read, how it is cut, what predicts, which workers compute."""

    run_dir: str
    """Run folder. Workers use the folder they are given, which may be mounted elsewhere."""

    raw: dict[str, Any]
    """Keyword arguments of `volumes.open.open_volume` (path, dataset, voxel_size, ...)."""

    mask: dict[str, Any] | None = None
    """The same of the mask that hides voxels; None: none is hidden."""

    contents: dict[str, Content] = Field(default_factory=dict)
    """What `raw` and `mask` held when the run began, by these names."""

    bad_sections: tuple[NonNegativeInt, ...] = ()
    """Sections of raw in whose place the nearest other one is read."""

    hide_bad_sections: bool = False
    """Whether they have no label, as where a mask is zero."""

    contrast: tuple[tuple[float, float], ...] | None = None
    """Grey values that become black and white: one pair, or one of each section; None: as it is."""

    factory: str
    """``module:callable`` that makes the predictor."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""

    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the files that `options` name, by option: a worker takes no other ones."""

    affinities: bool = False
    """Also keep the affinities of every voxel (uint8, 3 channels)."""

    workers: NonNegativeInt = 1
    """Worker processes that the coordinator starts on its own machine; 0: others will join."""

    listen: str | None = None
    """Address of this machine, on the cluster's network, at which workers of other machines may
    join with the session's token (`predict.auth_proxy`); None: workers of this machine only."""

    drain_after: NonNegativeInt = 0
    """Failures in a row after which a worker tries a block that was computed before, and leaves
    if it cannot: a broken device fails every block, bad data only their own. 0: never."""

    revision: NonNegativeInt = 0
    """Revision of the journal (`BlockRecord.revision`): how often blocks were taken back."""

    def save(self) -> None:
        """Write ``predict.json`` into the run folder."""
        values = to_portable(self.model_dump(mode="json"), Path(self.run_dir))
        path = spec_path(self.run_dir)
        write_atomic(path, json.dumps(put_away(path, values), indent=1).encode(), mode=0o644)

    @classmethod
    def load(cls, run_dir: str | Path, *, to_run: bool = False) -> "PredictSpec":
        """Read the specification of a run folder.

        Parameters
        ----------
        run_dir
            The folder.
        to_run
            Whether the factory that it names will be run: then it must be a trusted user's, and
            nobody else may write it.

        Raises
        ------
        InputError
            If the folder has none, or it is damaged or of another release, or somebody else may
            have written it.
        """
        path = spec_path(run_dir)
        try:
            values = from_portable(
                read_record(path, check=require_own if to_run else None), Path(run_dir)
            )
            return cls.model_validate(put_back(path, values))
        except FileNotFoundError:
            raise InputError(f"{path} is missing: {run_dir} is no run folder") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "file"
            raise InputError(f"{path}: {field}: {first['msg']}") from None
        except ValueError:
            raise InputError(f"{path} is damaged: start the run again") from None


class Session(BaseModel):
    """Where a dispatcher listens; `state` "closed" tells workers that the run has ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    state: Literal["open", "closed"] = "open"
    host: str = ""
    port: int = 0
    token: str = Field("", repr=False)
    """Secret for the proxy in front of the dispatcher; empty: there is no proxy."""
    machine: str = ""
    """Name of the dispatcher's machine: without a proxy no other one can join."""
    revision: int = 0
    """`PredictSpec.revision`: a worker may have started before blocks were taken back."""
    alone: bool = False
    """Workers take one block at a time: a block that kills its worker then harms no other."""

    def save(self, run_dir: str | Path) -> None:
        """Write ``session.json``, for its owner only, replacing that of an earlier dispatcher.

        Raises
        ------
        RunGoneError
            If there is no run folder.
        """
        require_folder(run_dir)
        write_atomic(session_path(run_dir), self.model_dump_json().encode(), mode=0o600)

    @classmethod
    def load(cls, run_dir: str | Path) -> "Session | None":
        """Return the present session, None where there is none.

        Raises
        ------
        InputError
            If the file is damaged.
        """
        path = session_path(run_dir)
        try:
            return cls.model_validate(read_record(path, check=require_own))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise InputError(f"{path}: file is damaged ({error.errors()[0]['msg']})") from None
