from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.service import __main__ as command
from benchmarks.service.load import Load, loading
from benchmarks.service.page import page
from benchmarks.service.serving import files, get

MACHINE = {
    "processor": "a processor", "cores": 2, "memory_bytes": 16 << 30, "system": "Linux", "python": "3.11", "threads": 1,
    "versions": {"torch": "2.13.0"}, "settings": {}, "huge_pages": "madvise", "date": "2026-01-01", "load": 0.5,
}  # fmt: skip


def found(**changes):
    peers = {
        "umbridge": {"package": "umbridge", "version": "1.2.10", "times": {"gradient of one": [2e-3] * 200}},
        "tesseract": {"package": "tesseract-core", "version": "1.15.0",
                      "times": {"gradient": [3.9e-3] * 200, "jacobians": [0.5] * 5}},
    }  # fmt: skip
    return {
        "machine": MACHINE, "load": 0.2, "peers": peers,
        "latency": {"gradient": [2e-3] * 300, "gradient of one": [2.6e-3] * 300, "jacobians": [0.01] * 100,
                    "result": [0.3] * 15},
        "batching": {"small": {"batched": [700.0, 900.0, 800.0], "single": [300.0, 200.0, 200.0]},
                     "dear": {"batched": [500.0, 500.0, 510.0], "single": [50.0, 50.0, 51.0]}},
        "health": {"batched": [0.01] * 300, "single": [0.01] * 290 + [0.2] * 10},
        "job": {"asked": 1000.0, "alone": [2.0, 2.0, 2.0], "loaded": [2.1, 2.1, 2.4], "rates": [999.0] * 3,
                "answers": [1e-3] * 200},
        **changes,
    }  # fmt: skip


def verdicts(text):
    return {line.split(" | ")[0][2:]: line.split(" | ")[-1].strip(" |") for line in text.splitlines() if "| " in line}


def test_the_page_says_what_was_promised_and_whether_it_holds():
    said = verdicts(page(found()))
    assert [said[work] for work in said if work.startswith("weighted")] == ["yes", "**no**"]
    assert [said[work] for work in said if work.startswith(("Jacobians", "80 MB"))] == ["yes", "yes"]
    assert [said[work] for work in said if work.startswith("gain")] == ["**no**", "yes"]
    assert [said[work] for work in said if work.startswith("health")] == ["yes", "**no**"]
    assert [said[work] for work in said if work.startswith("a job")] == ["yes"]


def test_the_page_has_machine_versions_and_spread():
    text = page(found())
    expected = [
        "a processor", "torch 2.13.0, umbridge 1.2.10, tesseract-core 1.15.0",
        "500 ms (500 ms to 500 ms; most 500 ms; 5 calls) Tesseract: 50x",
        "4x (2.33x to 4.5x): 800 (700 to 900) requests/s batched", "p99 200 ms",
        "1.05x (1.05x to 1.2x) its time alone", "240 layers of 64",
    ]  # fmt: skip
    assert [words for words in expected if words not in text] == []


@pytest.mark.parametrize(
    "job", [{"loaded": [2.3] * 3}, {"rates": [700.0, 1000.0, 800.0]}], ids=["slower", "requests left unanswered"]
)
def test_a_job_is_disturbed_when_it_is_slower_or_the_load_was_not_there(job):
    text = page(found(job={**found()["job"], **job}))
    assert next(v for work, v in verdicts(text).items() if work.startswith("a job")) == "**no**"


def test_without_peers_ours_stands_alone(capsys, tmp_path):
    absent = {name: command.peer(name, tmp_path / "no-python", 1) for name in command.PEERS}
    assert "bench-service" in capsys.readouterr().err
    text = page(found(peers=absent))
    assert "peers not installed" in text
    assert next(v for work, v in verdicts(text).items() if work.startswith("Jacobians")) == ""


def test_a_peer_that_fails_is_told(capsys, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho its last words >&2\nexit 3\n")
    python.chmod(0o700)
    assert command.peer("umbridge", python, 1) == {"absent": "umbridge failed"}
    assert "its last words" in capsys.readouterr().err


class Pages(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        body = b"well" * 10
        self.send_response(200 if self.path != "/missing" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments): ...


@pytest.fixture
def pages():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        server.asked, server.daemon_threads = [], True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def asked_of(server, folder, *paths, **fields):
    port = server.server_address[1]
    return Load("127.0.0.1", port, files(folder, [get(f"http://127.0.0.1:{port}", path) for path in paths]), **fields)


def wait_for(server, count):
    until = time.monotonic() + 30
    while len(server.asked) < count:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("rate", [None, 100.0])
def test_clients_ask_in_turn_until_told_to_stop_and_count_their_answers(pages, tmp_path, rate):
    with loading(asked_of(pages, tmp_path, "/a", "/b", connections=3, rate=rate)) as counted:
        wait_for(pages, 20)
    assert set(pages.asked) == {"/a", "/b"}
    # Of each client one answer at most was under way at the end, and does not count.
    assert len(pages.asked) - 3 <= len(counted.times) <= len(pages.asked)
    assert counted.rate == len(counted.times) / counted.seconds
    if rate is not None:
        assert len(counted.times) <= rate * counted.seconds + 3


def test_what_comes_while_it_settles_does_not_count(pages, tmp_path):
    with loading(asked_of(pages, tmp_path, "/a", settle=1000.0)) as counted:
        wait_for(pages, 3)
    assert counted.times == []


def test_an_answer_that_is_no_success_is_not_counted_but_told(pages, tmp_path):
    with pytest.raises(RuntimeError, match="404"), loading(asked_of(pages, tmp_path, "/missing")):
        wait_for(pages, 1)


@pytest.mark.slow
def test_the_command_measures_our_side_and_writes_the_page(tmp_path):
    data, out = tmp_path / "times.json", tmp_path / "page.md"
    arguments = ["--quick", "--peers", str(tmp_path / "none"), "--json", str(data), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.service", *arguments], check=True, cwd=Path(__file__).parents[2])
    times = json.loads(data.read_text())
    assert all(rate > 0 for sides in times["batching"].values() for rates in sides.values() for rate in rates)
    assert times["job"]["rates"][0] > 0
    assert "| 80 MB of result" in out.read_text()
