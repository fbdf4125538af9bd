"""A download that breaks off goes on where it was, and samples that always fail can be left out over HTTP too."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import jacray
import pytest
import torch
from jacray_workers.models import as_model

from tests.serving import ALICE, Server

WIDE: dict[str, Any] = {
    "kind": "layers",
    "layers": [{"kind": "Linear", "in_features": 400, "out_features": 500}],
    "seed": 1,
}
ROWS = 30  # 24 MB of Jacobians


class Cutting:
    """A proxy that ends a connection after so many bytes of its answers; then it lets everything through.

    Attributes:
        cuts: after how many bytes, one after the other.
        sent: how many bytes it passed on in all.
        asked: the `Range` of each request.
    """

    def __init__(self, port: int, cuts: list[int]) -> None:
        self.port, self.cuts, self.sent, self.asked = port, cuts, 0, list[str]()
        self._door = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._door.getsockname()[1]}"

    def close(self) -> None:
        self._door.close()

    def _listen(self) -> None:
        while True:
            try:
                mine, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(mine,), daemon=True).start()

    def _pass(self, mine: socket.socket) -> None:
        left = 1 << 60
        with mine, socket.create_connection(("127.0.0.1", self.port)) as theirs:
            threading.Thread(target=self._upwards, args=(mine, theirs), daemon=True).start()
            while piece := theirs.recv(1 << 16):
                if left > 1 << 50 and len(piece) > 20_000 and self.cuts:
                    left = self.cuts.pop(0)
                mine.sendall(piece[:left])
                self.sent += len(piece[:left])
                left -= len(piece)
                if left <= 0:
                    mine.shutdown(socket.SHUT_RDWR)
                    return

    def _upwards(self, mine: socket.socket, theirs: socket.socket) -> None:
        try:
            while piece := mine.recv(1 << 16):
                lines = piece.split(b"\r\n")
                self.asked += [line.decode() for line in lines if line.lower().startswith(b"range:")]
                theirs.sendall(piece)
        except OSError:
            pass


@pytest.fixture
def cutting(server: Server) -> Iterator[Cutting]:
    proxy = Cutting(server.port, [])
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def job(server: Server) -> str:
    with server.client() as client:
        done = client.submit(WIDE, torch.ones(ROWS, 400), returns=["jacobian", "norms"], method="reverse")
        done.result(timeout=100)
        return str(done.id)


def test_a_result_goes_on_where_it_broke_off(server: Server, cutting: Cutting, job: str) -> None:
    cutting.cuts = [3_000_000, 5_000_001, 7_000_003]
    with jacray.Client(cutting.url, token=ALICE, retries=1) as client:  # what moves on has all its patience again
        found = client.job(job).result()
        assert torch.equal(found.jacobian, as_model(WIDE)[0].weight.expand(ROWS, -1, -1))
        assert found.receipt["verified"]["passed"]
        whole = 4 * ROWS * 400 * 500
        assert whole <= cutting.sent < 1.2 * whole
        assert [int(line.split("=")[1].rstrip("-")) > 0 for line in cutting.asked] == [True] * 3
        cutting.cuts = [1_000_000]
        assert torch.equal(client.job(job).array("jacobian", 10), found.jacobian[10:])
        cutting.cuts = [0] * 10
        with pytest.raises(jacray.JacrayError, match="no answer"):
            client.job(job).array("jacobian", 5)


def test_ranges_of_a_message(server: Server, job: str) -> None:
    path = f"/v1/jobs/{job}/result?array=norms"
    status, headers, whole = server.ask("GET", path)
    assert (status, headers["accept-ranges"], headers["content-length"]) == (200, "bytes", str(len(whole)))

    def part(asked: str, **more: str) -> tuple[int, Any]:
        status, told, body = server.ask("GET", path, headers={"Range": asked, **more})
        if status == 206:
            assert told["etag"] == headers["etag"]
            assert told["content-range"].endswith(f"/{len(whole)}")
        return status, body

    for first in (0, 1, 8, 100, len(whole) - 1):
        assert part(f"bytes={first}-") == (206, whole[first:])
        assert part(f"bytes={first}-{first + 9}") == (206, whole[first : first + 10])
    assert part("bytes=3-", **{"If-Range": headers["etag"]}) == (206, whole[3:])
    assert part("bytes=3-", **{"If-Range": '"another"'}) == (200, whole)
    for nothing in ("bytes=-5", "bytes=9-3", "lines=1-2", "bytes=1-2,4-5", "bytes=x-"):
        assert part(nothing) == (200, whole)
    status, told, problem = server.ask("GET", path, headers={"Range": f"bytes={len(whole)}-"})
    assert (status, told["content-range"], problem["key"]) == (416, f"bytes */{len(whole)}", "Range")


def test_parts_that_do_not_make_the_whole_are_noticed(server: Server, cutting: Cutting, job: str) -> None:
    from jacray.http import download

    cutting.cuts = [3_000_000]
    before = download.Download.take

    def spoils(self: Any, response: Any) -> Any:
        if self.at:
            self.data[1000] ^= 1
        return before(self, response)

    download.Download.take = spoils  # type: ignore[method-assign]
    try:
        with (
            jacray.Client(cutting.url, token=ALICE) as client,
            pytest.raises(jacray.JacrayError, match="is not what the service has"),
        ):
            client.job(job).result()
    finally:
        download.Download.take = before  # type: ignore[method-assign]


def test_samples_that_always_fail_are_left_out(server: Server) -> None:
    x = torch.zeros(400, 400)  # 320 MB of Jacobians: several shards, however large a chunk is chosen
    x[37] = torch.nan
    model = {**WIDE, "layers": [*WIDE["layers"], {"kind": "Tanh"}]}
    fields: dict[str, Any] = {"nan_policy": "raise", "method": "reverse", "verify": False}
    here = jacray.jacobian(as_model(model), x, method="reverse")
    with server.client() as client:
        there = client.submit(model, x, on_error="skip", **fields).result(timeout=100)
        ((start, stop),) = [(skip["start"], skip["stop"]) for skip in there.receipt["skipped"]]
        assert start <= 37 < stop
        missing = torch.isnan(there.jacobian).flatten(1).all(1)
        torch.testing.assert_close(there.jacobian[~missing], here[~missing])
        assert missing.nonzero().flatten().tolist() == list(range(start, stop))
        with pytest.raises(jacray.NonFiniteError):
            client.submit(model, x, **fields).result(timeout=100)
        with pytest.raises(jacray.RequestError, match="on_error: must be one of fail, skip"):
            client.submit(model, x, on_error="ignore")  # type: ignore[arg-type]
        with pytest.raises(jacray.RequestError, match="on_error: skip needs results with a row per sample"):
            client.submit(model, x, on_error="skip", returns=["gram"])
    body = {"model": model, "inputs": [[0.0] * 400], "options": {"on_error": "never"}}
    assert server.ask("POST", "/v1/jobs", body)[2]["key"] == "options"
    assert server.ask("POST", "/v1/compute", {**body, "options": {"on_error": "skip"}})[2]["key"] == "options"
