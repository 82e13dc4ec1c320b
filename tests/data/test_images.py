"""Images: sources, splits, augmentation in the pipeline, and images that cannot be used."""

import gzip
import io
import struct
import zipfile

import numpy as np
from PIL import Image
import pytest

from scanax.configs import base
from scanax.train.config import build
from scanax.train.data.image_sources import ImageConfig
from scanax.train.data.images import ImageSet
from scanax.train.data.pipeline import IGNORE, DataError

CLASSES = ("cat", "dog")
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 6, 5, 3), np.uint8)


def images(**changes) -> ImageSet:
    defaults = base.get_config("image_classification").data.to_dict()
    return ImageSet(build(ImageConfig, {**defaults, **changes}, "data"))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(head + array.tobytes())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """24 images: 12 cats, 12 dogs, in every format."""
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for i, pixels in enumerate(PIXELS):
            name = f"{CLASSES[i % 2]}/{i:02d}.png"
            archive.writestr(f"train/{name}", png(pixels))
            (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "pets" / name).write_bytes(png(pixels))
    labels = (np.arange(24) % 2).astype(np.uint8)
    (tmp_path / "t-images-idx3-ubyte.gz").write_bytes(idx(PIXELS[..., 0]))
    (tmp_path / "t-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    np.savez(tmp_path / "both.npz", image=PIXELS, label=labels)
    np.save(tmp_path / "x.npy", PIXELS)
    np.save(tmp_path / "y.npy", labels)
    return tmp_path


def everything(found: ImageSet) -> set:
    parts = [part.take(np.arange(len(part))) for part in found.parts[:2]]
    assert all(len(pixels) for pixels, _ in parts)
    return {
        (x.tobytes(), int(y))
        for pixels, labels in parts
        for x, y in zip(pixels, labels, strict=True)
    }


@pytest.mark.parametrize(
    "changes, channels",
    [
        ({"path": "pets"}, 3),
        ({"path": "pets.zip/train"}, 3),
        ({"path": "both.npz"}, 3),
        ({"path": "x.npy", "labels_path": "y.npy"}, 3),
        ({"path": "t-images-idx3-ubyte.gz", "channels": 1}, 1),
    ],
)
def test_every_source_holds_the_same_images(folder, changes, channels):
    found = images(source="files", eval_fraction=0.3, **changes)
    expected = {(x[..., :channels].tobytes(), i % 2) for i, x in enumerate(PIXELS)}
    assert everything(found) == expected
    assert found.num_classes == 2 and found.shape == (6, 5, channels)


def test_digits_have_every_class_in_both_parts():
    found = images(channels=1)
    for part in found.parts[:2]:
        assert set(part.take(np.arange(len(part)))[1].tolist()) == set(range(10))
    assert sum(map(len, found.parts[:2])) == 1797 and 120 < len(found.parts[1]) < 240
    batch = next(found.train_batches(32, 0, 1))
    assert batch["images"].shape == (32, 8, 8, 1) and batch["images"].dtype == np.float32
    assert batch["images"].min() == -1 and batch["images"].max() == 1


def test_what_is_held_out_depends_on_the_pixels_alone(folder):
    one = images(source="files", path="pets", eval_fraction=0.3).parts[1]
    other = images(source="files", path="x.npy", labels_path="y.npy", eval_fraction=0.3).parts[1]
    pixels = [part.take(np.arange(len(part)))[0] for part in (one, other)]
    assert {x.tobytes() for x in pixels[0]} == {x.tobytes() for x in pixels[1]}


def test_images_are_resized_and_repeated_over_channels(folder):
    found = images(source="files", path="t-images-idx3-ubyte.gz", image_size=4)
    assert found.shape == (4, 4, 3)
    pixels, _ = found.parts[0].take(np.arange(3))
    assert (pixels[..., 0] == pixels[..., 2]).all()


AUGMENTED = {
    "flip": True,
    "crop_padding": 1,
    "resized_crop": 0.5,
    "rand_augment": 2,
    "erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "dequantise": True,
}


@pytest.mark.parametrize("processes", [2, 3])
def test_augmented_batches_do_not_depend_on_processes(processes):
    found = images(channels=1, **AUGMENTED)
    whole = found.train_batches(12, 0, 1)
    parts = [found.train_batches(12, process, processes) for process in range(processes)]
    for _ in range(2):
        expected, rows = next(whole), [next(part) for part in parts]
        assert expected["targets"].shape == (12, 10)
        np.testing.assert_allclose(expected["targets"].sum(1), 1, rtol=1e-5)
        for name, values in expected.items():
            together = np.concatenate([row[name] for row in rows])
            np.testing.assert_array_equal(together, values)


def test_augmentation_continues_exactly():
    found = images(channels=1, **AUGMENTED)
    batches = found.train_batches(12, 0, 1)
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    expected = next(batches)["images"]
    again = found.train_batches(12, 0, 1)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["images"], expected)


def test_evaluation_images_are_as_they_are():
    found = images(channels=1, **{**AUGMENTED, "dequantise": False})
    pixels, labels = found.parts[1].take(np.arange(5))
    batch = found.eval_batch(5, 0)
    np.testing.assert_allclose(batch["images"], pixels / np.float32(127.5) - 1, atol=1e-6)
    np.testing.assert_array_equal(batch["labels"], labels)
    last = found.eval_batch(100, (len(found.parts[1]) - 1) // 100)
    assert (last["labels"] == IGNORE).sum() == -len(found.parts[1]) % 100


def damage(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "spoil, changes, message",
    [
        (lambda f: damage(f / "pets/cat/02.png"), {"path": "pets"}, r"02\.png does not decode"),
        (lambda f: (f / "pets/cat/02.png").write_text("text"), {"path": "pets"}, "does not decode"),
        (
            lambda f: [
                (f / "pets/bird").mkdir(),
                (f / "pets/bird/1.png").write_bytes(png(PIXELS[0])),
            ],
            {"path": "pets"},
            "'bird' holds one image",
        ),
        (
            lambda f: (f / "pets/cat/02.png").write_bytes(png(PIXELS[0, :3])),
            {"path": "pets"},
            r"2 sizes.*set data\.image_size",
        ),
        (lambda f: None, {"path": "absent"}, "absent does not exist"),
        (lambda f: (f / "empty").mkdir(), {"path": "empty"}, "no file matches"),
        (lambda f: None, {"path": "both.npz", "image_key": "x"}, "has no array 'x'"),
        (lambda f: None, {"path": "x.npy", "channels": 1}, "3 channels, data.channels is 1"),
        (lambda f: None, {"path": "y.npy"}, "must hold uint8 images"),
        (
            lambda f: None,
            {"path": "x.npy", "labels_path": "t-images-idx3-ubyte.gz"},
            "24 images, but labels of shape",
        ),
        (
            lambda f: (f / "t-images-idx3-ubyte.gz").write_bytes(
                gzip.compress(b"\0\0\x08\x03" + b"\0" * 11 + b"\x09")
            ),
            {"path": "t-images-idx3-ubyte.gz", "channels": 1},
            "must hold uint8 images|cut off",
        ),
        (
            lambda f: damage(f / "t-images-idx3-ubyte.gz"),
            {"path": "t-images-idx3-ubyte.gz", "channels": 1},
            "is damaged",
        ),
        (lambda f: damage(f / "x.npy"), {"path": "x.npy"}, "cannot be read as an array"),
        (lambda f: None, {"path": "x.npy", "eval_fraction": 1e-9}, "holds 0 of 24 images out"),
    ],
)
def test_images_that_cannot_be_used(folder, spoil, changes, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        _ = images(source="files", **changes).parts


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"channels": 2}, "data.channels"),
        ({"erasing": 2.0}, "data.erasing"),
        ({"in_memory": False}, "in_memory"),
        ({"crop_padding": -1}, "data.crop_padding"),
    ],
)
def test_wrong_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        images(**changes)
