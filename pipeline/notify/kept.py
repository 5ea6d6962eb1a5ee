"""What a run folder keeps for messages: the address of the webhook, and what was sent."""

from pathlib import Path
from typing import TYPE_CHECKING

from agq.blockwise.storage.files import make_folder, write_atomic
from agq.pipeline.status.notices import folder, notices_path

if TYPE_CHECKING:
    from agq.pipeline.notify.settings import NotifySettings


def keep_address(run_dir: Path, settings: "NotifySettings | None") -> Path | None:
    """Write the address of the webhook into the run folder, where jobs and later commands find it.

    Returns
    -------
    path
        The file, readable by its owner only; None if the settings do not hold the address.
    """
    if settings is None or settings.webhook is None:
        return None
    make_folder(folder(run_dir), own=True)
    file = folder(run_dir) / "webhook"
    write_atomic(file, settings.webhook.get_secret_value().encode(), mode=0o600)
    return file


def begin_attempt(run_dir: Path) -> None:
    """Forget what was sent: every event may be told of again."""
    notices_path(run_dir).unlink(missing_ok=True)
