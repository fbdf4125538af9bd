import jacray
import pytest

from tests.known_answers import CASES, Case

ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@ALL
def test_functions(case: Case) -> None:
    case.check(lambda name: getattr(jacray.compute(case.model, case.inputs, **case.request), name))


@ALL
def test_one_result_functions(case: Case) -> None:
    fields = dict(case.fields)
    if "jacobian" in case.expected:
        found = {"jacobian": jacray.jacobian(case.model, case.inputs)}
    else:
        found = {"weighted_gradient": jacray.weighted_gradient(case.model, case.inputs, **fields)}
    for name, value in found.items():
        Case(case.name, case.model, case.x, {name: case.expected[name]}).check({name: value}.__getitem__)


@ALL
def test_clients(case: Case, client: jacray.Client) -> None:
    result = client.submit(case.model, case.inputs, **case.request).result(timeout=120)
    case.check(lambda name: getattr(result, name))
    assert result.names == tuple(case.expected)
