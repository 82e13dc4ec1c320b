"""What images are compared by: feature extractors, each with a name for the reports.

Dimensions: N images, H height, W width, C channels, D features.

A name says what the features are, in which version, and which weights made them: numbers are
comparable only between reports with the same name.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import importlib.util
import pathlib
from typing import Any, Protocol

import numpy as np
import scipy.linalg

from . import classifier, random_conv

KINDS = ("pixels", "pca:D", "random_conv[:SEED]", "classifier:WORKDIR", "FILE.py:FUNCTION")
INCEPTION = "inception"  # how the names of Inception's features begin


class FeatureExtractor(Protocol):
    """Images to features."""

    @property
    def name(self) -> str:
        """What it is, its version, and a checksum of its weights."""
        ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """[N, H, W, C] uint8 -> [N, D] float64."""
        ...


@dataclasses.dataclass(frozen=True)
class Features:
    """A function as a ``FeatureExtractor`` that checks what goes in and what comes out.

    Attributes:
      name: see ``FeatureExtractor``.
      function: [N, H, W, C] uint8 -> [N, D], any real dtype.
    """

    name: str
    function: Callable[[np.ndarray], Any]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """[N, H, W, C] uint8 -> [N, D] float64; a ValueError for anything else."""
        check_images("the given", images)
        found = np.asarray(self.function(images), np.float64)
        if found.ndim != 2 or len(found) != len(images):
            raise ValueError(
                f"{self.name} made features of shape {found.shape} of {len(images)} images; they"
                " must be [N, D]"
            )
        return found


def check_images(what: str, images: np.ndarray) -> None:
    """Raises a ValueError unless images are [N, H, W, C] uint8, N > 0."""
    dtype, shape = np.asarray(images).dtype, np.shape(images)
    if dtype != np.uint8:
        raise ValueError(f"{what} images are {dtype}; make them uint8 with scanax.train.quantise")
    if len(shape) != 4 or not all(shape):
        raise ValueError(f"{what} images must be [N, H, W, C], got shape {shape}")


def make_extractor(kind: str, real: np.ndarray | None = None) -> FeatureExtractor:
    """The extractor that a command line names.

    Args:
      kind: "pixels"; "pca:D"; "random_conv" or "random_conv:SEED"; "classifier:WORKDIR", an
        image_classification run of this repository; or "FILE.py:FUNCTION", see :func:`from_file`.
      real: [N, H, W, C] uint8, the real images; pca is fitted to them.

    Raises:
      ValueError: for another kind, or an argument that the kind cannot use.
    """
    name, _, argument = kind.partition(":")
    if name == "pixels" and not argument:
        return pixels()
    if name == "pca" and argument.isdecimal():
        if real is None:
            raise ValueError("pca is fitted to the real images: give them")
        return pca(real, int(argument))
    if name == "random_conv" and (argument.isdecimal() or not argument):
        return random_conv_features(int(argument or 0))
    if name == "classifier" and argument:
        return classifier_features(argument)
    if name.endswith(".py") and argument:
        return from_file(kind)
    raise ValueError(f"unknown features {kind!r}; choose one of {', '.join(KINDS)}")


def pixels() -> Features:
    """All values, in [-1, 1]: D = H W C."""
    return Features("pixels-v1", _flat)


def pca(real: np.ndarray, components: int) -> Features:
    """The first principal components of the pixels.

    Args:
      real: [N, H, W, C] uint8, the images that they are fitted to.
      components: D.

    Raises:
      ValueError: if so many images and pixels have fewer components.
    """
    check_images("the real", real)
    x_NP = _flat(real)
    most = min(len(x_NP) - 1, x_NP.shape[1])
    if not 1 <= components <= most:
        raise ValueError(
            f"pca:{components} of {len(x_NP)} images with {x_NP.shape[1]} values each: D must be"
            f" 1 to {most}"
        )
    mean_1P = np.mean(x_NP, axis=0, keepdims=True)
    axes_PD = _principal_axes(x_NP - mean_1P, components)

    def project(images: np.ndarray) -> np.ndarray:
        found = _flat(images)
        if found.shape[1] != len(axes_PD):
            raise ValueError(
                f"images of shape {images.shape[1:]}, but pca was fitted to {real.shape[1:]}"
            )
        return (found - mean_1P) @ axes_PD

    fitted = hashlib.sha256(f"{real.shape}".encode() + np.ascontiguousarray(real).tobytes())
    return Features(f"pca-v1: {components} of images {fitted.hexdigest()[:12]}", project)


def random_conv_features(seed: int = 0) -> Features:
    """Convolutions that nobody trained: see ``random_conv.py``."""
    weights = random_conv.weights(seed)
    name = f"random_conv-v1: seed {seed}, weights {_digest(*weights)}"
    return Features(name, lambda images: random_conv.features(weights, images))


def classifier_features(workdir: str | pathlib.Path, step: int | None = None) -> Features:
    """What a classifier trained in this repository has in front of its last layer.

    Args:
      workdir: of the run, whose data must still be where it was.
      step: a saved step; None for the newest.

    Raises:
      ValueError: if the run is none of task image_classification on single images.
    """
    found = classifier.load(workdir, step)
    return Features(found.name, lambda images: found.features_and_probabilities(images)[0])


def from_file(place: str) -> Features:
    """An extractor from a user's file: another network, Inception among them.

    The file is executed. The function takes images [N, H, W, C] uint8, any N, and returns [N, D].
    Its attribute ``name``, if it has one, names the features; else the file's name and checksum
    do. A name that begins with "inception" claims that they are Inception's: only then does the
    report say FID.

    Args:
      place: "path/to/file.py:function".

    Raises:
      ValueError: if there is no such file or function.
    """
    path, _, attribute = place.rpartition(":")
    file = pathlib.Path(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"features {place}: there is no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"features {place}: {path} has no function {attribute!r}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    name = getattr(function, "name", f"{file.name}:{attribute}, file {digest}")
    return Features(str(name), function)


def _flat(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] uint8 -> [N, H W C] float64 in [-1, 1]."""
    return images.reshape(len(images), -1) / 127.5 - 1


def _principal_axes(x_NP: np.ndarray, components: int) -> np.ndarray:
    """[P, D] orthonormal columns, largest variance first; the largest entry of each is positive."""
    number, values = x_NP.shape
    wide = values > number  # then the axes come from the smaller matrix of inner products
    square = x_NP @ x_NP.T if wide else x_NP.T @ x_NP
    last = len(square) - 1
    _, vectors = scipy.linalg.eigh(square, subset_by_index=(last - components + 1, last))
    axes_PD = (x_NP.T @ vectors if wide else vectors)[:, ::-1]
    axes_PD = axes_PD / np.linalg.norm(axes_PD, axis=0, keepdims=True)
    largest = np.argmax(np.abs(axes_PD), axis=0)
    return axes_PD * np.sign(axes_PD[largest, np.arange(components)])[None]


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]
