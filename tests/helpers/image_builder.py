"""The container image, built and run without a daemon: buildah, and a stand-in for Debian's image.

The stand-in is made by mmdebstrap from the same packages. pip inside takes the wheels that this
machine's pip has fetched, so nothing is downloaded twice.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers import ROOT

DOCKER = ROOT / "docker"
BASE = "localhost/agq-test-base"
IMAGE = "localhost/agq-test-image"


def section_of_definition(name: str) -> list[str]:
    """Return the lines of a section of docker/apptainer.def, without comments."""
    text = (DOCKER / "apptainer.def").read_text()
    _, found, rest = text.partition(f"%{name}\n")
    assert found, name
    body = rest.partition("\n%")[0]
    lines = [line.strip() for line in body.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def post_script(index: str) -> str:
    """Return the build steps of docker/apptainer.def as the shell script that they are."""
    return "\n".join(section_of_definition("post")).replace("{{ TORCH_INDEX }}", index)


def missing_builder() -> str | None:
    """Say why no image can be built here; None where it can."""
    tools = [tool for tool in ("buildah", "mmdebstrap") if shutil.which(tool) is None]
    if tools:
        return f"no image builder: {', '.join(tools)} missing (apt-get install buildah mmdebstrap)"
    if os.getuid() != 0:
        return "no image builder: buildah without a daemon needs root here"
    if sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        return "no wheels for the image: they are fetched by this Python, which is not Debian 12's"
    return None


def call(command: Sequence[str | Path], timeout: float = 600) -> str:
    """Run a command; return its output, or fail with the end of it."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


class Builder:
    """Images in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = folder / "wheels"
        self.torch_build = ""
        self._command = self._buildah("overlay")
        # Overlays need a file system that has them; copies of everything work anywhere, slowly.
        if subprocess.run([*self._command, "info"], capture_output=True, timeout=60).returncode:
            self._command = self._buildah("vfs")

    def _buildah(self, driver: str) -> list[str]:
        folders = ["--root", f"{self.folder}/images", "--runroot", f"{self.folder}/run"]
        return ["buildah", *folders, "--storage-driver", driver]

    def buildah(self, *words: str | Path, timeout: float = 600) -> str:
        """Run one buildah command."""
        return call([*self._command, *words], timeout).strip()

    def make_base(self) -> None:
        """Make the stand-in for Debian's slim image."""
        archive = self.folder / "base.tar"
        call(["mmdebstrap", "--variant=minbase", "bookworm", archive])
        box = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", box, archive, "/")
        self.buildah("commit", "--quiet", "--rm", box, BASE)
        archive.unlink()

    def fetch_wheels(self) -> None:
        """Fetch what pip inside will install, torch as this machine's pip has it."""
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", self.wheels]
        call([*pip, "-r", ROOT / "requirements" / "torch.txt"], 900)
        for name in ("build", "image"):
            locked = ["--no-deps", "--require-hashes", "--no-build-isolation"]
            call([*pip, *locked, "-r", ROOT / "requirements" / f"{name}.txt"], 900)
        torch = next(self.wheels.glob("torch-*.whl"))
        self.torch_build = torch.name.split("-")[1].partition("+")[2]
        (self.folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")

    def leave_modules_uncompiled(self) -> None:
        """Let pip inside compile no modules: that takes longer than to unpack them."""
        with (self.folder / "pip.conf").open("a") as file:
            file.write("[install]\ncompile = no\n")

    @property
    def mounts(self) -> list[str]:
        """Options that let pip inside find the wheels."""
        pairs = {self.wheels: "/wheels", self.folder / "pip.conf": "/etc/pip.conf"}
        return [f"--volume={here}:{there}:ro" for here, there in pairs.items()]

    def build(self) -> None:
        """Build the image of docker/Dockerfile."""
        words = ["bud", "--isolation", "chroot", "--pull-never", "--layers=false"]
        words += ["--format", "docker", "--file", str(ROOT / "docker" / "Dockerfile")]
        words += ["--build-arg", f"BASE={BASE}", "--tag", IMAGE, *self.mounts, str(ROOT)]
        self.buildah(*words, timeout=1200)

    def settings(self) -> dict[str, Any]:
        """Return what the image says of itself: user, entry point, health check, ..."""
        inspected = json.loads(self.buildah("inspect", "--type", "image", IMAGE))
        return dict(inspected["Docker"]["config"])

    def container(self, image: str = IMAGE) -> str:
        """Make a container of an image."""
        return self.buildah("from", "--pull-never", image)

    def run_words(self, box: str, *options: str) -> list[str]:
        """Return the words that run a command in a container: the command comes after them."""
        return [*self._command, "run", "--isolation", "chroot", *options, box, "--"]

    def size(self, box: str) -> int:
        """Return the bytes of all files of a container."""
        root = self.buildah("mount", box)
        return int(
            call(["du", "--summarize", "--block-size=1", "--one-file-system", root]).split()[0]
        )

    def close(self) -> None:
        """Delete containers and images."""
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")
        shutil.rmtree(self.folder, ignore_errors=True)


class Clock:
    """Prints how long the steps take: the test is slow, and one wants to know where."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, step: str) -> None:
        now = time.monotonic()
        print(f"{step}: {now - self._last:.0f} s")
        self._last = now
