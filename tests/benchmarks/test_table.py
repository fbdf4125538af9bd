from __future__ import annotations

import json
import math

import pytest

from benchmarks import __main__ as command
from benchmarks import table
from benchmarks.page import page
from benchmarks.task import make_task
from benchmarks.works import WORKS, find

MACHINE = {
    "processor": "a processor", "cores": 2, "memory_bytes": 16 << 30, "system": "Linux", "python": "3.11", "threads": 2,
    "versions": {"torch": "2.13.0", "jax": "absent"}, "settings": {"THP_MEM_ALLOC_ENABLE": "1"},
    "huge_pages": "madvise", "date": "2026-01-01", "load": 0.5,
}  # fmt: skip


def side(seconds, size=1000):
    return {"median": seconds, "minimum": seconds * 0.9, "low": seconds * 0.95, "high": seconds * 1.1, "calls": 7,
            "first": 1.0, "error": 1e-7, "bytes_out": size, "peak_bytes": 5000}  # fmt: skip


def row(ours=0.010, jacrev=0.040, other=0.030, target=None, **changes):
    asked = {"against": "best peer", "speed": None, "limit": None, "bytes": None, "seconds": None, **(target or {})}
    return {
        "work": "work", "title": "some work", "target": asked, "least": {"operations": 4e8, "bytes": 1e6},
        "dense_bytes": 100_000, "rates": {"operations_per_second": 1e11, "bytes_per_second": 1e10,
                                          "fresh_bytes_per_second": 1e9},
        "machine": MACHINE,
        "sides": {"jacray": side(ours), "vmap(jacrev)": side(jacrev, 100_000), "other": side(other, 100_000),
                  "poor": {"cannot": "no rule"}, "mistaken": {"wrong": "differs by 2.0"}},
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "met"),
    [
        ({}, None),
        ({"speed": 2.9}, True),
        ({"speed": 3.1}, False),
        ({"speed": 3.9, "against": "vmap(jacrev)"}, True),
        ({"speed": 4.1, "against": "vmap(jacrev)"}, False),
        ({"speed": 2.9, "limit": 2.6}, True),
        ({"speed": 2.9, "limit": 2.4}, False),
        ({"bytes": 99}, True),
        ({"bytes": 101}, False),
        ({"seconds": 0.011}, True),
        ({"seconds": 0.009}, False),
        ({"speed": 2.0, "against": "a peer that is missing"}, False),
    ],
)
def test_a_promise_holds_or_does_not(target, met):
    assert table.verdict(row(target=target))["met"] is met


def test_the_limit_is_the_larger_of_both():
    assert table.limit(row()) == pytest.approx(4e-3)
    assert table.limit(row(least={"operations": 1.0, "bytes": 1e9})) == pytest.approx(0.1)
    assert table.limit(row(rates={})) is None


def test_the_page_says_everything():
    regret = {"chosen": "layerwise", "best": "reverse", "ratio": 1.3, "medians": {"layerwise": 0.013, "reverse": 0.01}}
    regret["priced_out"] = {"forward": 123.4}
    text = page([row(target={"speed": 2.5}), row(target={"speed": 5}, title="other work", regret=regret)])
    assert "| some work | 10 ms | 30 ms other | 3x | 2.5x best peer | 4 ms, 2.5x |" in text
    summary = [line for line in text.splitlines() if line.startswith(("| some work", "| other work"))]
    assert summary[0].endswith("| yes |")
    assert summary[1].endswith("| **no** |")
    expected = [
        "a processor",
        "torch 2.13.0",
        "THP_MEM_ALLOC_ENABLE=1",
        "cannot: no rule",
        "promised at most 1.25x; met: **no**",
        "| forward 123x |",
        "wrong: differs by 2.0",
        "100 Gflop/s",
    ]
    assert [words for words in expected if words not in text] == []
    assert "by medians, 3x by minima" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 us"), (2e-7, "0.2 us"), (100.0, "100 s")],
)
def test_times_have_units(value, text):
    assert table.seconds(value) == text


# MiniLM's numbers need its package; the last layer and factors write less than the dense Jacobian on purpose.
DENSE = [w for w in WORKS if w.name not in ("minilm", "ntk", "mlp-factors", "last-layer")]


@pytest.mark.parametrize("work", DENSE, ids=lambda w: w.name)
def test_the_bytes_of_the_limit_are_the_jacobians(work):
    assert work.least[1] == make_task(work.case).dense_bytes()


def test_the_limit_of_the_tangent_kernel_writes_the_kernel():
    layout = make_task(find("ntk").case).layout()
    assert find("ntk").least[1] == 4 * math.prod(layout["ntk"])


def test_rows_have_names_of_their_own_and_are_chosen_by_them():
    names = [work.name for work in WORKS]
    assert len(set(names)) == len(names)
    assert [w.name for w in command.selected("tiny, ntk")] == ["tiny", "ntk"]
    assert [w.name for w in command.selected("cnn-")] == ["cnn-32", "cnn-28", "cnn-inputs"]
    assert command.selected("") == list(WORKS)
    assert command.selected("no such row") == []


def test_a_bare_row_gets_nothing_that_tunes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    bare, tuned = command.environment(2, bare=True), command.environment(2, bare=False)
    assert not {"OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX"} & bare.keys()
    assert "PATH" in bare
    assert tuned["THP_MEM_ALLOC_ENABLE"] == "1"
    assert tuned["OMP_NUM_THREADS"] == "2"
    assert "MALLOC_ARENA_MAX" not in tuned


def test_rows_are_measured_in_processes_merged_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_child", lambda work, _: row(work=work.name, title=work.shown))
    before = tmp_path / "before.json"
    before.write_text(json.dumps([row(work="ntk", title="from before"), row(work="tiny", title="out of date")]))
    out, data = tmp_path / "page.md", tmp_path / "rows.json"
    arguments = ["--only", "tiny", "--merge", str(before), "--out", str(out), "--json", str(data)]
    assert command.main(arguments) == 0
    text = out.read_text()
    assert "from before" in text
    assert find("tiny").shown in text
    assert "out of date" not in text
    assert {entry["work"] for entry in json.loads(data.read_text())} == {"ntk", "tiny"}


def test_a_run_in_pieces_is_put_together_without_measuring(tmp_path):
    pieces = []
    for name in ("tiny", "ntk"):
        pieces += ["--merge", str(tmp_path / f"{name}.json")]
        (tmp_path / f"{name}.json").write_text(json.dumps([row(work=name, title=f"piece {name}")]))
    assert command.main([*pieces, "--page-only", "--out", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert text.index("| piece tiny") < text.index("| piece ntk")


def test_a_row_that_fails_is_told_and_exits_1(tmp_path, monkeypatch, capsys):
    def broken(work, options):
        raise RuntimeError("tiny failed: its last words")

    monkeypatch.setattr(command, "run_child", broken)
    assert command.main(["--only", "tiny"]) == 1
    assert "its last words" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_measures_a_row_in_a_process_of_its_own(tmp_path):
    data = tmp_path / "rows.json"
    arguments = ["--only", "tiny,mlp-bare", "--quick", "--peers", "vmap(jacrev)", "--json", str(data)]
    assert command.main([*arguments, "--out", str(tmp_path / "page.md"), "--threads", "1"]) == 0
    tiny, bare = sorted(json.loads(data.read_text()), key=lambda entry: entry["work"] != "tiny")
    assert tiny["sides"]["vmap(jacrev)"]["median"] > 0
    assert tiny["regret"]["ratio"] >= 1
    assert tiny["machine"]["settings"]["THP_MEM_ALLOC_ENABLE"] == "1"
    assert bare["machine"]["settings"] == {}
    assert "J wrt inputs, MLP 3-64-5" in (tmp_path / "page.md").read_text()
