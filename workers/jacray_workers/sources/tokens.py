"""Texts as token ids, by a tokenizer file of the `tokenizers` library."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import InputError, UserError
from jacray_workers.sources.places import Place, Reach, Stamp, changed, locate, unreadable
from jacray_workers.sources.steps import Tokenize

MAX_FILE = 1 << 26
MAX_TEXT = 1 << 20


@dataclass(frozen=True)
class Tokens:
    """Turns texts into token ids. Picklable: the file is read again in each process.

    Attributes:
        place: the tokenizer's file.
        stamp: what the file was when it was checked.
        step: the spec.
        where: what the step is called in errors.
    """

    place: Place
    stamp: Stamp
    step: Tokenize
    where: str

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 `(rows, length)` each."""
        longest = max(map(len, texts))
        if longest > MAX_TEXT:
            raise InputError(self.where, f"must be given texts of at most {MAX_TEXT:,} characters", longest)
        tokenizer, pad = _opened(self.place, self.stamp, self.step.length)
        try:
            found = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=self.step.special_tokens)]
        except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
            raise _refused(self.place, error) from None
        length = self.step.length
        if any(len(ids) > length for ids in found):
            raise InputError(f"{self.where}.length", "must hold the tokenizer's special tokens", length)
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in found], dtype=torch.int64)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in found], dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": mask} if self.step.mask else {"input_ids": ids}


def tokenizer_of(step: Tokenize, base: Path, where: str, reach: Reach) -> Tokens:
    """The tokenizer of a step, its file found and read.

    Raises:
        InputError: there is none, or the library refuses it.
    """
    place = locate(step.path, base, f"{where}.path", (".json",), reach=reach)
    if place.size() > MAX_FILE:
        raise InputError(place.argument, f"must be at most {MAX_FILE:,} bytes", place.size())
    tokens = Tokens(place, place.stamp(), step, where)
    _opened(place, tokens.stamp, step.length)
    return tokens


@functools.lru_cache(maxsize=8)
def _opened(place: Place, stamp: Stamp, length: int) -> tuple[Any, int]:
    """The tokenizer, cutting at a length, and the id that it pads with."""
    if place.stamp() != stamp:
        raise changed(place)
    try:
        import tokenizers
    except ImportError:
        raise InputError(place.argument, "needs the package tokenizers", None, "pip install 'jacray[data]'") from None
    try:
        with place.open() as stream:
            text = stream.read().decode()
        pad = _pad(json.loads(text))
        tokenizer = tokenizers.Tokenizer.from_str(text)
        # Padded by us: a file may ask for any length.
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
        raise _refused(place, error) from None
    return tokenizer, pad


def _pad(content: Any) -> int:
    """What a file pads with: as it says, or its token that is called so, or 0."""
    if not isinstance(content, dict):
        raise ValueError("it is no mapping")
    padding = content.get("padding")
    if isinstance(padding, dict) and type(padding.get("pad_id")) is int and 0 <= padding["pad_id"] < 2**31:
        return int(padding["pad_id"])
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if (
            isinstance(token, dict)
            and token.get("content") in ("[PAD]", "<pad>", "<|pad|>")
            and type(token.get("id")) is int
        ):
            return int(token["id"])
    return 0


def _refused(place: Place, error: BaseException) -> BaseException:
    if isinstance(error, KeyboardInterrupt | SystemExit | UserError):
        return error
    return unreadable(place, "tokenizer file", error if str(error) else ValueError(type(error).__name__))
