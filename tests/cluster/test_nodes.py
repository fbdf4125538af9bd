"""A cluster as `docs/cluster.md` starts one: a head, a second node, a token, and jobs through every door to it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jacray
import pytest
import torch
from jacray.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
JOBS = importlib.util.find_spec("aiohttp_cors") is not None


@dataclass(frozen=True)
class Nodes:
    """A running cluster: where it is, and the environment that lets a process in."""

    address: str
    client_port: int
    dashboard_port: int
    environment: dict[str, str]

    def command(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster would, on this machine."""
        return subprocess.run(
            [str(BIN / words[0]), *words[1:]],
            check=False, capture_output=True, text=True, timeout=240, cwd=ROOT, env={**self.environment, **changes},
        )  # fmt: skip

    def script(self, code: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a few lines of Python as a user of the cluster would."""
        return self.command("python", "-c", textwrap.dedent(code), **changes)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def node(log: Path, environment: dict[str, str], *words: str) -> Iterator[None]:
    """`ray start --block`, ended with everything that it started."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *words],
            stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for(log, process)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(log: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if "Ray runtime started" in log.read_text():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    # Ray's sockets need a short path.
    folder = Path(tmp_path_factory.mktemp("c"))
    token = folder / "auth_token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": os.pathsep.join((str(ROOT / "service"), str(ROOT / "workers"))),
    }
    environment.pop("RAY_ADDRESS", None)
    client_port, dashboard_port = free_port(), free_port()
    dashboard = ("--dashboard-port", str(dashboard_port)) if JOBS else ("--include-dashboard", "false")
    log = folder / "head"
    with node(
        log, environment, "--head", "--port", "0", "--num-cpus", "1", "--ray-client-server-port", str(client_port),
        *dashboard,
    ):  # fmt: skip
        [address] = set(re.findall(r"--address='([\d.:]+)'", log.read_text()))
        # Nodes that share a folder, as machines never do, delete each other's copies of a job's working directory.
        apart = ("--temp-dir", str(folder / "r"))
        with node(folder / "second", environment, "--address", address, "--num-cpus", "1", *apart):
            yield Nodes(address, client_port, dashboard_port, {**environment, "RAY_ADDRESS": address})


def jacobian_of(folder: Path) -> torch.Tensor:
    found: torch.Tensor = jacray.load(folder).jacobian
    return found


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The run of configs/first.yaml in this process."""
    folder = tmp_path_factory.mktemp("quiet") / "run"
    assert (
        main(["run", str(ROOT / "configs/first.yaml"), "cluster.address=inline", *PINNED, f"output.path={folder}"]) == 0
    )
    return jacobian_of(folder)


PINNED = ("request.method=reverse", "request.chunk_size=8")


def test_a_job_from_a_machine_of_the_cluster(nodes: Nodes, quiet: torch.Tensor, tmp_path: Path) -> None:
    done = nodes.command(
        "jacray", "run", "configs/first.yaml", "cluster.address=auto", *PINNED, f"output.path={tmp_path}/run"
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(jacobian_of(tmp_path / "run"), quiet)


def test_a_job_from_outside_through_rays_client(nodes: Nodes, quiet: torch.Tensor, tmp_path: Path) -> None:
    address = f"cluster.address=ray://127.0.0.1:{nodes.client_port}"
    done = nodes.command("jacray", "run", "configs/first.yaml", address, *PINNED, f"output.path={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert torch.equal(jacobian_of(tmp_path / "run"), quiet)


@pytest.mark.skipif(not JOBS, reason="needs Ray's dashboard: pip install 'jacray[cluster]'")
def test_a_job_that_ray_runs(nodes: Nodes, quiet: torch.Tensor, tmp_path: Path) -> None:
    experiment = tmp_path / "my-experiment"
    experiment.mkdir()
    (experiment / "experiment.yaml").write_text((ROOT / "configs/first.yaml").read_text())
    done = nodes.command(
        "ray", "job", "submit", f"--address=http://127.0.0.1:{nodes.dashboard_port}", f"--working-dir={experiment}",
        "--", "jacray", "run", "experiment.yaml", "cluster.address=auto", *PINNED, f"output.path={tmp_path}/run",
        RAY_ADDRESS="",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch.equal(jacobian_of(tmp_path / "run"), quiet)


def test_another_version_is_refused_with_both_named(nodes: Nodes) -> None:
    done = nodes.script(
        """
        import jacray, torch
        jacray.__version__ = "9.9.9"
        with jacray.Client("auto", workers=1) as client:
            try:
                client.submit(torch.nn.Linear(3, 2), torch.ones(4, 3)).result(timeout=100)
            except jacray.RequestError as error:
                print("REFUSED", error)
        """
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rf"REFUSED .*same version of jacray.*9\.9\.9 here and {jacray.__version__} there", done.stdout)


@pytest.mark.parametrize("token", ["another-token-another-token-another-token", ""])
def test_a_stranger_is_refused_in_one_message(nodes: Nodes, tmp_path: Path, token: str) -> None:
    done = nodes.command(
        "jacray", "run", "configs/first.yaml", "cluster.address=auto", f"output.path={tmp_path}/run",
        RAY_AUTH_TOKEN=token, RAY_AUTH_TOKEN_PATH="", RAY_AUTH_MODE="token" if token else "disabled",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_package_is_sent_to_the_workers(nodes: Nodes, tmp_path: Path) -> None:
    package = tmp_path / "only_here"
    package.mkdir()
    code = """
    import torch

    class Net(torch.nn.Module):
        def forward(self, x):
            return x * (2.0 if "_ray_pkg" in __file__ else 1.0)  # Ray unpacks what it was sent under this name
    """
    (package / "__init__.py").write_text(textwrap.dedent(code))
    done = nodes.script(
        f"""
        import sys
        sys.path.append({str(tmp_path)!r})
        import jacray, only_here, torch
        for sent in ({{}}, {{"py_modules": [{str(package)!r}]}}):
            with jacray.Client("auto", workers=1, runtime_env=sent) as client:
                print(float(client.submit(only_here.Net(), torch.ones(4, 1)).result(timeout=100).jacobian.mean()))
        """
    )
    assert done.stdout.split() == ["1.0", "2.0"], done.stdout + done.stderr
