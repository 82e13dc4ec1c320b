"""What a trained flow is worth: quality over evaluations, geometry, the uses of its way back.

Dimensions: N samples, S states of a trajectory.

Every function is an analysis of a Task: (flow, params, extra, folder, rows, length) -> a summary;
it writes its figures as JSON and its pictures into the folder. ``rows`` is how many samples are
drawn, ``length`` how many steps a solver makes where the analysis has no recipe for it.
"""

import dataclasses
import json
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ..models.rectified_flow import geometry as geometry_lib, recipe
from . import flow_pictures as pictures, loop, metrics
from .config import ConfigError
from .data.image_sources import ImageConfig
from .quantise import quantise
from .tasks import image_classification

logger = logging.getLogger("scanax")
SEED = 17  # of the noise that the analyses share
SHOWN = 64  # samples in a picture
BATCH = 256


def quality(
    flow: Any, params: Any, extra: Any, folder: pathlib.Path, rows: int, length: int
) -> str:
    """Distances between samples and real images for each of ``sampler.recipes``, and pictures.

    Samples are compared with so many real images of the training part: 2,048, or all; or, if
    samples begin at images, as many as are held out of these.
    """
    del extra, length
    folder.mkdir(parents=True, exist_ok=True)
    starts = flow.data.available(training=False, starts=True)
    real = flow.data.real(min(rows or 2048, starts), training=True)
    extractor = _extractor(flow, folder, real)
    reports, names = [], []
    x, labels, keys = flow.starts(np.arange(len(real)), jax.random.key(SEED))
    for text in flow.sampler.recipes:
        samples, nfe = _solve(flow, params, x, labels, text, keys)
        levels = quantise(samples)
        report = metrics.evaluate(real, levels.images, extractor)
        reports.append({**report, "recipe": text, "nfe": nfe, "clipped": levels.clipped})
        names.append(f"{text} ({nfe:g})")
        picture = pictures.images(samples[:SHOWN])
        _save(picture, folder / f"{text.replace(':', '_')}.png")
    (folder / "quality.json").write_text(json.dumps(reports, indent=2) + "\n")
    curve = {"Frechet distance": [r["frechet_distance"] for r in reports]}
    x = [r["nfe"] for r in reports]
    label = f"of {extractor.name.split(':')[0]} features"
    pictures.lines(x, curve, "evaluations of the velocity", label, folder / "quality.png")
    return metrics.table(reports, names)


def geometry(
    flow: Any, params: Any, extra: Any, folder: pathlib.Path, rows: int, length: int
) -> str:
    """Straightness, transport cost, and the identity that ties them to the loss.

    Of 2,048 samples (``rows``) and 100 Euler steps (``length``). Ends are independent and held out,
    or pairs that are, as many as there are; the flow is asked with their labels.
    """
    del extra
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(rows or 2048)
    text = f"euler:{length or 100}"
    x0, *_ = flow.starts(numbers, jax.random.key(SEED))
    x1, labels = map(jnp.asarray, flow.data.ends(numbers, training=False))
    if flow.data.pairs is not None:
        _, held = flow.data.pairs.split(flow.data.config.eval_fraction)
        numbers = numbers[: len(held)]
        pairs = held.batch(numbers, numbers)
        x0, x1, labels = (jnp.asarray(pairs[n]) for n in ("x0", "x1", "labels"))
    found: dict[str, Any] = {"samples": len(numbers), "solver": text}
    sums = {n: 0.0 for n in ("straightness", "mean_straightness", "crossing")}
    costs = {f"{c}_{n}": 0.0 for c in geometry_lib.COSTS for n in ("pairs", "flow")}
    for part in _parts(len(numbers)):
        path = flow.solve(params, x0[part], labels[part], text, trajectory=True).trajectory
        v = flow.velocity(params, labels[part])
        sums["straightness"] += float(jnp.sum(geometry_lib.straightness(path, recipe(text).grid)))
        sums["mean_straightness"] += float(jnp.sum(geometry_lib.mean_straightness(path)))
        crossing = geometry_lib.crossing(v, x0[part], x1[part], len(path) - 1)
        sums["crossing"] += float(jnp.sum(crossing))
        for cost in geometry_lib.COSTS:
            for name, end in (("pairs", x1[part]), ("flow", path[-1])):
                total = jnp.sum(geometry_lib.transport_cost(path[0], end, cost))
                costs[f"{cost}_{name}"] += float(total)
    found |= {name: value / len(numbers) for name, value in (sums | costs).items()}
    found["cost_saved"] = found["squared_pairs"] - found["squared_flow"]
    found["straightness_and_crossing"] = found["straightness"] + found["crossing"]
    return _summary(found, folder / "geometry.json")


def toy(flow: Any, params: Any, extra: Any, folder: pathlib.Path, rows: int, length: int) -> str:
    """How many samples of 1, 2, 10 and all steps are near a mode; trajectories as a picture."""
    del extra
    folder.mkdir(parents=True, exist_ok=True)
    number, steps = rows or 10_000, length or 100
    x0, labels, _ = flow.starts(np.arange(number), jax.random.key(SEED))
    means = flow.data.config.means()[1]
    radius = 3 * flow.data.config.variance**0.5
    found: dict[str, float] = {"samples": number}
    ends: dict[int, np.ndarray] = {}
    for n in (1, 2, 10, steps):
        ends[n] = np.asarray(flow.solve(params, x0, labels, f"euler:{n}").x)
        distance = np.linalg.norm(ends[n][:, None] - means[None], axis=-1).min(axis=1)
        found[f"within_3_sigma_{n}"] = float(np.mean(distance < radius))
    found["rmse_one_step"] = float(np.sqrt(np.mean(np.sum((ends[1] - ends[steps]) ** 2, axis=1))))
    path = flow.solve(params, x0[:200], labels[:200], f"euler:{steps}", trajectory=True)
    shown = {f"{steps} steps": np.asarray(path.trajectory)}
    shown["one step"] = np.stack([np.asarray(x0[:200]), ends[1][:200]])
    pictures.trajectories(flow.data.config, shown, folder / "trajectories.png")
    return _summary(found, folder / "toy.json")


def inversion(
    flow: Any, params: Any, extra: Any, folder: pathlib.Path, rows: int, length: int
) -> str:
    """Held-out images to noise (``sampler.invert``) and back (``sampler.recipe``)."""
    del extra, length
    folder.mkdir(parents=True, exist_ok=True)
    x, labels, noise = _inverted(flow, params, rows or 256)
    back, _ = _forward(flow, params, noise, labels)
    square = np.sum(np.square(noise), axis=tuple(range(1, noise.ndim)))
    d = noise[0].size
    found = {
        "samples": len(x),
        "invert": flow.sampler.invert,
        "recipe": flow.sampler.recipe,
        "reconstruction_mse": float(np.mean(np.square(back - x))),
        "noise_square_mean": float(square.mean()),
        "noise_square_std": float(square.std()),
        "chi_square_mean": d,
        "chi_square_std": (2 * d) ** 0.5,
    }
    shown = np.stack([x[:16], np.clip(noise[:16] / 3, -1, 1), back[:16]])
    _save(
        pictures.images(shown.reshape(-1, *x.shape[1:]), columns=len(x[:16])),
        folder / "inversion.png",
    )
    return _summary(found, folder / "inversion.json")


def interpolation(
    flow: Any, params: Any, extra: Any, folder: pathlib.Path, rows: int, length: int
) -> str:
    """Between pairs of held-out images, along great circles of their noises: a picture."""
    del extra, length
    folder.mkdir(parents=True, exist_ok=True)
    pairs, steps = rows or 8, 8
    x, labels, noise = _inverted(flow, params, 2 * pairs)
    a, b = (jnp.repeat(jnp.asarray(noise[i::2]), steps, axis=0) for i in (0, 1))
    share = jnp.tile(jnp.linspace(0, 1, steps), len(a) // steps)
    between = geometry_lib.slerp(a, b, share)
    labels = np.repeat(labels[::2], steps)
    images, _ = _forward(flow, params, np.asarray(between), labels)
    _save(pictures.images(images, columns=steps), folder / "interpolation.png")
    return f"{len(a) // steps} pairs of {len(x)} images drawn in interpolation.png"


def editing(
    flow: Any, params: Any, extra: Any, folder: pathlib.Path, rows: int, length: int
) -> str:
    """Held-out images, inverted with their label, drawn with every other: a picture."""
    del extra, length
    if flow.model.num_classes < 2:
        raise ConfigError("editing changes the label: it needs a flow with model.num_classes >= 2")
    folder.mkdir(parents=True, exist_ok=True)
    x, _, noise = _inverted(flow, params, rows or 8)
    classes = flow.data.num_classes
    targets = np.tile(np.arange(classes, dtype=np.int32), len(x))
    images, _ = _forward(flow, params, np.repeat(noise, classes, axis=0), targets)
    table = images.reshape(len(x), classes, *x.shape[1:])
    shown = np.concatenate([x[:, None], table], axis=1).reshape(-1, *x.shape[1:])
    _save(pictures.images(shown, columns=classes + 1), folder / "editing.png")
    return f"{len(x)} images and {classes} labels drawn in editing.png, originals on the left"


def transfer(
    flow: Any, params: Any, extra: Any, folder: pathlib.Path, rows: int, length: int
) -> str:
    """Held-out images of either kind, and where the flow takes them, there and back: a picture."""
    del extra, length
    if not flow.data.config.start_path:
        raise ConfigError("transfer is between two kinds of images: set data.start_path")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(rows or 16)
    x, wanted, _ = flow.starts(numbers, jax.random.key(SEED))
    a, (b, labels) = np.asarray(x), flow.data.ends(numbers, training=False)
    there, nfe = _forward(flow, params, a, np.asarray(wanted))
    back, _ = _solve(flow, params, b, labels, flow.sampler.invert)
    shown = np.stack([a, there, b, back]).reshape(-1, *a.shape[1:])
    _save(pictures.images(shown, columns=len(numbers)), folder / "transfer.png")
    moved = float(np.mean(np.square(there - a)))
    (folder / "transfer.json").write_text(json.dumps({"nfe": nfe, "moved_mse": moved}) + "\n")
    return f"start, its image, end, its image: four rows in transfer.png; {nfe:g} evaluations"


def _inverted(flow, params, number: int):
    """Held-out images, their labels, and the noise they come from."""
    x, labels = flow.data.ends(np.arange(number), training=False)
    noise, _ = _solve(flow, params, x, labels, flow.sampler.invert)
    return x, labels, noise


def _forward(flow, params, x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    return _solve(flow, params, x, labels, flow.sampler.recipe)


def _solve(
    flow, params, x: jax.Array | np.ndarray, labels: jax.Array | np.ndarray, text: str, keys_N=None
) -> tuple[np.ndarray, float]:
    """Where a recipe takes x, in parts, and the mean number of evaluations of each.

    Noise that the recipe asks for is of the keys, or of the row's number and the direction.
    """
    if keys_N is None:
        key = jax.random.fold_in(jax.random.key(SEED), int(recipe(text).to_data))
        keys_N = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x)))
    labels_N, found, nfe = jnp.asarray(labels, jnp.int32), [], 0.0
    for part in _parts(len(x)):
        rows = jnp.asarray(x[part])
        solution = flow.solve(params, rows, labels_N[part], text, keys_N[part])
        found.append(np.asarray(solution.x))
        nfe += float(np.mean(solution.nfe)) * len(rows) / len(x)
    return np.concatenate(found), nfe


def _parts(number: int) -> list[slice]:
    return [slice(i, min(i + BATCH, number)) for i in range(0, number, BATCH)]


def _classifier(flow, folder: pathlib.Path) -> pathlib.Path:
    """The run of a small classifier of the flow's own images, trained here unless it is there."""
    workdir = folder.parents[2] / "classifier"
    c = flow.config
    if flow.data.num_classes < 2:
        raise ConfigError(
            "sampler.features=classifier needs data with classes: set data.label_key, or choose"
            " random_conv, pca:D, pixels or classifier:WORKDIR"
        )
    fields = [field.name for field in dataclasses.fields(ImageConfig)]
    data = {name: c.data[name] for name in fields}
    model = {"stages": (32, 64), "convs_per_stage": 2, "norm_groups": 8, "feature_size": 128}
    optimizer = dataclasses.replace(
        c.optimizer, learning_rate=2e-3, schedule="cosine", warmup_steps=50, ema_decay=0.99
    )
    evaluation = dataclasses.replace(c.evaluation, every_steps=0, batches=0, samples=0)
    config = dataclasses.replace(
        c,
        task="image_classification",
        family="convnet",
        num_steps=1000,
        batch_size=64,
        microbatches=1,
        init_from="",
        model=model,
        data={**data, "crop_padding": 1, "eval_fraction": 0.1},
        objective={},
        sampler={},
        optimizer=dataclasses.replace(optimizer, weight_decay=0.1, freeze=(), freeze_from=0),
        evaluation=dataclasses.replace(evaluation, stop_when=""),
        mesh=dataclasses.replace(c.mesh, data=1, fsdp=1, tensor=1, expert=1, sequence=1),
    )
    if not (workdir / "checkpoints").is_dir():
        logger.info("training a classifier of the data, in %s", workdir)
    loop.train(image_classification.build(config), config, workdir)
    return workdir


def _extractor(flow, folder: pathlib.Path, real: np.ndarray):
    """The features that the config names; a classifier is trained first if it names none."""
    kind = flow.sampler.features
    if kind == "classifier":
        kind = f"classifier:{_classifier(flow, folder)}"
    try:
        return metrics.make_extractor(kind, real)
    except ValueError as error:
        raise ConfigError(f"sampler.features: {error}") from error


def _summary(found: dict[str, Any], path: pathlib.Path) -> str:
    """Writes figures as JSON; they as lines."""
    path.write_text(json.dumps(found, indent=2) + "\n")
    return "\n".join(f"{name} {value}" for name, value in found.items())


def _save(picture: np.ndarray, path: pathlib.Path) -> None:
    Image.fromarray(picture).save(path)
