"""Captions as the prefill stage takes them: features of a text encoder."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from linert.runtime.bundles.manifest import CaptionInput
from linert.runtime.drawing.caption_encoder import CaptionEncoder
from linert.runtime.drawing.conditioner import USUAL_PROMPTS, Conditioner, Inputs
from linert.runtime.drawing.samples import Caption, Condition, Prompt
from linert.runtime.errors import RequestError
from linert.runtime.files.text_files import is_lfs_pointer, lfs_remedy

if TYPE_CHECKING:
    pass

REMEMBERED = 256
"""Prompts whose features are kept for the next image, the latest ones: a batch needs its own, and a negative prompt all the time."""


class CaptionConditioner(Conditioner):
    """Of a model that sees features of a text encoder.

    ``encoder`` makes them of prompts; None where the bundle has none.
    """

    def __init__(
        self, spec: CaptionInput, prefix_len: int, encoder: CaptionEncoder | None, *, guided: bool
    ) -> None:
        super().__init__(prefix_len, guided=guided)
        self.spec, self.encoder = spec, encoder
        self._features: dict[str, NDArray[np.float32]] = {}
        self._encoded: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def add(self, features: NDArray[Any], name: str) -> Caption:
        """Make features known that can then be drawn.

        Args:
            features: ``[length, feature_dim]``; rows of nothing but zeros at either end are padding, and go.
            name: what to call them.

        Raises:
            RequestError: of another shape, longer than the bundle's prefix, not finite, or nothing but zeros.
        """
        capacity, width = self.prefix_len, self.spec.feature_dim
        if features.ndim != 2 or features.shape[1] != width or features.dtype.kind != "f":
            raise RequestError(
                f"{name}: features must be real numbers of shape [length, {width}], not {features.dtype} {features.shape}"
            )
        # What is too large for float32 becomes infinite, which is looked for.
        with np.errstate(all="ignore"):
            [nonzero] = np.nonzero(features.any(axis=1))
            if not len(nonzero):
                raise RequestError(f"{name}: features that are nothing but zeros")
            length = int(nonzero[-1] + 1 - nonzero[0])
            if length > capacity:
                raise RequestError(
                    f"{name}: features of {length} tokens; the bundle's prefix has room for {capacity}"
                )
            kept = np.ascontiguousarray(features[nonzero[0] : nonzero[-1] + 1], np.float32)
        if not np.isfinite(kept).all():
            raise RequestError(f"{name}: features that are not finite, or not in float32")
        digest = hashlib.sha256(kept.tobytes()).hexdigest()
        self._features[digest] = kept
        return Caption(digest, name)

    def read(self, path: Path) -> list[Caption]:
        """:meth:`add` all features of a ``.npy`` file: ``[length, feature_dim]`` or ``[n, length, feature_dim]``.

        Raises:
            RequestError: no such file, no ``.npy``, or no features that fit.
        """
        # A name is shown and recorded, in whatever bytes the file system has it.
        name = path.name.encode(errors="replace").decode()
        values = _mapped_array(path)
        if values.ndim not in (2, 3):
            raise RequestError(
                f"{path} must hold one array of features, [length, d] or [captions, length, d], not {list(values.shape)}"
            )
        if values.ndim == 2:
            return [self.add(values, name)]
        return [self.add(row, f"{name} {number}") for number, row in enumerate(values)]

    def features(self, conditions: Iterable[Condition]) -> dict[str, NDArray[np.float32]]:
        """The features ``[length, feature_dim]`` of the captions among ``conditions``, by their digest."""
        return {
            condition.sha256: self._features[condition.sha256]
            for condition in conditions
            if isinstance(condition, Caption)
        }

    def keep(self, features: Mapping[str, NDArray[np.float32]]) -> None:
        """Know these :meth:`features` of another conditioner, and no others."""
        self._features = dict(features)

    def check(self, conditions: Iterable[Condition]) -> None:
        for condition in conditions:
            if isinstance(condition, Prompt) and self.encoder is not None:
                self.encoder.tokens(condition.text)
                self.encoder.tokens(condition.negative or "")
                self._check_negative(condition)
            elif not isinstance(condition, Caption):
                remedy = "export it with --text-encoder for prompts" if self.encoder is None else "or prompts"
                raise RequestError(
                    "the model does not draw what was asked for; it sees features of captions: give them with --captions FILE.npy, "
                    f"{remedy}"
                )
            elif condition.sha256 not in self._features:
                raise RequestError(
                    f"the features of {condition.name} (sha256 {condition.sha256[:16]}) are not there: give them with --captions"
                )

    def inputs(self, conditions: Sequence[Condition]) -> Inputs:
        listed = list(conditions)
        self.check(listed)
        arrays = self._padded("caption", [self._of(condition) for condition in listed])
        if self.guided:
            negative = [label.negative if isinstance(label, Prompt) else None for label in listed]
            rows = [None if text is None else self._encode(text) for text in negative]
            arrays |= self._padded("negative", rows)
        return arrays

    def _of(self, condition: Condition) -> NDArray[np.float32]:
        if isinstance(condition, Caption):
            return self._features[condition.sha256]
        if isinstance(condition, Prompt):
            return self._encode(condition.text)
        raise TypeError(f"{condition} is neither a caption nor a prompt")

    def _encode(self, text: str) -> NDArray[np.float32]:
        if self.encoder is None:
            raise RequestError("the bundle has no text encoder: export it with --text-encoder")
        features = self._encoded.pop(text, None)
        if features is None:
            features = self.encoder(text)
        self._encoded[text] = features
        while len(self._encoded) > REMEMBERED:
            self._encoded.popitem(last=False)
        return features

    def close(self) -> None:
        if self.encoder is not None:
            self.encoder.close()

    def _padded(self, kind: str, rows: Sequence[NDArray[np.float32] | None]) -> Inputs:
        capacity, width = self.prefix_len, self.spec.feature_dim
        features = np.zeros((len(rows), capacity, width), np.float32)
        starts = np.full(len(rows), -1, np.int64)
        for index, row in enumerate(rows):
            if row is not None:
                starts[index] = capacity - len(row)
                features[index, starts[index] :] = row
        return {f"{kind}_features": features, f"{kind}_starts": starts}

    def usual(self) -> list[Condition]:
        """Prompts of our own if there is an encoder, else noise of every length."""
        if self.encoder is not None:
            return [Prompt(text) for text in USUAL_PROMPTS]
        random = np.random.default_rng(0)
        capacity, width = self.prefix_len, self.spec.feature_dim
        lengths = np.linspace(1, capacity, 8).astype(int)
        return [
            self.add(random.standard_normal((length, width), np.float32), f"noise of {length}")
            for length in lengths
        ]


def _mapped_array(path: Path) -> NDArray[Any]:
    """The array of a ``.npy`` file, mapped: of what its header promises nothing is allocated.

    Raises:
        RequestError: no such file, or it is none.
    """
    if not path.is_file():
        raise RequestError(f"{path} does not exist" if not path.exists() else f"{path} is no .npy file")
    if is_lfs_pointer(path):
        raise RequestError(lfs_remedy(path))
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        # A damaged header fails in whatever way its text leads to.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RequestError(f"{path} is no .npy file: {reason}") from error
    if not isinstance(values, np.ndarray):
        raise RequestError(
            f"{path} holds several arrays, as .npz files do: save the features alone, by numpy.save"
        )
    return values
