"""Submitted runs: start, disturb, wait, compare."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from agq.blockwise.journal.reader import Journal
from tests.helpers.runs import agq, make_config, results

N_BLOCKS = 60
Found = TypeVar("Found")


def wait_for(
    condition: Callable[[], Found],
    seconds: float = 300.0,
    every: float = 0.2,
    why: Callable[[], str] = str,
) -> Found:
    """Wait until something is so; `why` says what there is to say if it never is."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain\n{why()}"
        time.sleep(every)
    return result


def chunks(run_dir: Path) -> dict[str, bytes]:
    """Bytes of fragments and sidecars."""
    found = results(run_dir)
    kept = {k: v for k, v in found.items() if "fragments" in k or k.startswith("sidecars")}
    assert len(kept) > N_BLOCKS
    return kept


class ClusterRun:
    """One run with the fake predictor."""

    def __init__(self, folder: Path, delay_s: float = 0.5, **changes: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.run_dir = folder / "run"
        options = {"delay_s": delay_s, **changes.pop("options", {})}
        slurm = {
            "workers": 3,
            "cpus": 1,
            "mem": "900M",
            "lead_s": 30,
            "wait_s": 180,
            "coordinator": {"cpus": 1, "mem": "900M"},
            "stitch": {"cpus": 1, "mem": "2G"},
            **changes.pop("slurm", {}),
        }
        data = changes.pop("data", None)
        model = {"factory": "tests.helpers.fakes:threshold", "options": options}
        self.config = make_config(folder, data, model=model, slurm=slurm, **changes)

    def agq(self, *arguments: object, code: int = 0) -> str:
        done = agq(*arguments)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *options: str) -> None:
        self.agq("submit", self.config, "--stage", "predict", *options)

    def jobs(self, role: str) -> list[int]:
        jobs = json.loads((self.run_dir / "slurm" / "jobs.json").read_text())["jobs"]
        return [job["id"] for job in jobs if job["role"] == role]

    def queue(self, columns: str = "%F %K %T %N") -> list[str]:
        text = subprocess.run(
            ["squeue", "--noheader", f"--format={columns}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return text.splitlines()

    def journal(self) -> Journal:
        return Journal(self.run_dir / "journal" / "predict")

    def done(self) -> int:
        return int(self.journal().done(N_BLOCKS).sum())

    def wait_until_begun(self, blocks: int = 4, workers: int | None = None) -> None:
        """Wait for blocks that are done, and for worker processes that have begun."""
        wait_for(lambda: self.done() >= blocks, why=self.post_mortem)
        if workers is not None:
            wait_for(lambda: len(self.journal().workers) >= workers, why=self.post_mortem)

    def node_of(self, role: str) -> str:
        ids = {str(n) for n in self.jobs(role)}
        lines = [line.split() for line in self.queue()]
        return next(w[-1] for w in lines if w[0] in ids and "RUNNING" in w)

    def processes(self, module: str) -> list[psutil.Process]:
        """Living processes of the run that execute a module."""
        found = []
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
                alive = process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                continue
            if alive and module in line and any(w.startswith(str(self.run_dir)) for w in line):
                found.append(process)
        return found

    def stage(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "run.json").read_text())["stages"].get("predict", {})

    def wait_until_done(self, seconds: float = 600.0) -> None:
        def over() -> bool:
            return self.stage().get("state") in ("done", "failed") and not self.queue()

        try:
            wait_for(over, seconds)
        except AssertionError:
            raise AssertionError(self.post_mortem()) from None
        assert self.stage()["state"] == "done", self.post_mortem()
        assert self.done() == N_BLOCKS

    def post_mortem(self) -> str:
        text = [json.dumps(self.stage()), *self.queue()]
        for log in sorted((self.run_dir / "logs").rglob("*.log")):
            text.append(f"== {log}\n" + log.read_text(errors="replace")[-1500:])
        return "\n".join(text)
