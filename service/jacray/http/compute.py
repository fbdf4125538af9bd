"""A compute process: small work in one round trip, with models and prepared derivatives kept warm.

    python -m jacray.http.compute SOCKET LIFELINE

It takes a frame with one or several pieces of work of the same kind, computes them as one batch where it can, and
answers each by itself. Its parent may end it at any time.
"""

from __future__ import annotations

import logging
import mmap
import os
import resource
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jacray_workers.errors import JacrayError
from torch import nn

from jacray.api import compute
from jacray.http import channel, wire
from jacray.http.alike import stacked
from jacray.http.messages import RECEIPT, Message, lists, raw
from jacray.http.problems import problem
from jacray.http.warm import Answers, Settings, Warm
from jacray.http.work import Asked, read_asked

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one answer may cost.

    Attributes:
        result_bytes: the most bytes of a result.
        file_bytes: larger answers go by a file.
        json_numbers: the most numbers of an answer in JSON.
        folder: where such files are put.
    """

    result_bytes: int
    file_bytes: int
    json_numbers: int
    folder: Path


class Worker:
    """Answers frames. One at a time, since its parent has as many processes as it wants at a time."""

    def __init__(self, warm: Warm, limits: Limits) -> None:
        self.warm, self.limits = warm, limits
        self._files = 0

    def answer(self, head: Mapping[str, Any], payload: bytearray) -> tuple[dict[str, Any], list[memoryview]]:
        """The answers to a frame's pieces, and their bytes."""
        began = time.perf_counter()
        items = head["items"]
        found = self._alike(items[0], payload) if len(items) == 1 and items[0].get("times", 1) > 1 else None
        if found is not None:
            size = len(found.data) // found.count
            answers, out = [{"status": 200, "size": size, "times": found.count}], [found.data]
        else:
            answers, out = self._each([one for one in items for _ in range(one.get("times", 1))], payload)
        facts = {"seconds": time.perf_counter() - began, **self.warm.facts(), "rss": _rss()}
        return {"answers": answers, "facts": facts}, out

    def _alike(self, item: Mapping[str, Any], payload: bytearray) -> Answers | None:
        """Pieces that differ in their numbers alone, as one; None where each must be looked at by itself."""
        if item.get("accept") == "json":
            return None
        try:
            body, count = memoryview(payload)[: item["size"]], item["times"]
            known = stacked(wire.read_header(body), payload, count)
            return self.warm.alike(read_asked(item, body), known, count, self.limits.file_bytes)
        except Exception as error:  # noqa: BLE001 - whose fault it is, is found out one by one
            logger.info("a batch of %d is read one by one: %s", item["times"], error)
            return None

    def _each(
        self, items: Sequence[Mapping[str, Any]], payload: bytearray
    ) -> tuple[list[dict[str, Any]], list[memoryview]]:
        """The answers to pieces of one kind, and their bytes."""
        asked: list[Asked | dict[str, Any]] = []
        at, model = 0, items[0]["model"]
        for told in items:
            item = {"model": model, **told}
            data = _body(item, payload, at)
            at += item.get("size", 0)
            asked.append(self._read(item, data))
        found = iter(self._compute([one for one in asked if isinstance(one, Asked)]))
        answers, out = [], list[memoryview]()
        for one in asked:
            answer, pieces = self._encode(one, next(found)) if isinstance(one, Asked) else (one, [])
            answers.append(answer)
            out.extend(pieces)
        return answers, out

    def _read(self, item: Mapping[str, Any], data: Any) -> Asked | dict[str, Any]:
        try:
            return read_asked(item, data)
        except Exception as error:  # noqa: BLE001 - whatever a body does ends as its own answer
            return _failed(error)

    def _compute(self, asked: Sequence[Asked]) -> list[Message | dict[str, Any]]:
        """Together where that works; else each alone, so that a bad sample fails alone."""
        if len(asked) > 1:
            try:
                together = self.warm.together(asked)
            except Exception as error:  # noqa: BLE001 - each is tried alone next
                logger.info("a batch of %d is computed one by one: %s", len(asked), error)
                together = None
            if together is not None:
                return list(together)
        return [self._alone(one) for one in asked]

    def _alone(self, one: Asked) -> Message | dict[str, Any]:
        try:
            return self.warm.alone(one, self.limits.result_bytes)
        except Exception as error:  # noqa: BLE001 - the model's own error is its sender's answer
            return _failed(error)

    def _encode(self, one: Asked, found: Message | dict[str, Any]) -> tuple[dict[str, Any], list[memoryview]]:
        if not isinstance(found, Message):
            return found, []
        try:
            if one.accept == "json":
                pieces = [memoryview(_json(found, self.limits.json_numbers))]
            else:
                header, parts = found.encode()
                pieces = [memoryview(header), *parts]
        except JacrayError as error:
            return _failed(error), []
        size = sum(len(piece) for piece in pieces)
        told: dict[str, Any] = {"status": 200, "size": size}
        if size <= self.limits.file_bytes:
            return told, pieces
        return {**told, "file": self._to_file(pieces)}, []

    def _to_file(self, pieces: Sequence[memoryview]) -> str:
        self._files += 1
        path = self.limits.folder / f"answer-{os.getpid()}-{self._files}"
        with path.open("xb", buffering=0) as stream:
            for piece in pieces:
                while piece:
                    piece = piece[stream.write(piece) :]  # noqa: PLW2901 - what is left of it
        return str(path)


def _json(found: Message, limit: int) -> bytes:
    receipt = bytes(raw(found.tensors.pop(RECEIPT)))
    results = lists(found, limit)
    return b'{"results":' + wire.dump(results).encode() + b',"receipt":' + receipt + b"}"


def _failed(error: BaseException) -> dict[str, Any]:
    found = problem(error)
    if not isinstance(error, JacrayError):
        logger.info("work failed", exc_info=error)
    elif found["status"] >= 500:
        logger.error("a fault", exc_info=error)
    return {"status": found["status"], "problem": found}


def _body(item: Mapping[str, Any], payload: bytearray, at: int) -> Any:
    """The bytes of one piece of work, in memory that may be written to."""
    if "file" in item:
        with Path(item["file"]).open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    return memoryview(payload)[at : at + item["size"]] if item.get("size") else None


def _rss() -> int:
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bound_memory(most: int) -> None:
    """Let allocations beyond the bound fail, which the engine answers with smaller chunks; 0 leaves it be."""
    if most and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _load_everything() -> None:
    """Compute something small: what is loaded when it is first needed should not be loaded while somebody waits."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    for wrt in ("inputs", "params"):
        compute(net, torch.zeros(2, 2), wrt=wrt)


def serve(sock: socket.socket, worker: Worker) -> None:
    """Answer until the other side leaves."""
    while (found := channel.receive(sock)) is not None:
        head, payload = found
        answers, out = worker.answer(head, payload)
        channel.send(sock, {"id": head["id"], **answers}, out)


def main(arguments: Sequence[str]) -> int:
    """Start: the first frame holds the settings, the first answer says that torch is loaded."""
    sock_fd, life_fd = map(int, arguments)
    channel.hold_on(life_fd)
    logging.basicConfig(level=os.environ.get("JACRAY_LOG", "WARNING"), format="%(levelname)s %(name)s %(message)s")
    os.nice(5)  # the process that listens must answer health checks while every worker is busy
    sock = socket.socket(fileno=sock_fd)
    found = channel.receive(sock)
    if found is None:
        return 0
    told = found[0]
    torch.set_num_threads(told["threads"])
    _bound_memory(told["process_bytes"])
    limits = Limits(told["result_bytes"], told["file_bytes"], told["json_numbers"], Path(told["folder"]))
    warm = Warm(Settings(told["warm_bytes"], told["memory_bytes"], Path(told["base"]), tuple(told["import_prefixes"])))
    _load_everything()
    channel.send(sock, {"ready": os.getpid()})
    serve(sock, Worker(warm, limits))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
