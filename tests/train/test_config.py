"""Configs: every file builds, its parameters are as recorded, and mistakes are named."""

import gzip
import importlib.util
import io
import json
import string
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from scanax.configs import (
    base,
    flow_digits,
    flow_rfpp,
    lightnet_imagenet,
    radd_characters,
    radd_openwebtext,
)
from scanax.models import params as params_lib, radd, unet
from scanax.models.lightnet import LightNetClassifier, LightNetGridConfig
from scanax.train import mesh as mesh_lib, state as state_lib, tasks
from scanax.train.config import ConfigError, build, changes, from_dict, to_dict, unknown_key
from scanax.train.data import tokenizer as tokenizers
from scanax.train.data.flow import FlowImageConfig
from scanax.train.data.text import TextConfig
from scanax.train.loop import param_table, place
from scanax.train.tasks.flow_config import ObjectiveConfig, SamplerConfig
from scanax.train.tasks.masked_config import MaskedObjectiveConfig, MaskedSamplerConfig

CONFIGS = ("word_problem_s3", "word_problem_s3_long", "lm_embedded", "lm_characters", "lm_bpe")
CONFIGS += ("lm_books", "lm_fineweb", "digits_mlp")
CONFIGS += ("word_problem_s4", "word_problem_a5", "word_problem_s5")
CONFIGS += ("parity", "modular_arithmetic", "modular_arithmetic_brackets")
CONFIGS += ("lightnet_digits", "lightnet_mnist", "lightnet_cifar", "lightnet_moving_digits")
CONFIGS += ("lightnet_lm_embedded", "lightnet_lm_characters", "lightnet_wikitext103")
CONFIGS += ("lightnet_mlm_embedded", "lightnet_mlm_reviews", "lightnet_mlm_base")
CONFIGS += ("rmoe_lm_embedded", "rmoe_characters", "rmoe_enwik8", "rmoe_large")
CONFIGS += ("rmoe_delta_product_lm_embedded",)
CONFIGS += ("flow_toy", "flow_digits", "flow_cifar")
CONFIGS += ("digits_convnet", "mnist_convnet", "cifar_convnet")
CONFIGS += ("radd_lm_embedded", "radd_characters")
NOT_RUNS = ("__init__", "base", "datasets")  # what configs are made of
ELSEWHERE = ("lightnet_imagenet", "flow_rfpp", "radd_openwebtext")  # without data, or all sizes


@pytest.fixture
def files(tmp_path, monkeypatch) -> None:
    """Stand-ins for the files that configs name: texts, tokenizers, a few images."""
    text = string.printable * 60
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(text)
    book = f"*** START OF THE PROJECT\n{text}\n*** END OF THE PROJECT\n"
    for folder in ("gutenberg", "mobydick"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text(book)
    (tmp_path / "wikitext103").mkdir()
    for part in ("train", "valid"):
        (tmp_path / "wikitext103" / f"{part}.txt").write_text(text)
    (tmp_path / "movie_reviews").mkdir()
    with zipfile.ZipFile(tmp_path / "movie_reviews" / "movie_reviews.zip", "w") as archive:
        for i in range(30):
            archive.writestr(f"movie_reviews/{i}.txt", f"{i} " + text[:90])
    (tmp_path / "enwik8").mkdir()
    for part in ("train", "valid"):
        (tmp_path / "enwik8" / f"{part}.txt").write_text(text)
    for folder in ("runs", "mistral", "bert", "gpt2", "runs/reviews", "corpus"):
        tokenizers.train_bpe([text], 260, tmp_path / folder / "tokenizer.json")
    parts = json.loads((tmp_path / "gpt2" / "tokenizer.json").read_text())["model"]
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(parts["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in parts["merges"])
    (tmp_path / "gpt2" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    write_mnist(tmp_path / "mnist_t10k")
    write_cifar(tmp_path / "cifar10_jpeg.zip")
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def write_mnist(folder) -> None:
    """Fifty images of 28 x 28 in MNIST's format."""
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), np.uint8)
    labels = (np.arange(50) % 10).astype(np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        sizes = np.asarray(array.shape, ">u4").tobytes()
        content = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
        (folder / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(content))


def write_cifar(path) -> None:
    """Two images of 32 x 32 in each of ten folders, twice."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "green").save(picture, "JPEG")
    with zipfile.ZipFile(path, "w") as archive:
        for part in ("train", "test"):
            for i in range(20):
                archive.writestr(f"{part}/class{i % 10}/{i}.jpg", picture.getvalue())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_as_recorded(root, golden, files, name):
    """Names, shapes, axes and number of parameters; rewrite the file if a change is meant."""
    path = root / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = from_dict(module.get_config().to_dict())
    task = tasks.build(config)
    shapes = state_lib.shapes(task, config)
    _, shardings = place(task, config)
    table = param_table(task, shapes, shardings) + "\n"
    assert table == (golden / "configs" / f"{name}.txt").read_text()


@pytest.mark.parametrize("stage", flow_digits.STAGES)
def test_stages_of_the_flow_of_digits(stage):
    """All but the one that cannot do without a teacher are complete."""
    config = flow_digits.get_config(stage)
    if stage == "guided":
        with pytest.raises(ConfigError, match=r"objective\.teacher is the flow"):
            tasks.build(from_dict(config.to_dict()))
    else:
        tasks.build(from_dict(config.to_dict()))


@pytest.mark.parametrize("data", flow_rfpp.RECIPES)
def test_recipes_of_2_rfpp(files, data):
    """The published sizes and schedules are valid; the images are not there but for CIFAR-10."""
    config = from_dict(flow_rfpp.get_config(data).to_dict())
    family = {"edm_songunet": unet.SongUNetConfig, "edm_dhariwal": unet.DhariwalUNetConfig}
    model = build(family[config.family], config.model, "model")
    build(ObjectiveConfig, config.objective, "objective")
    build(SamplerConfig, config.sampler, "sampler")
    images = build(FlowImageConfig, config.data, "data")
    assert images.in_memory or images.eval_split  # none can be held out of what is read as needed
    assert bool(images.label_key) == (data != "ffhq64")
    assert model == unet.preset(flow_rfpp.RECIPES[data][0])


@pytest.mark.parametrize("size", radd.SIZES)
def test_published_sizes_of_radd(size):
    """The text is not there, but what the config says of it is valid."""
    config = from_dict(radd_openwebtext.get_config(size).to_dict())
    build(radd.RADDConfig, {**config.model, "vocab_size": 50258}, "model")
    build(MaskedObjectiveConfig, config.objective, "objective")
    build(MaskedSamplerConfig, config.sampler, "sampler")
    build(TextConfig, config.data, "data")


@pytest.mark.parametrize("model", ["lightnet", "ar"])
def test_what_is_compared_with_radd(files, model):
    """At about its number of parameters."""
    shapes = []
    for name in ("radd", model):
        config = from_dict(radd_characters.get_config(name).to_dict())
        shapes.append(state_lib.shapes(tasks.build(config), config).params)
    ours, theirs = map(params_lib.count, shapes)
    assert abs(theirs / ours - 1) < 0.05


def test_every_config_file_is_tested(root):
    files = {p.stem for p in (root / "configs").glob("*.py")} - set(NOT_RUNS)
    assert files == {*CONFIGS, *ELSEWHERE}


@pytest.mark.parametrize(
    "size, count", [("tiny", 6_026_740), ("small", 22_816_768), ("base", 88_689_688)]
)
def test_image_classifiers_have_the_sizes_of_deit(size, count):
    """Within 6, 4 and 4 % of DeiT's 5.7, 22 and 86 million; 1,000 classes, 14 x 14 tokens."""
    config = from_dict(lightnet_imagenet.get_config(size).to_dict())
    model = build(LightNetGridConfig, {**config.model, "num_classes": 1000}, "model")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    key = jax.random.key(0)
    shapes = jax.eval_shape(LightNetClassifier(model).init, key, images)["params"]
    assert params_lib.count(shapes) == count
    assert config.num_steps == 375_341
    with pytest.raises(ValueError, match="must be one of tiny, small, base"):
        lightnet_imagenet.get_config("huge")


def test_json_round_trip():
    values = base.get_config("word_problem").to_dict()
    config = from_dict(values)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert not changes(json.loads(json.dumps(to_dict(config))), to_dict(config))


def test_changes_name_the_key_but_pass_over_execution():
    old = base.get_config("word_problem")
    new = base.get_config("word_problem")
    new.optimizer.learning_rate = 1.0
    new.mesh.fsdp = 4
    new.microbatches = 2
    new.log.every_steps = 7
    assert changes(old.to_dict(), new.to_dict()) == ["optimizer.learning_rate: 0.001 -> 1.0"]


def test_missing_and_unknown_keys():
    values = base.get_config("word_problem").to_dict()
    del values["optimizer"]["b1"]
    with pytest.raises(ConfigError, match=r"lacks optimizer\.b1"):
        from_dict(values)
    values = base.get_config("word_problem").to_dict()
    values["optimizer"]["lerning_rate"] = 3.0
    with pytest.raises(ConfigError, match=r"did you mean 'optimizer\.learning_rate'"):
        from_dict(values)


def test_types():
    values = base.get_config("word_problem").to_dict()
    for key, value in (("num_steps", 1.5), ("num_steps", True), ("optimizer", 3), ("task", 1)):
        with pytest.raises(ConfigError, match=key):
            from_dict({**values, key: value})
    assert from_dict({**values, "seed": 3}).seed == 3


def test_nearest_name_at_every_level():
    known = ["model.hidden_size", "model.num_heads", "optimizer.b1", "seed"]
    assert "did you mean 'model.num_heads'" in unknown_key("modle.num_head", known)
    assert "did you mean 'seed'" in unknown_key("sed", known)
    assert "'model' has model.hidden_size, model.num_heads" in unknown_key("model.zzz", known)


def test_mesh_uses_the_devices_that_are_left():
    config = mesh_lib.MeshConfig(data=-1, fsdp=2, tensor=1, expert=1, sequence=1)
    assert mesh_lib.make_mesh(config).shape["data"] == 2
    with pytest.raises(ValueError, match="at most one"):
        mesh_lib.MeshConfig(data=-1, fsdp=-1, tensor=1, expert=1, sequence=1)
    with pytest.raises(ValueError, match="does not divide"):
        mesh_lib.make_mesh(mesh_lib.MeshConfig(data=-1, fsdp=3, tensor=1, expert=1, sequence=1))
