"""Train the classifier behind configs/digits.yaml and write its weights beside this file.

A fifth of the 1,797 images is held out, stratified by class, and looked at once, after every choice has been
made. The choices (weight decay, number of epochs) are made by cross-validation inside the other four fifths.
The same machine and library versions give the same weights bit for bit (the file's header may list its
metadata in another order).

    python configs/digits/train.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SEED = 0
FOLDS = 3
BATCH = 64
PEAK_LEARNING_RATE = 4e-3
LABEL_SMOOTHING = 0.05  # keeps the logits, and with them the Jacobian, from growing without limit
WEIGHTS = Path(__file__).with_name("digits.safetensors")


@dataclass(frozen=True)
class Data:
    """Images of shape (n, 1, 8, 8) with values from 0 to 1, and their classes of shape (n,)."""

    images: Tensor
    classes: Tensor

    def at(self, indices: np.ndarray) -> Data:
        """The samples at these positions."""
        chosen = torch.from_numpy(indices)
        return Data(self.images[chosen], self.classes[chosen])


@dataclass(frozen=True)
class Setting:
    """What cross-validation chooses."""

    weight_decay: float
    epochs: int


SETTINGS = tuple(Setting(*pair) for pair in product((0.01, 0.1), (50, 150)))


def load() -> Data:
    """All images, scaled as `inputs: {kind: digits}` scales them: the raw pixels run from 0 to 16."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    return Data(torch.from_numpy(images), torch.from_numpy(digits.target))


def split(data: Data) -> tuple[Data, Data]:
    """Four fifths to work with and one fifth to hold out, with equal shares of every class."""
    work, held_out = train_test_split(
        np.arange(len(data.classes)), test_size=0.2, stratify=data.classes.numpy(), random_state=SEED
    )
    return data.at(work), data.at(held_out)


def folds(data: Data) -> Iterator[tuple[Data, Data]]:
    """Pairs of fitting and validation parts for cross-validation."""
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    for fit_on, validate_on in splitter.split(data.images, data.classes):
        yield data.at(fit_on), data.at(validate_on)


def network() -> nn.Sequential:
    """The layers that configs/digits.yaml lists, freshly initialised.

    GELU instead of ReLU, because a smooth function has a Jacobian everywhere and finite differences can
    check it.
    """
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 64),
        nn.GELU(),
        nn.Linear(64, 32),
        nn.GELU(),
        nn.Linear(32, 10),
    )


def fit(data: Data, setting: Setting) -> nn.Sequential:
    """Train a fresh network on these images."""
    model = network()
    order = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=setting.weight_decay)
    steps = setting.epochs * -(-len(data.classes) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for _ in range(setting.epochs):
        for batch in torch.randperm(len(data.classes), generator=order).split(BATCH):
            logits = model(data.images[batch])
            loss = cross_entropy(logits, data.classes[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of images whose largest logit is that of their class."""
    right = model(data.images).argmax(dim=1) == data.classes
    return float(right.double().mean())


def validated_accuracy(data: Data, setting: Setting) -> float:
    """Mean accuracy over the folds, each judged by a network that has not seen it."""
    score = float(np.mean([accuracy(fit(part, setting), rest) for part, rest in folds(data)]))
    print(f"  weight decay {setting.weight_decay:<4}  epochs {setting.epochs:>3}  accuracy {score:.2%}")
    return score


def main() -> None:
    """Choose a setting, train with it, judge once, save."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # sums in one fixed order; a net this small gains nothing from a second core
    work, held_out = split(load())
    print(f"cross-validation, {FOLDS} folds of {len(work.classes)} images:")
    scores = {setting: validated_accuracy(work, setting) for setting in SETTINGS}
    chosen = max(scores, key=scores.__getitem__)
    model = fit(work, chosen)
    result = accuracy(model, held_out)
    print(f"chosen: weight decay {chosen.weight_decay}, epochs {chosen.epochs}")
    total = len(held_out.classes)
    print(f"held-out accuracy: {result:.2%} ({round(result * total)} of {total} images)")
    metadata = {"held_out_accuracy": f"{result:.6f}", "seed": str(SEED), "torch": str(torch.__version__)}
    save_file(model.state_dict(), WEIGHTS, metadata=metadata)
    print(f"wrote {WEIGHTS.name}, {WEIGHTS.stat().st_size:,} bytes, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
