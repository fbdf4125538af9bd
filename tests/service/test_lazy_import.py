import subprocess
import sys

import jacray
import pytest


def test_import_loads_nothing_heavy() -> None:
    code = "import jacray, sys; print(sorted({'torch', 'ray', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_computing_here_loads_no_ray() -> None:
    code = (
        "import jacray, torch, sys\n"
        "jacray.jacobian(torch.nn.Linear(2, 1), torch.ones(3, 2))\n"
        "with jacray.Client('inline') as client:\n"
        "    client.submit(torch.nn.Linear(2, 1), torch.ones(3, 2)).result()\n"
        "print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", jacray.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(jacray, name) is not None
    assert name in dir(jacray)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'jacobain'"):
        jacray.jacobain  # noqa: B018


def test_errors_are_the_engines() -> None:
    assert issubclass(jacray.RequestError, jacray.errors.UserError)
