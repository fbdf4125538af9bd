"""TLS from end to end, with a certificate authority made for the test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jacray
import pytest
import torch
import trustme
from jacray_workers.models import as_model

from tests.service.http.test_http_compute import NET, X
from tests.serving import ALICE, Server, serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ca.pem`, and below it the certificate and key of 127.0.0.1; `other.pem` is a stranger's authority."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other.pem")
    mine = authority.issue_cert("127.0.0.1")
    mine.private_key_pem.write_to_path(folder / "key.pem")
    for blob in mine.cert_chain_pems:
        blob.write_to_path(folder / "cert.pem", append=True)
    return folder


@pytest.fixture(scope="module")
def encrypted(folder: Path) -> Iterator[Server]:
    words = ("--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem"), "--workers", "1")
    with serving(folder / "state", *words, "--limit", "header_seconds=1", authority=folder / "ca.pem") as found:
        assert found.url.startswith("https://")
        yield found


def test_work_and_jobs_travel_encrypted(encrypted: Server, folder: Path) -> None:
    here = jacray.jacobian(as_model(NET), X, method="reverse")
    with encrypted.client(verify=folder / "ca.pem") as client:
        assert torch.equal(client.compute(NET, X, method="reverse").jacobian, here)
        assert torch.equal(client.submit(NET, X, method="reverse").result(timeout=60).jacobian, here)
        large = {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 300, "out_features": 1000}], "seed": 1}
        x = torch.randn(20, 300)  # 24 MB, which TLS cuts into records
        assert torch.equal(client.compute(large, x, method="reverse").jacobian[3], as_model(large)[0].weight)


def test_an_authority_may_be_named_by_the_environment(
    encrypted: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JACRAY_CA", str(folder / "ca.pem"))
    with encrypted.client() as client:
        assert client.jobs() is not None
    environment = {**os.environ, "JACRAY_TOKEN": ALICE}
    words = [sys.executable, "-m", "jacray.cli", "status", "--url", encrypted.url]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stranger_is_not_believed_and_one_is_told_what_to_do(encrypted: Server, folder: Path) -> None:
    for given in ({}, {"verify": True}, {"verify": str(folder / "other.pem")}):
        with (
            encrypted.client(**given) as client,
            pytest.raises(jacray.RequestError, match=r"trusted here.*verify=PATH"),
        ):
            client.compute(NET, X)
    with encrypted.client(verify=False) as client:  # for who says so
        assert client.compute(NET, X).jacobian.shape == (5, 2, 3)
    elsewhere = encrypted.url.replace("127.0.0.1", "localhost")
    with (
        jacray.Client(elsewhere, token=ALICE, verify=folder / "ca.pem") as client,
        pytest.raises(jacray.RequestError, match="ostname"),
    ):
        client.compute(NET, X)


def test_what_is_no_certificate_is_refused_by_name(encrypted: Server, folder: Path) -> None:
    (folder / "junk.pem").write_text("junk")
    for path in ("junk.pem", "nothing.pem"):
        with pytest.raises(jacray.RequestError, match="verify: must be True, False, or a file or folder"):
            encrypted.client(verify=folder / path)
    for cert, key in (("junk.pem", "key.pem"), ("cert.pem", "nothing.pem"), ("ca.pem", "key.pem")):
        words = [sys.executable, "-m", "jacray.cli", "serve", "--port", "0", "--state", str(folder / "other")]
        words += ["--tls-cert", str(folder / cert), "--tls-key", str(folder / key)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1, (cert, key)
        assert "tls_" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_wrong_scheme_is_told(encrypted: Server, server: Server) -> None:
    with (
        jacray.Client(server.url.replace("http://", "https://")) as client,
        pytest.raises(jacray.RequestError, match="must be http://"),
    ):
        client.jobs()
    with (
        jacray.Client(encrypted.url.replace("https://", "http://"), retries=0) as client,
        pytest.raises(jacray.JacrayError, match="no answer"),
    ):
        client.jobs()


def test_a_handshake_that_never_ends_is_cut_off(encrypted: Server) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", encrypted.port), timeout=20) as silent:
        assert silent.recv(1) == b""
    assert time.monotonic() - began < 15
