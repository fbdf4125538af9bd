"""Models and prepared derivatives kept between requests, least recently used out first, within a memory bound."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jacray_workers import models
from jacray_workers.again import Batch, again, apart, joined, parts, resized
from jacray_workers.engine import Prepared, assemble, prepare, run_shard
from jacray_workers.errors import BudgetError, ModelError, Plain
from jacray_workers.planning.explain import size
from jacray_workers.request import Request, budget_bytes, make_request
from jacray_workers.validation import explain
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray import receipt
from jacray.gather import Gather
from jacray.http import alike
from jacray.http.messages import RECEIPT, Message, pack_result
from jacray.http.wire import dump
from jacray.http.work import Asked
from jacray.receipt import Ledger

KINDS = 64
# What an answer holds besides its numbers, at most: header, structure and receipt.
RECEIPT_BYTES = 1 << 17
# Work is planned again for a batch more than this many times as large.
GROWTH = 8


@dataclass(frozen=True)
class Settings:
    """What is kept and allowed.

    Attributes:
        warm_bytes: how many bytes of models are kept.
        memory_bytes: the memory budget of one piece of work.
        base: the folder that relative paths of specs start from.
        import_prefixes: packages that models may be imported from.
    """

    warm_bytes: int
    memory_bytes: int
    base: Path
    import_prefixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answers:
    """The answers to some pieces.

    Attributes:
        data: their bytes, one after another, equally many each.
        count: how many answers.
    """

    data: memoryview
    count: int


@dataclass
class _Held:
    """A model, and the work that was prepared with it."""

    module: nn.Module
    nbytes: int
    kinds: OrderedDict[Any, Prepared] = field(default_factory=OrderedDict)


class Warm:
    """Computes with what is warm, and warms what is not."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.held: OrderedDict[str, _Held] = OrderedDict()
        self.hits = self.misses = 0

    def facts(self) -> dict[str, int]:
        """What there is to count since it was last asked."""
        found = {"hits": self.hits, "misses": self.misses, "models": len(self.held)}
        self.hits = self.misses = 0
        return found

    def alone(self, asked: Asked, result_bytes: int) -> Message:
        """Compute one piece of work.

        Raises:
            Exception: what it breaks, or what its model raises.
        """
        held = self._model(asked)
        prepared = self._prepared(held, asked)
        wanted = prepared.plan.bytes_out
        if wanted > result_bytes:
            rule = f"must give at most {size(result_bytes)} in one answer"
            raise BudgetError("returns", rule, Plain(size(wanted)), "submit it as a job, or ask for less")
        done = _run(prepared)
        return _message(prepared, done.blocks, _receipt(prepared, done))

    def together(self, asked: Sequence[Asked]) -> list[Message] | None:
        """Compute several pieces of one kind as one batch; None where their answers could not be taken apart.

        Raises:
            Exception: some piece breaks a rule, or its numbers are refused; nobody knows which.
        """
        held = self._model(asked[0])
        first = self._prepared(held, asked[0])
        if not apart(first):
            return None
        batches = [Batch(one.inputs, one.request) for one in asked]
        sizes = [pytree.tree_leaves(one.inputs)[0].shape[0] for one in asked]
        prepared = self._batch(held, first, asked[0], batches, sum(sizes))
        if prepared is None or not apart(prepared):
            return None
        done = _run(prepared)
        found, start = [], 0
        # A plan and a receipt that speak of an answer's own samples; they are the same for as many samples.
        plans = {count: resized(prepared.plan, count) for count in set(sizes)}
        receipts = {count: _receipt(replace(prepared, plan=plan), done, len(asked)) for count, plan in plans.items()}
        for one, count in zip(asked, sizes, strict=True):
            blocks = parts(prepared.plan, done.blocks, start, start + count)
            own = replace(prepared, request=one.request, plan=plans[count])
            found.append(_message(own, blocks, receipts[count]))
            start += count
        return found

    def alike(self, first: Asked, known: Mapping[str, Tensor], count: int, most: int) -> Answers | None:
        """Compute pieces that differ in their numbers alone; None where each must be read by itself.

        Args:
            first: the first piece.
            known: the tensors of all pieces, `(count, *shape)`.
            count: how many pieces.
            most: bytes of one answer.

        Raises:
            Exception: as from `together`.
        """
        held = self._model(first)
        alone = self._prepared(held, first)
        fits = apart(alone) and alone.plan.bytes_out + RECEIPT_BYTES <= most
        batch = alike.joined(alone, first.about, known, first.request) if fits else None
        if batch is None:
            return None
        samples = alone.leaves[0].shape[0]
        prepared = self._batch(held, alone, first, [batch], samples * count)
        if prepared is None or not apart(prepared):
            return None
        done = _run(prepared)
        own = replace(prepared, request=first.request, plan=resized(prepared.plan, samples))
        blocks = parts(prepared.plan, done.blocks, 0, samples)
        message = _message(own, blocks, _receipt(own, done, count))
        data = alike.answered(message, prepared.plan, done.blocks, count)
        return None if data is None else Answers(data, count)

    def _batch(
        self, held: _Held, first: Prepared, one: Asked, batches: Sequence[Batch], samples: int
    ) -> Prepared | None:
        """The work for all batches. Prepared with at least two samples, so that a model that mixes them is noticed."""
        key = (one.request_key, _shapes(one.inputs), _shapes(one.request.weights), samples_class(samples))
        known = held.kinds.get(("together", key))
        if known is None:
            whole = joined(first, batches)
            known = prepare(held.module, whole.inputs, bounded(whole.request, self.settings.memory_bytes))
            self._keep(held, ("together", key), known)
        return again(known, batches)

    def _model(self, asked: Asked) -> _Held:
        if asked.model_key in self.held:
            self.held.move_to_end(asked.model_key)
            return self.held[asked.model_key]
        module = self._build(asked.model)
        held = _Held(module, _nbytes(module))
        self.held[asked.model_key] = held
        while len(self.held) > 1 and sum(h.nbytes for h in self.held.values()) > self.settings.warm_bytes:
            self.held.popitem(last=False)
        return held

    def _build(self, spec: Mapping[str, Any]) -> nn.Module:
        return build_model(spec, self.settings.base, self.settings.import_prefixes)

    def _prepared(self, held: _Held, asked: Asked) -> Prepared:
        samples = pytree.tree_leaves(asked.inputs)[0].shape[:1]
        count = samples[0] if samples else 0
        key = (asked.request_key, _shapes(asked.inputs), _shapes(asked.request.weights), samples_class(count))
        known = held.kinds.get(key)
        if known is not None:
            found = again(known, [Batch(asked.inputs, asked.request)])
            if found is not None:
                self.hits += 1
                held.kinds.move_to_end(key)
                return found
        self.misses += 1
        prepared = prepare(held.module, asked.inputs, bounded(asked.request, self.settings.memory_bytes))
        self._keep(held, key, prepared)
        return prepared

    def _keep(self, held: _Held, key: Any, prepared: Prepared) -> None:
        # Without the directions and inputs of whoever came first, beyond the one sample that shapes are told from.
        small = tuple(leaf[:1].clone() for leaf in prepared.leaves)
        held.kinds[key] = replace(prepared, leaves=small)
        while len(held.kinds) > KINDS:
            held.kinds.popitem(last=False)


def bounded(request: Request, most: int) -> Request:
    """The request within the memory that one piece of work may take."""
    asked = request.memory_budget
    wanted = most if asked is None else min(budget_bytes(asked, most), most)
    return make_request(request, memory_budget=wanted)


def samples_class(samples: int) -> int:
    """Batches of one class share their plan: one sample, up to 8, up to 64, ..."""
    found = 0
    while samples > 1:
        samples, found = -(-samples // GROWTH), found + 1
    return found


def build_model(spec: Mapping[str, Any], base: Path, prefixes: tuple[str, ...]) -> nn.Module:
    """The module of a spec that a user sent.

    Raises:
        ModelError: the spec breaks a rule, or the model cannot be built.
    """
    try:
        checked = TypeAdapter(_model_spec()).validate_python(dict(spec))
    except ValidationError as error:
        raise ModelError(*explain(error, _model_spec(), "model")) from None
    return models.build(checked, base, prefixes)


def _model_spec() -> Any:
    from jacray_workers.models.specs import ModelSpec

    return ModelSpec


@dataclass(frozen=True)
class _Done:
    blocks: dict[str, Any]
    ledger: Ledger


def _run(prepared: Prepared) -> _Done:
    ledger = Ledger({"name": "service"})
    began = time.perf_counter()
    gather = Gather(prepared.plan)
    for shard in prepared.plan.shards():
        result = run_shard(prepared, shard, into=gather.into(shard))
        gather.add(result)
        ledger.done(result, "service")
    ledger.seconds.update(compute=time.perf_counter() - began)
    return _Done(gather.finish(), ledger)


def _message(prepared: Prepared, blocks: dict[str, Any], told: torch.Tensor) -> Message:
    message = pack_result(assemble(prepared, blocks).items(), prepared.plan)
    message.tensors[RECEIPT] = told
    return message


def _receipt(prepared: Prepared, done: _Done, batched: int = 1) -> torch.Tensor:
    """The receipt as the bytes of its JSON text."""
    told = receipt.build(prepared.plan, prepared.request, done.ledger)
    text = dump({**told, "batched_with": batched - 1}).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _nbytes(module: nn.Module) -> int:
    tensors = {id(t): t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())


def _shapes(value: Any) -> Any:
    """What tells inputs or directions of one kind from others: structure, types and shapes but for the first axis."""
    leaves, spec = pytree.tree_flatten(value)
    return spec, tuple((leaf.shape[1:], leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
