"""The README's examples, run as they are written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import jacray
import pytest
import torch

from tests.serving import ALICE, Server

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
SERVICE = README.split("## A service for a team")[1].split("\n## ")[0]
NET = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def block(text: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_the_service_example(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JACRAY_TOKEN", ALICE)
    code = block(SERVICE, "python").replace("http://127.0.0.1:8765", server.url)
    names = {"jacray": jacray, "model": NET, "x": X, "k": torch.ones(2)}
    exec(code, names)
    known = jacray.weighted_gradient(NET, X, weights=torch.ones(2))
    torch.testing.assert_close(names["g"], known)
    torch.testing.assert_close(names["result"].jacobian, jacray.jacobian(NET, X))  # type: ignore[attr-defined]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_request_by_hand(server: Server) -> None:
    command = re.search(r"^curl .*?(?=\n```)", SERVICE, re.DOTALL | re.MULTILINE)
    assert command
    asked = command[0].replace("http://127.0.0.1:8765", server.url)
    done = subprocess.run(
        ["bash", "-c", f"{asked} -H 'Authorization: Bearer {ALICE}'"], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["results"]["jacobian"] == [[8.0, 2.0]]


@pytest.mark.ray
def test_the_first_example(local_client: jacray.Client, capsys: pytest.CaptureFixture[str]) -> None:
    del local_client  # the example joins the session's Ray
    code = block(README, "python")
    names = {"jacray": jacray, "model": NET, "x": X, "k": torch.ones(2)}
    exec(code.replace('"layers.*.weight"', '"*.weight"'), names)
    assert "method" in capsys.readouterr().out
    torch.testing.assert_close(names["result"].jacobian, jacray.jacobian(NET, X))  # type: ignore[attr-defined]
