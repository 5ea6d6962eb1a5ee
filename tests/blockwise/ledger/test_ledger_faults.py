"""What databases do to a run: refuse, fill up, change hands, stay away; TLS. Blocks go on."""

import datetime
import ipaddress
import logging
import signal
import time
import traceback
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pymongo import MongoClient

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import connect
from agq.blockwise.ledger.feeder import LedgerFeeder
from agq.blockwise.ledger.settings import LedgerError
from agq.pipeline.folder import RunFolder
from tests.helpers.ledgers import (
    PASSWORD,
    QUOTED,
    WORKER,
    in_journal,
    in_ledger,
    journal_slowly,
    record,
    settings_for,
    wait_for,
)
from tests.helpers.runs import agq, make_config
from tests.helpers.services import MISSING, SERVER, MongoServer, running

pytestmark = pytest.mark.skipif(not SERVER.exists(), reason=MISSING)

# What a server says while it fails over, shuts down, is full, or cannot reach its majority.
ERRORS = {
    "not the primary any more": {"errorCode": 10107},
    "stepping down": {"errorCode": 189},
    "shutting down": {"errorCode": 91},
    "disk full": {"errorCode": 14031},
    "no majority in time": {"writeConcernError": {"code": 64, "errmsg": "waiting timed out"}},
    "connection closed": {"closeConnection": True},
}
QUICK = {"not the primary any more", "disk full"}


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A server that can be told to fail: `failCommand`, as MongoDB's own tests do."""
    folder = tmp_path_factory.mktemp("failing")
    with running(MongoServer(folder, options=["--enable-test-commands"])) as server:
        yield server


@pytest.fixture
def with_users(tmp_path):
    """A server that asks for a password: `me` may write, `guest` may only read, in database d."""
    server = MongoServer(tmp_path / "mongo")
    with running(server):
        for user, role in (("me", "readWrite"), ("guest", "read")):
            server.add_user(user, PASSWORD, [{"role": role, "db": "d"}])
    server.auth = True
    with running(server):
        yield server


@pytest.mark.parametrize(
    "what", [pytest.param(w, marks=() if w in QUICK else pytest.mark.slow) for w in ERRORS]
)
def test_errors_of_a_moment_are_outlived(failing, tmp_path, what, caplog, open_ledger):
    # Soon looked at again after it has said that it is no primary.
    uri = f"{failing.uri}?heartbeatFrequencyMS=500"
    ledger = open_ledger(settings_for(uri, required=True, timeout_s=5))
    feeder = LedgerFeeder(ledger, "r", {"predict": tmp_path}, {"user": "me"})
    feeder.start()
    before, _ = journal_slowly(tmp_path, 10, 0)
    before.join()
    wait_for(lambda: len(in_ledger(ledger, "r")) == 10)
    commands = ["update", "insert", "bulkWrite"]
    with MongoClient(failing.uri) as client, caplog.at_level(logging.WARNING):
        fail = {"failCommands": commands, **ERRORS[what]}
        # More often than the driver tries again by itself.
        client.admin.command("configureFailPoint", "failCommand", mode={"times": 5}, data=fail)
        # Only now, so that there is something to deliver while it fails, however busy it is here.
        thread, times = journal_slowly(tmp_path, 110, 0.01, first=10)
        wait_for(lambda: "trying again later" in caplog.text)
    thread.join()
    report = feeder.stop(60)
    assert report.complete, report
    assert in_ledger(ledger, "r") == in_journal(tmp_path)
    assert len(in_ledger(ledger, "r")) == 120
    assert sorted(times)[60] < 0.5, "blocks do not wait for the database"


def test_a_user_who_may_only_read(with_users, tmp_path, caplog, open_ledger):
    uri = f"{with_users.uri_of('guest', PASSWORD)}?authSource=admin"
    ledger = open_ledger(settings_for(uri, database="d"))
    feeder = LedgerFeeder(ledger, "r", {"predict": tmp_path})
    with caplog.at_level(logging.DEBUG):
        feeder.start()
        with JournalWriter(tmp_path, WORKER) as writer:
            writer.finish_many(record(b) for b in range(30))
        wait_for(lambda: "trying again later" in caplog.text)
        report = feeder.stop(1)
    assert (report.complete, report.undelivered) == (False, 32)
    assert "not authorized" in report.error
    assert "may not do this in database 'd'" in caplog.text
    assert "readWrite" in caplog.text
    for secret in (PASSWORD, QUOTED):
        assert secret not in caplog.text + report.error
    # Who may write delivers it later.
    uri = f"{with_users.uri_of('me', PASSWORD)}?authSource=admin"
    writing = open_ledger(settings_for(uri, database="d"))
    feeder = LedgerFeeder(writing, "r", {"predict": tmp_path})
    feeder.start()
    assert feeder.stop(60).complete
    # And who may read follows it.
    assert in_ledger(ledger, "r") == in_journal(tmp_path)


def test_a_run_that_needs_the_ledger_does_not_begin_where_it_cannot_write(with_users, tmp_path):
    uri = f"{with_users.uri_of('guest', PASSWORD)}?authSource=admin"
    config = make_config(tmp_path, ledger={"uri": uri, "database": "d", "required": True})
    old = RunFolder(tmp_path / "run")
    old.create({}, {"other": 1})
    (old.path / "result").write_text("precious")
    refused = agq("predict", config, "--overwrite")
    assert refused.returncode == 2
    (line,) = [x for x in refused.stderr.splitlines() if not x.startswith("model.factory")]
    assert "readWrite" in line
    assert (old.path / "result").read_text() == "precious", "nothing is deleted for nothing"
    assert old.record()["identity"] == {"other": 1}
    assert "may not do this in database 'd'" in refused.stderr
    assert "readWrite" in refused.stderr
    assert not list((tmp_path / "run").rglob("*.jsonl")), "no block was begun"
    seen = refused.stdout + refused.stderr
    seen += "".join(f.read_text() for f in (tmp_path / "run").rglob("*.json"))
    assert PASSWORD not in seen
    assert QUOTED not in seen


def certificate(folder: Path, name: str, issuer=None, *, password: bytes | None = None):
    """Write a certificate for 127.0.0.1 and its key; return what signs others."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    by, signing = issuer or (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(signing, hashes.SHA256())
    )
    hidden = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    text = built.public_bytes(serialization.Encoding.PEM)
    (folder / f"{name}.crt").write_bytes(text)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden
    )
    (folder / f"{name}.key").write_bytes(private)
    (folder / f"{name}.pem").write_bytes(text + private)
    return subject, key


def test_tls_with_certificates_on_both_sides(tmp_path, open_ledger, monkeypatch, caplog):
    authority = certificate(tmp_path, "ca")
    certificate(tmp_path, "server", authority)
    certificate(tmp_path, "client", authority, password=b"k3y pass")
    certificate(tmp_path, "stranger")
    options = ["--tls-cert-file", str(tmp_path / "server.crt"),
               "--tls-key-file", str(tmp_path / "server.key"),
               "--tls-ca-file", str(tmp_path / "ca.crt"), "--tls-require-client-cert"]  # fmt: skip
    server = MongoServer(tmp_path / "mongo", options=options)
    known = f"tls=true&tlsCAFile={tmp_path}/ca.crt"
    shown = f"{known}&tlsCertificateKeyFile={tmp_path}/client.pem"
    secret = f"{shown}&tlsCertificateKeyFilePassword=k3y%20pass"
    server.query = secret
    with running(server), caplog.at_level(logging.DEBUG):
        ledger = open_ledger(settings_for(server.uri, required=True, timeout_s=5))
        with JournalWriter(tmp_path / "predict", WORKER) as writer:
            writer.finish_many(record(b) for b in range(30))
        feeder = LedgerFeeder(ledger, "r", {"predict": tmp_path / "predict"})
        feeder.start()
        assert feeder.stop(60).complete
        assert in_ledger(ledger, "r") == in_journal(tmp_path / "predict")
        plain = f"mongodb://127.0.0.1:{server.port}/"
        for query in (
            "",
            "tls=true",  # whose certificate nobody knows
            f"tls=true&tlsCAFile={tmp_path}/stranger.crt",
            known,  # without one of its own
            shown + "&tlsCertificateKeyFilePassword=wr0ng",
            f"tls=true&tlsCAFile={tmp_path}/missing.crt",
        ):
            with pytest.raises(LedgerError) as caught:
                connect(settings_for(f"{plain}?{query}", required=True))
            assert "\n" not in str(caught.value)
            trace = "".join(traceback.format_exception(caught.value))
            assert "wr0ng" not in trace
    assert "k3y" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_minute_away_while_two_processes_do_the_same_blocks(tmp_path, how, open_ledger):
    """As where SLURM runs one job twice: one record a block, in the ledger as in the journal."""
    with running(MongoServer(tmp_path / "mongo")) as server:
        ledger = open_ledger(settings_for(server.uri, required=True))
        folder = tmp_path / "predict"
        feeder = LedgerFeeder(ledger, "r", {"predict": folder}, {"user": "me"})
        feeder.start()
        threads = [journal_slowly(folder, 400, 0.2)[0] for _ in range(2)]
        wait_for(lambda: len(in_ledger(ledger, "r")) > 20)
        before = len(in_journal(folder))
        if how == "SIGSTOP":
            server.send(signal.SIGSTOP)
        else:
            server.stop(signal.SIGKILL)
        time.sleep(60)
        assert len(in_journal(folder)) > before + 100, "blocks go on without the database"
        if how == "SIGSTOP":
            server.send(signal.SIGCONT)
        else:
            server.start()
        for thread in threads:
            thread.join()
        report = feeder.stop(60)
        assert report.complete, report
        # Every ninth block fails, every second of those for good.
        done = {block for block in range(400) if block % 9 or block % 18 == 0}
        assert Journal(folder).duplicates == sorted(done)
        assert in_ledger(ledger, "r") == in_journal(folder)
        totals = ledger.find_run("r")["stages"]["predict"]["totals"]
        assert (totals["done"], totals["failed"]) == (len(done), 400 - len(done))
        assert (totals["duplicates"], totals["conflicts"]) == (len(done), 0)
        assert ledger.blocks.count_documents({}) == 400
