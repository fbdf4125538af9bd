"""Bad files and bad specs by the hundred, from seeds: good ones with a few things changed."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jacray.cli import main
from jacray.emit import dump

from tests.workers import source_files

TOKENIZER = (
    '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},'
    ' "pre_tokenizer": {"type": "Whitespace"}}'
)
STEPS: list[dict[str, Any]] = [
    {"kind": "cast", "dtype": "float32"},
    {"kind": "scale", "factor": 2, "offset": 1},
    {"kind": "normalise", "mean": [0, 0], "std": 1, "axis": 1},
    {"kind": "reshape", "shape": [2]},
    {"kind": "select", "axis": 1, "indices": [0, 1]},
    {"kind": "clip", "min": 0, "max": 1},
    {"kind": "permute", "axes": [0]},
]
REQUEST: dict[str, Any] = {
    "returns": ["jacobian", "weighted_gradient"], "method": "auto", "chunk_size": 2, "memory_budget": "1GiB",
    "form": "auto", "dtype": "float32", "verify": 2, "seed": 0, "device": "cpu", "training": False,
    "nan_policy": "propagate", "tf32": False, "loss": "mse", "ntk": "full", "reduction": "sum",
}  # fmt: skip
CLUSTER = {"address": "inline", "workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3.5, 10**30, -(10**30), 2**31, 2**48, 2**53, 2**63, 2**64, 10**390),
    *(math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, [math.nan, 1], [1e308] * 3),
    *(
        "",
        "x",
        "a.b",
        "\n",
        "a\0b",
        "a\nb",
        "((((",
        "a" * 3000,
        "2" * 50,
        "1e400",
        "[0]",
        "\u202e",
        "\u0661",
        "é" * 200,
    ),
    *("/dev/zero", "/dev/stdin", "../..", "~", ".", "/etc/passwd", "file:///etc/passwd"),
    *("s3://a/b", "x::y://z", "reference://x", "nope://x"),
    *("params", "*", "inputs.zz", "inputs.", "9999%", "0%", "-5GiB", "1e9", "cuda:9", "meta"),
    *([], [[]], [1], ["x"], [None], [{}], [[1], [2, 3]], {}, {"": ""}, {"a": 1}, {"kind": "x"}, {"kind": 3}),
    *({"kind": []}, {"kind": None}, {"kind": "npy", "path": "x.npy"}, {"kind": "one_hot", "of": "target"}),
    *({"module": "head"}, {"module": 3}, {"module": "head", "side": "x"}),
]
NEW_KEYS = (
    *("foo", "kind", "seed", "path", "name", "of", "range", "preprocess", "columns", "fields", "weights", "dtype"),
    *("axis", "__class__", "model", "a\nb", ""),
)
VALUES = (
    *("1", "-1", ".nan", "[1,2", "{a: b", "!!x 1", "", "x", "null", "[]", "{}", "*a", "&a [*a]", "1e999", "9" * 500),
    *("true", "\0", "a: b: c", "[" * 70, "? [1]", "<<: {a: 1}"),
)
MARKS = "{}[]:,&*!|>'\"#%@`- \n\t0e.\\?~\0\x07\u2028é"
SNIPPETS = (
    *("*a", "&a ", "!!python/object:os.system ", "<<: ", "? ", "---\n", "...\n", "%YAML 1.1\n", "\t", "[[[[", "{{{{"),
    *("'", '"', "0x", "1_0", ": : ", "!!binary ", "\ufeff"),
)


def write_files(base: Path) -> list[dict[str, Any]]:
    """A file of each kind in a folder, and the specs of all that can be had there."""
    files = [write(base) for write in source_files.FILES]
    (base / "tok.json").write_text(TOKENIZER)
    tokens = [
        {"kind": "tokenize", "path": "tok.json", "length": 3, "mask": False},
        {"kind": "cast", "dtype": "float32"},
    ]
    return [
        *files,
        {"kind": "random", "shape": [4, 2], "seed": 0},
        {"kind": "inline", "values": [[1, 2], [3, 4]], "fields": {"target": [0, 1]}},
        {"kind": "digits", "range": [0, 4]},
        {"kind": "sklearn", "name": "iris", "range": [0, 3]},
        {"kind": "inline", "values": ["a", "b a"], "preprocess": tokens},
        {"a": {"kind": "random", "shape": [5, 2]}, "b": {"kind": "npy", "path": "x.npy"}},
    ]


def good_spec(rng: random.Random, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """A run that works, with one of these inputs."""
    chosen = copy.deepcopy(rng.choice(inputs))
    kind = chosen.get("kind", "named")
    names = ["a", "b"] if kind == "named" else ["a"]
    tokens = kind == "inline" and isinstance(chosen["values"][0], str)
    width = {"images": 36, "digits": 64, "sklearn": 4}.get(kind, 2)
    if kind in ("npy", "random", "inline", "csv", "parquet") and "preprocess" not in chosen and rng.random() < 0.6:
        chosen["preprocess"] = [copy.deepcopy(rng.choice(STEPS)) for _ in range(2)]
    request = {key: copy.deepcopy(value) for key, value in REQUEST.items() if rng.random() < 0.4}
    if "returns" in request:
        request["weights"] = [1.0, 0.5]
    if kind == "named":
        request |= {"returns": ["jacobian"], "wrt": ["inputs"], "weights": None}
    layered = names == ["a"] and not tokens and (width != 2 or rng.random() < 0.6)
    model = _layers(width) if layered else _formula(names)
    output = {"path": "run", "report": False, "overwrite": True}
    return {"model": model, "inputs": chosen, "request": request, "cluster": dict(CLUSTER), "output": output}


def _layers(width: int) -> dict[str, Any]:
    layers: list[dict[str, Any]] = [
        {"kind": "Flatten"},
        {"kind": "Linear", "in_features": width, "out_features": 2, "name": "head"},
        {"kind": "residual", "layers": [{"kind": "Tanh"}], "shortcut": []},
        {"kind": "parallel", "branches": [[{"kind": "Tanh"}]], "combine": "cat", "dim": 1},
    ]
    return {"kind": "layers", "layers": layers, "seed": 0}


def _formula(names: list[str]) -> dict[str, Any]:
    first, last = names[0], names[-1]
    expression = [f"{first}[0]*w[0]", f"sin({last}[1])*w[1]"]
    return {"kind": "function", "expression": expression, "constants": {"w": [2, 3]}, "inputs": names}


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below this one."""
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def bad_spec(seed: int, inputs: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """A YAML text and overrides, one in a hundred still good."""
    rng = random.Random(seed)
    data = good_spec(rng, inputs)
    if seed % 4 == 3:
        return _garbled(dump(data), rng), []
    overrides: list[str] = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        block = rng.choice(["model", "inputs", "inputs", "request", "request", "cluster", "output"])
        *above, key = rng.choice([p for p in places(data) if p[0] == block] or [("model",)])
        inside = data
        for step in above:
            inside = inside[step]
        _spoil(inside, key, above, rng, overrides)
    return dump(data), overrides


def _spoil(inside: Any, key: Any, above: list[Any], rng: random.Random, overrides: list[str]) -> None:
    action = rng.choice(["replace"] * 5 + ["remove", "add", "override", "deepen"])
    odd = copy.deepcopy(rng.choice(ODD))
    if action == "remove":
        del inside[key]
    elif action == "add" and isinstance(inside, dict):
        inside[rng.choice(NEW_KEYS)] = odd
    elif action == "override":
        overrides.append(f"{'.'.join(map(str, [*above, key]))}={rng.choice(VALUES)}")
    elif action == "deepen":
        for _ in range(rng.choice([5, 40, 70])):
            odd = [odd] if rng.random() < 0.5 else {"a": odd}
        inside[key] = odd
    else:
        inside[key] = odd


def _garbled(text: str, rng: random.Random) -> str:
    letters = list(text)
    for _ in range(rng.choice([1, 2, 4])):
        place, how = rng.randrange(len(letters)), rng.random()
        if how < 0.4:
            letters[place] = rng.choice(MARKS)
        elif how < 0.7:
            del letters[place : place + rng.randrange(1, 6)]
        else:
            letters[place:place] = list(rng.choice(SNIPPETS))
    return "".join(letters)


def bad_bytes(data: bytes, rng: random.Random) -> bytes:
    """A file with some bytes flipped, cut off, copied over others or put in between, mostly near its beginning."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not found:
            break
        place = rng.randrange(len(found))
        if rng.random() < 0.6:
            place = min(place, rng.randrange(1, 400)) % len(found)
        match rng.choice(["flip", "flip", "set", "cut", "insert", "copy", "high", "zero"]):
            case "flip":
                found[place] ^= 1 << rng.randrange(8)
            case "set":
                found[place] = rng.randrange(256)
            case "cut":
                del found[place:]
            case "insert":
                found[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
            case "copy":
                start, length = rng.randrange(len(found)), rng.randrange(1, 40)
                found[place : place + length] = found[start : start + length]
            case "high":
                found[place : place + 8] = b"\xff" * 8
            case _:
                found[place : place + 4] = bytes(4)
    return bytes(found)


def command(*arguments: str) -> tuple[int, str, str]:
    """What a command line in this process returns, prints, and says on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def check_refusal(code: int, out: str, err: str) -> None:
    """A user's mistake: exit 1, nothing printed, one line of moderate length that is no traceback."""
    lines = err.splitlines()
    assert (code, out, len(lines)) == (1, "", 1), (code, out, err)
    assert lines[0].startswith("jacray: ")
    assert len(lines[0]) < 1200
    assert "Traceback" not in err
