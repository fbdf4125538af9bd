"""Transformers from a local folder: config and safetensors, no download, no code from the folder."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from jacray_workers.errors import ModelError, Plain, shorten
from jacray_workers.models.architectures import load
from jacray_workers.models.specs import HuggingfaceModel
from jacray_workers.models.torchvision_operators import with_operators
from jacray_workers.models.weights import refuse_differences
from jacray_workers.planning.explain import size

MAX_CONFIG = 2**20
MAX_LAYERS = 2_000
_CLASSES = {
    "base": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}


def build_huggingface(spec: HuggingfaceModel, folder: Path) -> nn.Module:
    """The model of a folder, with eager attention, without a cache, its outputs a dict.

    Args:
        spec: the spec.
        folder: holds `config.json` and `*.safetensors`.

    Raises:
        ModelError: the folder holds no such model, names code of its own, does not fit into memory, or its weights are
            not exactly the model's.
    """
    _check_folder(folder)
    _check_config(folder / "config.json")
    with _offline():
        transformers = load("transformers", "huggingface")
        with _quiet(transformers):
            return _with_pooling(_loaded(transformers, spec, folder), spec)


def files(folder: Path) -> list[Path]:
    """The files that decide the model's numbers."""
    return sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])


def _loaded(transformers: Any, spec: HuggingfaceModel, folder: Path) -> nn.Module:
    try:
        module, info = with_operators(lambda: _read(transformers, _CLASSES[spec.task], folder))
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - transformers raises whatever a folder makes it raise
        rule = f"transformers refuses the folder: {type(error).__name__}: {shorten(Plain(str(error)), 300)}"
        raise ModelError("model.path", rule, Plain(folder.name)) from None
    _check_weights(info, spec, folder)
    found: nn.Module = module
    return found


def _read(transformers: Any, name: str, folder: Path) -> Any:
    """The model, and what transformers found out about its weights."""
    kind = getattr(transformers, name)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config.use_cache = False
    config.return_dict = True
    _check_memory(kind, config)
    return kind.from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="eager",
        dtype="auto",
        output_loading_info=True,
    )


def _check_folder(folder: Path) -> None:
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise ModelError("model.path", "must be a folder with a config.json", Plain(str(folder)))
    if not any(folder.glob("*.safetensors")):
        way_out = "save it with model.save_pretrained(FOLDER), which writes safetensors"
        raise ModelError("model.path", "must hold its weights as *.safetensors", Plain(folder.name), way_out)


def _check_config(path: Path) -> None:
    """Refuse code and sizes that a config could bring, before transformers reads it."""
    if path.stat().st_size > MAX_CONFIG:
        raise ModelError("model.path", f"must have a config.json of at most {MAX_CONFIG:,} bytes", path.stat().st_size)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError("model.path", f"must have a readable config.json: {error}", Plain(path.parent.name)) from None
    if not isinstance(config, dict):
        raise ModelError("model.path", "must have a config.json that holds a mapping", Plain(path.parent.name))
    for name, value in _numbers(config):
        if name == "auto_map":
            raise ModelError("model.path", "must not bring code of its own (auto_map)", Plain(path.parent.name))
        if isinstance(value, int) and (abs(value) > 2**31 or ("layer" in name and value > MAX_LAYERS)):
            raise ModelError("model.path", f"has a config.json whose {name} is too large", value)


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield str(name), value
        if isinstance(value, Mapping):
            yield from _numbers(value)


def _check_memory(kind: Any, config: Any) -> None:
    """Refuse a model that cannot fit, before anything is allocated."""
    with torch.device("meta"):
        blank = kind.from_config(config)
    needed = sum(p.numel() * p.element_size() for p in blank.parameters())
    free = psutil.virtual_memory().available
    if needed > free:
        raise ModelError("model.path", f"must fit into the {size(free)} of memory that are free", Plain(size(needed)))


def _check_weights(info: Mapping[str, Any], spec: HuggingfaceModel, folder: Path) -> None:
    extra = [] if spec.ignore_extra else sorted(info.get("unexpected_keys") or ())
    misshapen = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get("mismatched_keys") or ())
    refuse_differences(sorted(info.get("missing_keys") or ()), extra, misshapen, "model.path", folder)


class Pooling:
    """A forward hook that makes one vector of a sample's last hidden states."""

    def __init__(self, how: str, normalize: bool) -> None:
        self.how = how
        self.normalize = normalize

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        """The pooled states `(B, width)`.

        Args:
            args: the model's positional arguments.
            kwargs: its keywords; `attention_mask` `(B, L)` tells padding from tokens.
            output: what it returned, with `last_hidden_state` `(B, L, width)`.
        """
        states: Tensor = output["last_hidden_state"]
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            mask = args[1]
        kept = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
        pooled = _POOLINGS[self.how](states, kept.unsqueeze(-1))
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def _mean(states: Tensor, kept: Tensor) -> Tensor:
    return (states * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1e-9)


def _cls(states: Tensor, _kept: Tensor) -> Tensor:
    return states[:, 0]


def _max(states: Tensor, kept: Tensor) -> Tensor:
    return states.masked_fill(kept == 0, torch.finfo(states.dtype).min).amax(dim=1)


def _last(states: Tensor, kept: Tensor) -> Tensor:
    """The last token that is no padding, wherever the padding stands."""
    places = torch.arange(states.shape[1], device=states.device, dtype=kept.dtype).unsqueeze(-1)
    last = ((kept * (places + 1)).argmax(dim=1, keepdim=True)).expand(-1, 1, states.shape[2])
    return states.gather(1, last).squeeze(1)


_POOLINGS = {"mean": _mean, "cls": _cls, "max": _max, "last": _last}


def _with_pooling(module: nn.Module, spec: HuggingfaceModel) -> nn.Module:
    # A hook and not a wrapper, so that submodules and parameters keep the names that transformers gives them.
    if spec.pooling is not None:
        module.register_forward_hook(Pooling(spec.pooling, spec.normalize), with_kwargs=True)
    return module


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No request leaves the machine, whatever the folder says."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and reports: what matters becomes an error of ours."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
