"""Images, decoded by Pillow: from folders, or from bytes within a table."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain, UserError
from jacray_workers.sources.arrays import Part, check_memory
from jacray_workers.sources.places import Place, Reach, Stamp, changed, filesystem, locate, unreadable
from jacray_workers.sources.specs import Images

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
"""Those that pictures come in. Pillow knows others that start programs or hold drawings of any size."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
MAX_PIXELS = 1 << 26
HEADERS = 4096
"""So many are read when a folder is opened, which takes about a second; every image is checked when it is read."""

_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
Size = tuple[int, int] | None


@dataclass(frozen=True)
class Folder:
    """A reader of a folder of images.

    Attributes:
        folder: where.
        names: of the images, relative to the folder, in their order.
        stamps: of each image.
        classes: the number of each image's class; empty where there are none.
        mode: L, RGB or RGBA.
        size: height and width to scale to.
    """

    samples: int
    argument: str
    folder: Place
    names: tuple[str, ...]
    stamps: tuple[Stamp, ...]
    classes: tuple[int, ...]
    mode: str
    size: Size
    places: tuple[tuple[Place, Stamp], ...] = ()  # each image looks after itself

    def read(self, start: int, stop: int) -> tuple[dict[str, Part], dict[str, Tensor]]:
        """Images `(rows, channels, height, width)` from 0 to 1, and their classes."""
        shown = [self._image(i) for i in range(start, stop)]
        odd = next((i for i, image in enumerate(shown) if image.shape != shown[0].shape), None)
        if odd is not None:
            raise _other_size(self.argument, self.names[start + odd], shown[odd].shape[1:], shown[0].shape[1:])
        return {"": torch.stack(shown)}, self.read_fields(start, stop)

    def read_fields(self, start: int, stop: int) -> dict[str, Tensor]:
        """The images' classes."""
        return {"target": torch.tensor(self.classes[start:stop])} if self.classes else {}

    def _image(self, number: int) -> Tensor:
        place = self.folder.inside(self.names[number])
        if place.stamp() != self.stamps[number]:
            raise changed(place)
        with place.open() as stream:
            return decoded(stream.read(), self.mode, self.size, self.argument, place.name)


def images(spec: Images, base: Path, argument: str, reach: Reach) -> Folder:
    """A folder of images; the headers of some are read to see that all have one size, those of the others with them."""
    folder = locate(spec.path, base, f"{argument}.path", reach=reach)
    if not folder.folder:
        raise InputError(folder.argument, "must be a folder of images", Plain(folder.name))
    names = sorted(name for name in _files(folder) if name.lower().endswith(SUFFIXES))
    if not names:
        shown = Plain(folder.name)
        raise InputError(folder.argument, f"must hold images that end in {', '.join(SUFFIXES)}", shown)
    places = [folder.inside(name) for name in names]
    if spec.size is None:
        _check_sizes(places)
    stamps = tuple(place.stamp() for place in places)
    return Folder(
        len(names), f"{argument}.path", folder, tuple(names), stamps, _classes(names, folder), spec.mode, spec.size
    )


def _files(folder: Place) -> list[str]:
    if folder.local is None:
        system, path = filesystem(folder.path, folder.argument)
        return [str(name)[len(path) :].lstrip("/") for name in system.find(path)]
    found = []
    for where, _, names in os.walk(folder.local):
        found += [os.path.relpath(os.path.join(where, name), folder.local) for name in names]  # noqa: PTH118
    return found


def _classes(names: list[str], folder: Place) -> tuple[int, ...]:
    """The place of each image's folder among the folders' sorted names."""
    above = [name.rpartition("/")[0] for name in names]
    if not any(above):
        return ()
    if not all(above):
        shown = Plain(names[above.index("")])
        raise InputError(folder.argument, "must hold images, or folders of images, not both", shown)
    known = sorted(set(above))
    return tuple(known.index(name) for name in above)


def _check_sizes(places: list[Place]) -> None:
    """Refuse images of several sizes before anything is computed, as far as a few thousand evenly spread ones tell."""
    first: tuple[int, int] | None = None
    for place in places[:: -(-len(places) // HEADERS)]:
        with place.open() as stream:
            found = _opened(stream, place.argument, place.name, lambda image: (image.height, image.width))
        if first not in (None, found):
            raise _other_size(place.argument, place.name, found, first)
        first = found


def _other_size(argument: str, name: str, size: Sequence[int], first: Sequence[int] | None) -> InputError:
    way_out = "give `size: [height, width]` to scale them"
    shown = Plain(f"{name} of {tuple(size)}")
    return InputError(argument, f"must hold images of one size, {first and tuple(first)}", shown, way_out)


def decoded(data: bytes, mode: str, size: Size, argument: str, name: str) -> Tensor:
    """One image as float32 `(channels, height, width)` from 0 to 1.

    Raises:
        InputError: this is no image of a known format, it has too many pixels, or its numbers do not fit the mode.
    """
    found: Tensor = _opened(io.BytesIO(data), argument, name, lambda image: _tensor(image, mode, size, argument, name))
    return found


def _opened(stream: Any, argument: str, name: str, look: Callable[[Any], Any]) -> Any:
    """What a look at an image finds. The number of its pixels is checked before any is decoded."""
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images, which are refused here
            with Image.open(stream, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    shown = Plain(f"{image.width} x {image.height} in {name}")
                    raise InputError(argument, f"must hold images of at most {MAX_PIXELS:,} pixels", shown)
                return look(image)
    except Exception as error:
        if isinstance(error, UserError):
            raise
        place = Place(name, "file", folder=False, argument=argument)
        raise unreadable(place, "image", error) from None


def _tensor(image: Any, mode: str, size: Size, argument: str, name: str) -> Tensor:
    check_memory(image.width * image.height * _CHANNELS[mode] * 8, argument)
    deep = image.mode.startswith(("I", "F"))
    if deep and (mode != "L" or not image.mode.startswith("I;16")):
        way_out = "use mode: L for grey images of 16 bits"
        raise InputError(
            argument, f"must hold images of 8 bits a channel for mode {mode}", Plain(f"{image.mode} in {name}"), way_out
        )
    shown = image if deep else image.convert(mode)
    if size is not None:
        from PIL import Image

        # To floats first: Pillow scales 16 bits by the nearest pixel only.
        shown = Image.fromarray(np.asarray(shown, np.float32)) if deep else shown
        shown = shown.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    numbers = np.asarray(shown, np.float32) / np.float32(65535 if deep else 255)
    return torch.from_numpy(np.ascontiguousarray(numbers.reshape(*numbers.shape[:2], -1).transpose(2, 0, 1)))
