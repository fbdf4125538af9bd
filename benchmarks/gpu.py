"""`python -m benchmarks.gpu`: what holds on a GPU, in one command: right numbers, memory within bounds, the table.

It needs torch, numpy, psutil, pydantic and `jacray_workers` on the path: no Ray, no service, no peer's package (those
that are missing are named as such). Without a GPU, or with `--device cpu`, the same steps run at tiny sizes.

    PYTHONPATH=workers python -m benchmarks.gpu --out results-gpu.md --json results-gpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import checks, machine, memory, nets, nets_large, page, works
from benchmarks.measure import measure, unfused_attention
from benchmarks.nets import Case
from benchmarks.sides import everybody
from benchmarks.sides.ours import ENGINE, ON_DEVICE, by_the_engine, on_the_device
from benchmarks.sides.torch_func import SIDES as TORCH_SIDES
from benchmarks.sides.torch_func import vmap_jacrev
from benchmarks.task import CannotError, Ready, Side, Task, make_task
from benchmarks.timing import interleaved
from benchmarks.works import Target, Work

METHODS = ("reverse", "forward", "backward_loop", "layerwise", "chain", "auto")
SHARE = 0.6  # of the measured copy rate, promised for dense writes
Report = dict[str, Any]


def small_cases() -> tuple[Case, ...]:
    """A net of every kind, so small that plain autograd in float64 is quick."""
    return (
        Case("mlp", "MLP wrt parameters", lambda: (nets.mlp(12, 16, 8, 3), torch.randn(5, 12)), {"wrt": "params"}),
        Case("cnn", "CNN wrt parameters", lambda: (nets.cnn((2, 4, 6), 12, 2, 3), torch.randn(4, 2, 12, 12)),
             {"wrt": "params", "form": "dense"}),
        Case("resnet", "ResNet wrt parameters",
             lambda: (nets_large.ResNet18(3, 4).apply(settled), torch.randn(2, 3, 16, 16)), {"wrt": "params"}),
        Case("block", "transformer block wrt parameters", lambda: (nets.Block(16, 3), torch.randn(3, 6, 16)),
             {"wrt": "params", "form": "dense"}),
        Case("inputs", "autoencoder wrt inputs", lambda: (nets.mlp(20, 12, 3, 12, 20), torch.randn(4, 20))),
        Case("images", "CNN wrt inputs", lambda: (nets.cnn((1, 4, 6), 12, 2, 3), torch.randn(4, 1, 12, 12))),
        Case("logits", "GPT-2 wrt embeddings",
             lambda: (nets_large.GPT2(40, 16, 2, 2, 6), torch.randint(0, 40, (2, 6))), {"wrt": nets.EMBEDDINGS}),
        Case("ntk", "NTK of an MLP", lambda: (nets.mlp(12, 16, 8, 3), torch.randn(5, 12)), {"wrt": "params"}, "ntk"),
    )  # fmt: skip


def settled(module: torch.nn.Module) -> None:
    """Batch norm with statistics that are not zero and one."""
    if isinstance(module, torch.nn.BatchNorm2d):
        torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
        torch.nn.init.uniform_(module.running_var, 0.5, 1.5)


def correctness(device: str, only: str = "") -> list[Report]:
    """Every method on every small net against float64 on the CPU, result in main memory and result on the device."""
    found = []
    ways = (("main memory", by_the_engine), ("the device", on_the_device))[: 2 if device != "cpu" else 1]
    for case in small_cases():
        for method in METHODS if only in case.key else ():
            for where, side in ways:
                found.append(
                    {"case": case.name, "method": method, "result in": where, **_one(case, method, side, device)}
                )
    return found


def _one(case: Case, method: str, side: Callable[..., Ready], device: str) -> Report:
    from jacray_workers.errors import UserError

    task = make_task(case, device=device)
    try:
        ready = side(task.own_copy(), method)
        return {"error": checks.against_float64(ready.read(ready.call()), task)}
    except UserError as refusal:
        return {"refused": str(refusal).splitlines()[0][:120]}
    except checks.WrongError as wrong:
        return {"wrong": str(wrong)}


def budgets(device: str) -> list[Report]:
    """Small memory budgets: the plan keeps within them by the allocator's count, and the numbers do not move."""
    from jacray_workers.engine import prepare, run_shard
    from jacray_workers.planning.memory import measure as peak
    from jacray_workers.request import make_request

    cuda = device != "cpu"
    width, samples = (1024, 256) if cuda else (64, 64)
    torch.manual_seed(0)
    model, x = nets.mlp(width, width, width, 10).eval().to(device), torch.randn(samples, width, device=device)
    found = []
    for returns, method in (("weighted_gradient", "reverse"), ("norms", "reverse"), ("norms", "layerwise"),
                            ("gram", "forward")):  # fmt: skip
        wrt = "inputs" if returns == "gram" else "params"
        fields: dict[str, Any] = {"wrt": wrt, "method": method, "returns": [returns], "reduction": "none"}
        if returns == "weighted_gradient":
            fields["weights"] = torch.ones(10)
        whole = prepare(model, x, make_request(**fields, memory_budget="4GiB"))
        reference = run_shard(whole, whole.plan.shard(0)).blocks
        held = whole.plan.bytes_out
        for share in (0.5, 0.2):
            budget = held + int(share * max(whole.plan.peak_bytes - held, 1 << 20))
            entry: Report = {"returns": returns, "method": method, "budget": budget}
            found.append(entry)
            try:
                tight = prepare(model, x, make_request(**fields, memory_budget=budget))
            except Exception as error:  # noqa: BLE001 - a refusal is a result
                entry["refused"] = str(error).splitlines()[0][:120]
                continue
            blocks: dict[str, Any] = {}
            entry["peak"] = peak(
                lambda tight=tight, blocks=blocks: blocks.update(run_shard(tight, tight.plan.shard(0)).blocks),
                torch.device(device),
            )
            entry |= {"chunk": tight.plan.chunk_size, "of": samples, "within": entry["peak"] <= budget}
            entry["difference"] = max(_far(blocks[key], reference[key]) for key in reference)
    return [*found, back_off(device)]


def back_off(device: str) -> Report:
    """A chunk that cannot fit is halved until it does: the GPU's allocator is held to a fraction of the card."""
    from jacray_workers.engine import prepare, run_shard
    from jacray_workers.request import make_request

    if device == "cpu":
        return {
            "returns": "jacobian",
            "method": "layerwise",
            "refused": "needs an allocator that can be held to a bound",
        }
    torch.manual_seed(0)
    model, x = nets.mlp(1024, 1024, 1024, 10).eval().to(device), torch.randn(256, 1024, device=device)
    request = make_request(wrt="params", method="layerwise", form="dense", chunk_size=128)
    prepared = prepare(model, x, request)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(device)[1]
    # Forty samples' blocks: a chunk of 128 must fail, one of 16 must not, two of them beside each other.
    room = torch.cuda.memory_allocated(device) + 40 * 10 * 4 * 2_100_000
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    try:
        result = run_shard(prepared, prepared.plan.shard(0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    whole = run_shard(prepared, prepared.plan.shard(0))
    return {
        "returns": "jacobian", "method": "layerwise", "budget": room, "peak": room,
        "chunk": result.chunk_size, "of": 256,
        "within": result.facts.get("backoffs", 0) > 0, "backoffs": result.facts.get("backoffs", 0),
        "resumed": result.facts.get("resumed", 0),
        "difference": max(_far(result.blocks[k], whole.blocks[k]) for k in whole.blocks),
    }  # fmt: skip


def _far(a: Any, b: Any) -> float:
    a, b = (t.dense() if hasattr(t, "dense") else t for t in (a, b))
    return float((a.cpu() - b.cpu()).abs().max() / b.abs().max().cpu().clamp(min=1e-30))


def brought_home(side: Side) -> Side:
    """A peer whose result is then copied to main memory, where ours lies."""

    def make(task: Task) -> Ready:
        ready = side.make(task)
        home = torch.utils._pytree.tree_map_only
        return Ready(lambda: home(torch.Tensor, lambda t: t.cpu(), ready.call()), ready.read)

    return Side(f"{side.name} and .cpu()", make)


def resnet_whole(samples: int) -> Side:
    """`vmap(jacrev)` over slices of the batch that fit the card, each dropped when it is done."""

    def make(task: Task) -> Ready:
        parts = [vmap_jacrev(Task(task.case, task.model, x)) for x in task.x.split(samples)]

        def call() -> Any:
            last = None
            for part in parts:
                last = None
                last = part.call()
            return last

        return Ready(call, parts[-1].read)

    return Side(f"vmap(jacrev), {samples} samples at a time", make)


def table(device: str, budget: float, only: str) -> list[Report]:
    """The CPU's table on this device: our result left on the device as peers leave theirs, and both brought home."""
    rows = []
    peers = (*everybody(), *(brought_home(side) for side in TORCH_SIDES[:2]))
    for work in works.WORKS if device != "cpu" else tiny_works():
        if work.bare or (only and only not in work.name):
            continue
        try:
            row = measure(work, ON_DEVICE, peers, budget=budget, rates=0.5, device=device, rounds=(3, 200))
            home = measure(work, ENGINE, (), budget=budget / 4, rates=0, device=device, rounds=(3, 50))
        except (ImportError, checks.WrongError, torch.OutOfMemoryError) as error:
            rows.append({"work": work.name, "title": work.shown, "failed": f"{type(error).__name__}: {error}"})
            continue
        row["sides"]["jacray, result in main memory"] = home["sides"]["jacray"]
        rows.append(row)
        memory.trim()
    return rows


def large_works(device: str) -> list[tuple[Work, Sequence[Side]]]:
    """What only a GPU can be asked for; elsewhere the same nets at a thousandth of the size."""
    nothing, none = Target(), (0.0, 0.0)
    reverse = TORCH_SIDES[0]
    if device == "cpu":
        return [
            (Work(nets_large.resnet_kernel(2, 3, 4, 8), nothing, none), (reverse,)),
            (Work(nets_large.gpt2_logits(1, 4, 50, 16, 1), nothing, none), (reverse,)),
        ]
    return [
        (Work(nets_large.resnet_kernel(16, 128), nothing, none), (reverse,)),
        (Work(nets_large.resnet_kernel(4, 1000), nothing, none), (reverse,)),
        (Work(nets_large.gpt2_logits(), nothing, none), (reverse,)),
    ]


def tiny_works() -> tuple[Work, ...]:
    """The CPU path's table."""
    return tuple(Work(case, Target(), (1e3, 1e3)) for case in small_cases()[:1] + small_cases()[4:5])


def large(device: str, budget: float, only: str = "") -> list[Report]:
    """The kernels and logits of the large nets, each against torch.func where that fits."""
    rows = []
    for work, peers in large_works(device):
        if only not in work.name:
            continue
        try:
            rows.append(measure(work, ENGINE, peers, budget=budget, rates=0.2, device=device, rounds=(2, 50)))
        except (checks.WrongError, torch.OutOfMemoryError) as error:
            rows.append({"work": work.name, "title": work.shown, "failed": f"{type(error).__name__}: {error}"})
        memory.trim()
    return rows


def dense_writes(device: str, budget: float) -> list[Report]:
    """J wrt all parameters of a ResNet18, slice by slice: bytes per second against the measured copies.

    On the device against a copy within its memory; into main memory against the bus into page-locked memory. Slices
    are of 16 samples (7 GB each), so that the whole, 57 GB, never stands at once.
    """
    cuda = device != "cpu"
    samples, slice_, width, size = (128, 16, 64, 32) if cuda else (4, 2, 4, 8)
    case = nets_large.resnet_parameters(samples, 10, width, size)
    task = make_task(case, device=device)
    total = task.dense_bytes()
    settle = machine.waiter(device)

    def by_slices(make: Callable[..., Ready]) -> Callable[[], Any]:
        parts = [make(Task(case, task.model, x), memory_budget="90%") for x in task.x.split(slice_)]

        def call() -> None:
            for part in parts:
                part.call()

        return call

    peer = resnet_whole(slice_).make(task.own_copy())
    ways = {"jacray, on the device": by_slices(on_the_device), "vmap(jacrev), on the device": peer.call}
    ways["jacray, into main memory"] = by_slices(by_the_engine)
    firsts = {}
    for name, call in ways.items():
        began = time.perf_counter()
        call()
        settle()
        firsts[name] = time.perf_counter() - began
    times = interleaved(ways, budget, firsts, settle, (2, 20))
    inside = machine.copy_rate(0.5, device)
    home = machine.home_rate(0.5, device) if cuda else machine.copy_rate(0.5)
    found = []
    for name, measured in times.items():
        bound = home if "main memory" in name else inside
        rate = total / measured.median
        found.append({
            "side": name, "work": case.name, "bytes": total, "median": measured.median, "first": measured.first,
            "bytes_per_second": rate, "copy_rate": bound, "share": rate / bound,
            "met": rate / bound >= SHARE if name.startswith("jacray") else None,
        })  # fmt: skip
    return found


def describe(device: str) -> Report:
    """The card and the software."""
    about: Report = {"device": device, "torch": torch.__version__, **machine.describe()}
    if device != "cpu":
        about |= {"card": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return about


def markdown(found: Report) -> str:
    """The page."""
    about = found["about"]
    where = about.get("card", "the CPU (tiny sizes: a rehearsal)")
    software = f"torch {about['torch']}, CUDA {about.get('cuda')}, Python {about['python']}, {about['date']}."
    lines = [f"# Results on {where}", "", software, ""]
    for title in ("correctness", "budgets", "dense writes"):
        if title in found:
            lines += [f"## {title.capitalize()}", "", *_grid(found[title]), ""]
    for title in ("table", "large"):
        rows = [row for row in found.get(title, []) if "sides" in row]
        if rows:
            lines += [f"## {title.capitalize()}", "", *page.summary(rows), *page.details(rows)]
        lines += [f"{row['title']}: {row['failed']}" for row in found.get(title, []) if "failed" in row]
    return "\n".join(lines) + "\n"


def _grid(rows: list[Report]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (f"{v:.3g}" if isinstance(v := row.get(n, ""), float) else str(v).replace("|", "/") for n in names)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


SECTIONS = ("correctness", "budgets", "dense writes", "large", "table")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print and write what they found. 1 where a method is wrong or a budget is overrun."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--only", default="", help="cases and rows whose short name contains this")
    parser.add_argument("--seconds", type=float, help="of timing per row; 4 on a GPU")
    parser.add_argument("--json", type=Path, help="write everything as JSON here")
    parser.add_argument("--out", type=Path, help="write the page here")
    options = parser.parse_args(arguments)
    budget = options.seconds or (4.0 if options.device != "cpu" else 0.1)
    unfused_attention()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    work: dict[str, Callable[[], Any]] = {
        "correctness": lambda: correctness(options.device, options.only),
        "budgets": lambda: budgets(options.device),
        "dense writes": lambda: dense_writes(options.device, budget),
        "large": lambda: large(options.device, budget, options.only),
        "table": lambda: table(options.device, budget, options.only),
    }
    found: Report = {"about": describe(options.device)}
    for name in SECTIONS:
        if name not in options.sections:
            continue
        began = time.perf_counter()
        try:
            found[name] = work[name]()
        except Exception as error:  # noqa: BLE001 - the other sections are still worth having
            found.setdefault("broken", {})[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(found))
    text = markdown(found)
    print(text)
    if options.out:
        options.out.write_text(text)
    return 1 if _bad(found) else 0


def _bad(found: Report) -> list[str]:
    bad = [f"{name}: {text}" for name, text in found.get("broken", {}).items()]
    bad += [f"{r['case']} {r['method']}: {r['wrong']}" for r in found.get("correctness", []) if "wrong" in r]
    bad += [f"budget {r['budget']} overrun: {r['peak']}" for r in found.get("budgets", []) if r.get("within") is False]
    for text in bad:
        print(f"WRONG {text}", file=sys.stderr)
    return bad


__all__ = ["CannotError", "main"]
if __name__ == "__main__":
    sys.exit(main())
