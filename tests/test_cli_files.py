"""Checkpoints and data of `sam-optim`: every form that they come in, and nothing in them that is run."""

import argparse
import gzip
import hashlib
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import entries, images, network, run
from PIL import Image
from torch import nn

from sam_optim import Loss
from sam_optim.cli import options
from sam_optim.core import errors
from sam_optim.core.errors import InputError
from sam_optim.sweep import problems
from sam_optim.sweep.processes import started
from sam_optim.vision import checkpoints, data, models, tensor_files, weights
from sam_optim.vision.preprocessing import Preprocessing, described

pytest.importorskip("timm")
pytest.importorskip("safetensors")
import timm
from timm.data import create_transform, resolve_model_data_config


def saved(form, path, model, other):
    """A checkpoint of the model in some form; `other` stands where it must not be taken from."""
    own, ema = model.state_dict(), other.state_dict()

    def under(prefix, state):
        return {prefix + k: v for k, v in state.items()}

    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(own, path / "c.safetensors")
        return path / "c.safetensors"
    if form == "hugging face":
        from safetensors.torch import save_file

        names = sorted(own)
        for i, part in enumerate((names[:2], names[2:])):
            save_file({k: own[k] for k in part}, path / f"model-{i}.safetensors")
        index = {k: f"model-{int(k not in names[:2])}.safetensors" for k in names}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return path
    if form == "run of the benchmarks":
        (path / "config.json").write_text(json.dumps({"options": {"model": "cnn3"}}))
        (path / "checkpoints").mkdir()
        for state in ({"step": 1, "model": ema, "ema": None}, {"step": 12, "model": own, "ema": ema}):
            torch.save(state, buffer := io.BytesIO())
            name = f"checkpoint-{state['step']:09d}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.pt"
            (path / "checkpoints" / name).write_bytes(buffer.getvalue())
        return path
    timm_own = {"state_dict": own, "state_dict_ema": ema, "epoch": 1, "arch": "x", "optimizer": {"state": {}}}
    content = {
        "plain": own,
        "model": {"model": own, "ema": ema},
        "timm": timm_own | {"args": argparse.Namespace(lr=0.1, model="x")},
        "DataParallel": under("module.", own),
        "compiled": {"state_dict": under("_orig_mod.", own)},
        "compiled in DDP": under("module._orig_mod.", own),
        "Lightning": {
            "pytorch-lightning_version": "2.0",
            "state_dict": under("model.", own) | {"metric.total": torch.zeros(1), "teacher.0.weight": torch.ones(3)},
            "hyper_parameters": {"lr": 0.1},
        },
        "compiled in Lightning": {"state_dict": under("net._orig_mod.", own) | {"loss.weight": torch.ones(10)}},
        "average beside it": {"state_dict": under("net.", own) | under("ema.", other.state_dict())},
        "metrics of NumPy": {"state_dict": own, "metric": np.float64(0.9), "best": np.int64(3)},
        "averaged": under("module.", own) | {"n_averaged": torch.tensor(3)},
    }[form]
    torch.save(content, path / "c.ckpt")
    return path / "c.ckpt"


FORMS = ["plain", "model", "timm", "DataParallel", "compiled", "compiled in DDP", "Lightning", "compiled in Lightning"]
FORMS += ["average beside it", "metrics of NumPy", "averaged", "safetensors", "hugging face", "run of the benchmarks"]


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_any_form_gives_the_weights_that_were_saved(form, tmp_path):
    model, other, loaded = network(0), network(1), network(2)
    (checkpoint,) = checkpoints.find([str(saved(form, tmp_path, model, other))])
    weights.load_(loaded, checkpoints.read(checkpoint).state, checkpoint.name)
    for (name, w), v in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(w, v), name


@pytest.mark.parametrize("form", ["model", "timm", "run of the benchmarks"])
def test_averaged_weights_are_taken_when_asked_for(form, tmp_path):
    model, other, loaded = network(0), network(1), network(2)
    (checkpoint,) = checkpoints.find([str(saved(form, tmp_path, model, other))])
    weights.load_(loaded, checkpoints.read(checkpoint, ema=True).state, "")
    assert torch.equal(loaded[0].weight, other[0].weight)


def test_averaged_weights_that_are_not_there_are_an_error(tmp_path):
    path = saved("plain", tmp_path, network(0), network(1))
    with pytest.raises(InputError, match=r"has no averaged weights .*leave --ema out"):
        checkpoints.read(checkpoints.find([str(path)])[0], ema=True)


def test_two_models_in_one_file_are_an_error_and_neither_is_taken(tmp_path):
    student, teacher = network(0).state_dict(), network(1).state_dict()
    both = {f"student.{k}": w for k, w in student.items()} | {f"teacher.{k}": w for k, w in teacher.items()}
    with pytest.raises(InputError, match=r"2 times, under student\., teacher\.: choose one with --key"):
        weights.load_(network(2), both, "c.pt")


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "is empty;"), (b"hello", "is damaged or no checkpoint of torch: .*; copy it again")]
)
def test_a_file_that_is_no_checkpoint_is_said_in_words(content, says, tmp_path):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(InputError, match=says):
        tensor_files.read_file(tmp_path / "c.pt")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_file_that_needs_more_than_weights_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": network(0).state_dict(), "callback": Harmful(tmp_path / "run")}, tmp_path / "c.pt")
    with pytest.raises(
        InputError, match=r"c\.pt holds more than weights: it refers to \S+mkdir, .*; save the weights"
    ) as e:
        checkpoints.read(checkpoints.find([str(tmp_path / "c.pt")])[0])
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Harmful(tmp_path / "run")))
    with pytest.raises(InputError):
        checkpoints.read(checkpoints.find([str(tmp_path / "old.pt")])[0])
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
def test_data_that_need_more_than_arrays_are_refused_and_not_run(suffix, tmp_path):
    path = tmp_path / f"d{suffix}"
    if suffix == ".npz":
        x = np.empty(2, dtype=object)
        x[:] = [Harmful(tmp_path / "run")] * 2
        np.savez(path, x=x, y=np.zeros(2))
    else:
        torch.save({"x": Harmful(tmp_path / "run"), "y": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=path.name):
        load(path)
    assert not (tmp_path / "run").exists()


DAMAGED = {
    "empty": b"",
    "text": b"hello",
    "cut": None,
    "list": [1, 2],
    "numbers": {"lr": 0.1, "epoch": 3},
    "number": 3.0,
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_line(kind, suffix, tmp_path):
    path, content = tmp_path / f"c{suffix}", DAMAGED[kind]
    if content is None:
        torch.save(network(0).state_dict(), path)
        path.write_bytes(path.read_bytes()[:2000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError) as e:
        checkpoints.read(checkpoints.find([str(path)])[0])
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_run_whose_checkpoint_was_changed_is_refused(tmp_path):
    saved("run of the benchmarks", tmp_path, network(0), network(1))
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes() + b"\0")
    with pytest.raises(InputError, match="is damaged: its SHA-256 begins with"):
        checkpoints.read(checkpoints.find([str(tmp_path)])[0])


class TestFit:
    def test_what_does_not_fit_is_named_with_the_first_three_and_the_remedy(self):
        state = network(0).state_dict()
        wrong = {k.replace("0.", "stem.", 1) if k.startswith("0.") else k: v for k, v in state.items()} | {
            "a": torch.ones(1)
        }
        with pytest.raises(InputError) as e:
            weights.load_(network(1), wrong, "c.pt")
        expected = "c.pt does not fit the model: 2 missing (0.weight, 0.bias); 3 unexpected (stem.weight, stem.bias, a)"
        assert str(e.value).startswith(expected)
        assert "--model" in str(e.value)

    def test_nothing_is_loaded_of_what_does_not_fit(self):
        model = network(1)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(
            InputError, match=r"2 of another shape \(9.weight \(7, 256\) instead of \(10, 256\), 9.bias"
        ):
            weights.load_(model, network(0, num_classes=7).state_dict(), "c.pt")
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))

    @pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_mambaout"])
    def test_the_number_of_classes_is_that_of_the_last_layer(self, name):
        state = {"model." + k: v for k, v in timm.create_model(name, num_classes=7).state_dict().items()}
        with torch.device("meta"):
            assert weights.num_outputs(timm.create_model(name), state) == 7

    def test_a_model_of_as_many_classes_is_built_with_the_options_of_the_command(self, tmp_path):
        path, *_ = images(tmp_path / "d.npz")
        torch.save(network(0, num_classes=12).state_dict(), tmp_path / "c.pt")
        common = ["--model", "cnn3", "--data", path, "--measures", "trace", "--num-probes", 2]
        assert run("measure", tmp_path / "c.pt", *common)[0] == 0
        code, _, err = run("measure", tmp_path / "c.pt", *common, "--num-classes", 10)
        assert code == 1
        assert "(12, 256) instead of (10, 256)" in err
        torch.save(network(0, num_classes=3).state_dict(), tmp_path / "few.pt")
        code, _, err = run("measure", tmp_path / "few.pt", *common)
        assert code == 1
        assert "the data have labels up to 9, " in err

    def test_vits_of_small_images_and_stems_for_them(self, tmp_path):
        """A timm ViT takes the size of the data; --small-stem builds what the benchmarks train on small images; a wide
        ResNet goes by its name."""
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(4, 3, 32, 32, generator=g), torch.arange(4)
        np.savez(tmp_path / "d.npz", x=x, y=y)
        vit = timm.create_model("test_vit", img_size=32, num_classes=5)
        stem = models.build("test_resnet", num_classes=5, image_size=(3, 32, 32))
        wide = models.build("wrn10_1", num_classes=5, image_size=(3, 32, 32))
        cases = (("test_vit", vit, []), ("test_resnet", stem, ["--small-stem"]), ("wrn10_1", wide, []))
        for name, model, flags in cases:
            torch.save(model.state_dict(), tmp_path / "c.pt")
            argv = ["measure", str(tmp_path / "c.pt"), "--model", name, "--data", str(tmp_path / "d.npz"), *flags]
            expected = Loss(model, nn.CrossEntropyLoss(), [(x, y)]).value()
            assert torch.equal(loss_of(argv).value(), expected)


def loss_of(argv):
    """The loss of the first checkpoint of a command."""
    args = options.parse([str(word) for word in argv])
    result = checkpoints.find(args.checkpoints)
    with started("cpu") as here:
        return options.problem(args).open(here, result).loss(result[0])


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
CONFIG = Preprocessing((3, 32, 32), MEAN, STD, interpolation="bicubic")


def load(where, *flags, config=CONFIG, dtype="float32"):
    args = options.parse(["measure", "c", "--model", "x", "--data", str(where), "--dtype", dtype, *map(str, flags)])
    return problems.load_examples(options.problem(args), config)


def inputs(found):
    return torch.cat([x for x, _ in found.batches]), torch.cat([y for _, y in found.batches])


class TestFind:
    def test_files_directories_and_globs_in_natural_order_each_once(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("e-10.pt", "e-9.pt", "x.safetensors", "notes.txt", ".hidden.pt"):
            Path(name).write_bytes(b"")
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / "config.json").write_text("{}")
        (tmp_path / "run" / "checkpoints" / f"checkpoint-{7:09d}-{'0' * 16}.pt").write_bytes(b"")
        assert [c.name for c in checkpoints.find(["."])] == ["e-9.pt", "e-10.pt", "run", "x.safetensors"]
        assert [c.name for c in checkpoints.find(["e-*.pt"])] == ["e-9.pt", "e-10.pt"]
        assert [c.name for c in checkpoints.find(["e-10.pt", "e-*.pt"])] == ["e-10.pt", "e-9.pt"]
        assert checkpoints.find(["run"])[0].files[0].name.startswith("checkpoint-000000007")

    def test_a_file_whose_name_has_brackets(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("run[1].pt").write_bytes(b"")
        assert [c.name for c in checkpoints.find(["run[1].pt"])] == ["run[1].pt"]

    def test_the_parts_of_a_checkpoint_stay_in_its_directory(self, tmp_path):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
        with pytest.raises(InputError, match="outside its directory"):
            checkpoints.find([str(tmp_path)])


class TestArrays:
    @pytest.mark.parametrize("form", [".npz", ".pt", ".safetensors"])
    def test_the_first_examples_in_batches(self, form, tmp_path):
        x, y = torch.randn(10, 5), torch.arange(10)
        path = tmp_path / f"d{form}"
        if form == ".npz":
            np.savez(path, x=x.numpy(), y=y.numpy().astype(np.uint8))
        elif form == ".pt":
            torch.save({"x": x, "y": y}, path)
        else:
            from safetensors.torch import save_file

            save_file({"x": x, "y": y}, path)
        result = load(path, "--examples", 7, "--batch-size", 3, dtype="float64")
        assert [len(b[1]) for b in result.batches] == [3, 3, 1]
        assert torch.equal(inputs(result)[0], x[:7].double())
        assert torch.equal(inputs(result)[1], y[:7])
        assert (result.shape, result.largest) == ((5,), 6)

    def test_pixels_are_scaled_and_normalized(self, tmp_path):
        x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / "d.npz", x=x, y=np.arange(6))
        result = inputs(load(tmp_path / "d.npz"))[0]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        expected = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - mean) / std
        assert torch.equal(result, expected)
        own = inputs(load(tmp_path / "d.npz", "--mean", "0.1", "--std", "0.5"))[0]
        torch.testing.assert_close(own, (torch.from_numpy(x).permute(0, 3, 1, 2) / 255 - 0.1) / 0.5)

    def test_the_checksum_is_of_the_examples_and_not_of_the_file(self, tmp_path):
        images(tmp_path / "a.npz")
        _, x, y = images(tmp_path / "b.npz", num=24)
        torch.save({"x": x, "y": y}, tmp_path / "b.pt")
        same = [load(tmp_path / "a.npz").checksum, load(tmp_path / "b.pt").checksum]
        x[3, 0, 0, 0] += 1e-6
        torch.save({"x": x, "y": y}, tmp_path / "b.pt")
        other = [load(tmp_path / "b.pt").checksum, load(tmp_path / "a.npz", "--examples", 5).checksum]
        other.append(load(tmp_path / "a.npz", "--order", "mixed").checksum)
        assert len({*same}) == 1
        assert len({*same, *other}) == 4

    @pytest.mark.parametrize(
        ("content", "flags", "message"),
        [
            ({"a": torch.ones(2)}, [], "two arrays named x and y, it has a"),
            ({"x": torch.ones(2, 3), "y": torch.ones(3).long()}, [], "one row for each example"),
            ({"x": torch.ones(2, 3), "y": torch.ones(2)}, [], "y must be whole numbers"),
            ({"x": torch.ones(2, 3).byte(), "y": torch.ones(2).long()}, [], "x of uint8 must be images"),
            ({"x": torch.ones(2, 3), "y": torch.ones(2).long()}, ["--mean", "0.5"], "are for pixels"),
            ({"x": torch.ones(2, 3), "y": torch.ones(2).long()}, ["--split", "val"], "has no splits"),
            ({"x": torch.ones(2, 3), "y": torch.ones(2).long()}, ["--image-size", "8"], "are not resized"),
        ],
    )
    def test_what_is_wrong_is_said(self, content, flags, message, tmp_path):
        torch.save(content, tmp_path / "d.pt")
        with pytest.raises(InputError, match=message):
            load(tmp_path / "d.pt", *flags)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """train/ and val/, classes c2 and c10, three images each, 40 x 50."""
    root = tmp_path_factory.mktemp("tree")
    pixels = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("c10", "c2"):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                image = Image.fromarray(pixels.integers(0, 256, (40, 50, 3), dtype=np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


class TestImages:
    @pytest.mark.parametrize("size", [None, 96])
    def test_the_transform_is_that_of_the_models_data_config(self, tree, size):
        model = timm.create_model("test_vit")
        config = resolve_model_data_config(model)
        flags = ["--image-size", size] if size else []
        result, labels = inputs(load(tree, *flags, config=Preprocessing.of_model("test_vit", image_size=size)))
        shape = (3, size, size) if size else config["input_size"]
        transform = create_transform(**config | {"input_size": shape}, is_training=False)
        files = [tree / "train" / c / f"{i}.png" for c in ("c10", "c2") for i in range(3)]
        assert torch.equal(result, torch.stack([transform(Image.open(f).convert("RGB")) for f in files]))
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]

    def test_small_images_are_not_cropped(self, tree):
        result, _ = inputs(load(tree))
        transform = create_transform((3, 32, 32), mean=MEAN, std=STD, crop_pct=1.0, interpolation="bicubic")
        assert torch.equal(result[0], transform(Image.open(tree / "train" / "c10" / "0.png")))

    @pytest.mark.parametrize(
        ("split", "folder"), [(None, "train"), ("train", "train"), ("validation", "val"), ("val", "val")]
    )
    def test_a_split_is_its_folder(self, tree, split, folder):
        result = load(tree, *(["--split", split] if split else []))
        assert result.about["split"] == folder
        assert result.about["examples"] == 6
        assert result.num_classes == 2

    @pytest.mark.parametrize("split", ["test", "training2"])
    def test_a_split_that_is_not_there_is_an_error_and_never_the_whole_tree(self, tree, split):
        with pytest.raises(InputError, match=f"has no folder {split}, only train, val; choose one with --split"):
            load(tree, "--split", split)

    def test_a_tree_without_splits_is_taken_whole_if_none_is_asked_for(self, tree):
        assert load(tree / "val").about["examples"] == 6
        with pytest.raises(InputError, match="has no folder train or training, only c10, c2"):
            load(tree / "val", "--split", "train")

    def test_a_tree_with_only_a_test_folder_has_no_training_examples(self, tree, tmp_path):
        (tmp_path / "test").symlink_to(tree / "val")
        with pytest.raises(InputError, match="has no folder train or training, only test"):
            load(tmp_path)
        assert load(tmp_path, "--split", "test").about["examples"] == 6

    def test_small_images_that_are_enlarged_are_noted(self, tree):
        large = CONFIG.replaced(image_size=224)
        note = load(tree, config=large).notes[1]
        assert "images of 50 pixels are enlarged to 224" in note
        assert "--image-size 50" in note
        assert len(load(tree, "--image-size", 50, config=large).notes) == 1

    def test_the_first_of_a_sorted_folder_are_noted_and_mixed_ones_are_of_all_classes(self, tree):
        first, mixed = load(tree, "--examples", 3), load(tree, "--examples", 3, "--order", "mixed")
        assert "the first 3 of 6 examples have 1 of 2 labels" in first.notes[-1]
        assert set(inputs(mixed)[1].tolist()) == {0, 1}
        assert not any("labels" in note for note in mixed.notes)
        assert torch.equal(inputs(mixed)[0], inputs(load(tree, "--examples", 3, "--order", "mixed"))[0])

    def test_too_many_to_keep_are_decoded_again_in_every_pass(self, tree, monkeypatch):
        kept = load(tree, "--batch-size", 4)
        monkeypatch.setattr(data, "IN_MEMORY", 0)
        streamed = load(tree, "--batch-size", 4)
        assert streamed.checksum == kept.checksum
        assert isinstance(kept.batches, list)
        assert not isinstance(streamed.batches, list)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
        values = [Loss(model, nn.CrossEntropyLoss(), d.batches).value() for d in (kept, streamed)]
        assert torch.equal(*values)
        assert [len(y) for _, y in streamed.batches[1::2]] == [2]

    def test_classes_are_numbered_as_torchvision_does_or_as_a_file_says(self, tmp_path):
        from torchvision.datasets import ImageFolder

        names = ["1", "10", "2", "Zebra", "ant"]
        for name in names:
            (tmp_path / "data" / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
        split = data.open_split(tmp_path / "data")
        assert split.classes == tuple(ImageFolder(tmp_path / "data").classes)
        assert split.labels.tolist() == ImageFolder(tmp_path / "data").targets
        note = load(tmp_path / "data").notes[0]
        assert note == "5 classes, numbered 0 1, 1 10, 2 2, ...; 5 of 5 images"
        numbers = {"1": 0, "2": 1, "10": 2, "ant": 7, "Zebra": 4}
        (tmp_path / "numbers.json").write_text(json.dumps(numbers))
        examples = load(tmp_path / "data", "--class-to-idx", tmp_path / "numbers.json")
        assert inputs(examples)[1].tolist() == [numbers[name] for name in names]
        assert examples.num_classes == 8

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[]", "must hold one JSON object"),
            ('{"c2": 0}', "class folder .*c10 has no number"),
            ('{"c2": 0, "c10": 0}', "each once"),
            ('{"c2": 0, "c10": "1"}', "each once"),
            ('{"c2": 0, "c10": -1}', "each once"),
            ("{", "is not valid JSON"),
        ],
    )
    def test_wrong_numbers_of_classes(self, tree, tmp_path, content, message):
        (tmp_path / "n.json").write_text(content)
        with pytest.raises(InputError, match=message):
            load(tree, "--class-to-idx", tmp_path / "n.json")

    def test_the_folder_above_the_class_folders_is_named(self, tree, tmp_path):
        (tmp_path / "images").symlink_to(tree / "train")
        with pytest.raises(InputError, match=r"has the single folder images, and the classes are in it: give .*images"):
            load(tmp_path)

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_pixels_of_16_bits_are_scaled_and_not_clipped(self, tmp_path, suffix):
        values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
        (tmp_path / "d" / "a").mkdir(parents=True)
        path = tmp_path / "d" / "a" / f"x.{suffix}"
        if suffix == "pgm":  # which Pillow 10 reads but does not write
            path.write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
        else:
            Image.fromarray(values).save(path)
        picture = data.open_split(tmp_path / "d").picture(0, "L")
        assert np.array_equal(np.asarray(picture), np.round(values / 65535 * 255).astype(np.uint8))

    @pytest.mark.parametrize("suffix", ["gif", "webp", "bmp", "JPG", "Tiff"])
    def test_formats_that_timm_leaves_out_are_read(self, tmp_path, suffix):
        (tmp_path / "a").mkdir()
        image = Image.new("RGB", (8, 8), (200, 100, 50))
        image.save(tmp_path / "a" / f"x.{suffix}")
        (tmp_path / "a" / "notes.txt").write_text("no image")
        os.mkfifo(tmp_path / "a" / "y.png")
        split = data.open_split(tmp_path)
        assert len(split) == 1
        assert np.abs(np.asarray(split.picture(0, "RGB")).astype(int) - np.asarray(image)).max() <= 3
        assert load(tmp_path).notes[0].endswith("1 of 1 images; 1 files are no images and were left out")

    @pytest.mark.parametrize("kind", ["animation", "float", "32 bits", "eps"])
    def test_images_whose_meaning_is_not_known_are_refused(self, tmp_path, kind):
        (tmp_path / "a").mkdir()
        path = tmp_path / "a" / ("x.gif" if kind == "animation" else "x.tif")
        if kind == "animation":
            frames = [Image.new("L", (8, 8), i) for i in (0, 200)]
            frames[0].save(path, save_all=True, append_images=frames[1:])
        elif kind == "eps":
            Image.new("RGB", (8, 8)).save(path, format="EPS")
        else:
            Image.fromarray(np.full((8, 8), 70000, np.float32 if kind == "float" else np.int32)).save(path)
        says = {"animation": "2 frames", "float": "floating-point", "32 bits": "32 bits", "eps": "cannot identify"}
        with pytest.raises(InputError, match=rf"cannot read image .*x\.(gif|tif).*{says[kind]}"):
            load(tmp_path)

    def test_an_image_that_cannot_be_read_is_named(self, tree, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x.png").write_bytes(b"no image")
        with pytest.raises(InputError, match=r"cannot read image .*x\.png"):
            load(tmp_path)

    def test_the_classes_of_a_folder_must_be_those_of_the_model(self, tree, tmp_path):
        torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "c.pt")
        code, _, err = run(
            "measure", tmp_path / "c.pt", "--model", "test_resnet", "--data", tree, "--measures", "trace"
        )
        assert code == 1
        assert "the data have 2 classes" in err
        assert "5 outputs" in err

    def test_names_of_timm_need_a_directory_and_an_unknown_one_is_an_error(self, tmp_path):
        with pytest.raises(InputError, match="needs --data-dir"):
            load("torch/cifar10")
        with pytest.raises(InputError, match="timm cannot open data set 'torch/cifar10'"):
            load("torch/cifar10", "--data-dir", tmp_path)
        with pytest.raises(InputError, match="timm cannot open data set 'torch/nothing'"):
            load("torch/nothing", "--data-dir", tmp_path)

    def test_a_folder_by_timms_name_is_never_the_whole_tree(self, tree):
        assert load("imagefolder", "--data-dir", tree, "--split", "val").about["split"] == "val"
        with pytest.raises(InputError, match="has no folder test"):
            load("torch/image_folder", "--data-dir", tree, "--split", "test")


def mnist(raw, *, packed=False, num=4):
    """Files of MNIST's format; pixel (i, 0, 0) of the training images is i, of the test images 100 + i."""
    raw.mkdir(parents=True)
    for part, first in (("train", 0), ("t10k", 100)):
        pixels = np.zeros((num, 28, 28), np.uint8)
        pixels[:, 0, 0] = first + np.arange(num)
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(num, dtype=np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = head + array.tobytes()
            path = raw / f"{part}-{name}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


GREY = Preprocessing((1, 28, 28), MEAN, STD)


class TestPublished:
    @pytest.mark.parametrize("packed", [False, True])
    def test_mnist_in_torchvisions_layout(self, tmp_path, packed):
        mnist(tmp_path / "MNIST" / "raw", packed=packed)
        train, test = load(tmp_path, config=GREY), load(tmp_path, "--split", "test", config=GREY)
        assert (train.about["source"], train.about["split"], test.about["split"]) == ("mnist", "train", "test")
        mean, std = sum(MEAN) / 3, sum(STD) / 3
        for result, first in ((train, 0), (test, 100)):
            x, y = inputs(result)
            assert x.shape == (4, 1, 28, 28)
            torch.testing.assert_close(x[:, 0, 0, 0], ((first + torch.arange(4)) / 255 - mean) / std)
            assert y.tolist() == [0, 1, 2, 3]

    def test_a_model_of_three_channels_sees_grey_images_three_times(self, tmp_path):
        mnist(tmp_path / "raw")
        x, _ = inputs(load(tmp_path, config=CONFIG.replaced(image_size=28)))
        back = x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        torch.testing.assert_close(back[:, 0], back[:, 2])

    def test_several_data_sets_in_one_directory_are_an_error(self, tmp_path):
        mnist(tmp_path / "MNIST" / "raw")
        mnist(tmp_path / "FashionMNIST" / "raw")
        with pytest.raises(InputError, match="holds mnist and fashionmnist: give --data"):
            load(tmp_path, config=GREY)
        assert load(tmp_path / "FashionMNIST", config=GREY).about["source"] == "fashionmnist"

    def test_a_damaged_file(self, tmp_path):
        mnist(tmp_path / "raw")
        path = tmp_path / "raw" / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(InputError, match="is not a file of MNIST"):
            load(tmp_path, config=GREY)

    def test_cifar_in_torchvisions_layout(self, tmp_path):
        root = tmp_path / "cifar-10-batches-py"
        root.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
        for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
            (root / name).write_bytes(pickle.dumps({"data": pixels[i : i + 1], "labels": [i]}))
        for where in (tmp_path, root):
            train, test = load(where), load(where, "--split", "val")
            assert inputs(train)[1].tolist() == [0, 1, 2, 3, 4]
            x, y = inputs(test)
            assert y.tolist() == [5]
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
            expected = (torch.from_numpy(pixels[5].reshape(3, 32, 32)).float() / 255 - mean) / std
            torch.testing.assert_close(x[0], expected)
        with pytest.raises(InputError, match="has the splits train and test, got --split extra"):
            load(tmp_path, "--split", "extra")


def test_a_run_directory_brings_its_model_and_its_pixels_need_a_word(tmp_path):
    saved("run of the benchmarks", tmp_path, network(0), network(1))
    path, x, y = images(tmp_path / "d.npz")
    code, *_ = run(
        "measure", tmp_path, "--data", path, "--measures", "trace", "--num-probes", 2, "--json", tmp_path / "o.json"
    )
    assert code == 0
    assert entries(tmp_path / "o.json")[str(tmp_path), "trace"]["identity"]["loss"]["model"] == "cnn3"
    np.savez(tmp_path / "p.npz", x=(x * 10).to(torch.uint8).numpy(), y=y.numpy())
    code, _, err = run("measure", tmp_path, "--data", tmp_path / "p.npz", "--measures", "trace")
    assert code == 2
    assert "benchmarks.measure" in err


@pytest.mark.parametrize("kind", ["digits", "cifar10", "folder", "folder as its weights know it"])
def test_a_run_of_the_benchmarks_on_its_own_data_has_the_loss_that_it_logged(kind, tmp_path):
    """Normalization, size and crop are those of the run: on the whole test set the loss is that of training's log."""
    from test_data import cifar_files, picture_tree

    from benchmarks.command import read_jsonl
    from benchmarks.train import __main__ as train

    where, more, split = "digits", [], "test"
    if kind == "cifar10":
        where = cifar_files(tmp_path / "data")[0]
    if kind.startswith("folder"):
        where, more, split = picture_tree(tmp_path / "data", size=(90, 80)), ["--img-size", 72], "val"
    if kind != "folder" and kind.startswith("folder"):
        more += ["--mean", 0.3, "--std", 0.4, 0.5, 0.6, "--crop-pct", 0.7, "--interpolation", "bicubic"]
        more += ["--crop-mode", "squash"]
    argv = [
        "--data",
        kind.split()[0],
        *([] if kind == "digits" else ["--data-dir", where]),
        *more,
        "--measures",
        "none",
    ]
    argv += ["--epochs", 1, "--batch-size", 8, "--train-examples", 8, "--out", tmp_path / "run"]
    assert errors.run(train.main, [str(word) for word in argv]) == 0
    logged = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["test_loss"]
    argv = ["measure", tmp_path / "run", "--data", where, "--split", split, "--examples", 0, "--batch-size", 64]
    assert float(loss_of(argv).value()) == pytest.approx(logged, rel=1e-5)


def test_a_note_where_a_run_was_trained_on_other_examples_than_those_of_the_data(tmp_path):
    from benchmarks.train import __main__ as train

    argv = ["--train-examples", "64", "--label-noise", "0.2", "--epochs", "1", "--measures", "none"]
    assert errors.run(train.main, [*argv, "--out", str(tmp_path / "run")]) == 0
    argv = ["measure", tmp_path / "run", "--measures", "gradient_regret", "--examples", 16, "--batch-size", 8, "--data"]
    code, _, err = run(*argv, "digits")
    assert code == 0
    assert "note: the examples are those of --data, and not the runs' own" in err
    assert "trained with --train-examples, --label-noise; python -m benchmarks.measure RUN_DIR takes those" in err
    path, *_ = images(tmp_path / "d.npz")
    for where in (["digits", "--split", "test"], [path]):  # no run trains on its test set; a file has what was chosen
        code, _, err = run(*argv, *where)
        assert code == 0
        assert "note: the examples" not in err
        assert err.count("note: ") == 1


def treatment(*argv, run_dir=None):
    """What the notes say is done to an image, and the batches."""
    with started("cpu") as here:
        args = options.parse(["measure", str(run_dir or "c"), *map(str, argv)])
        rows = checkpoints.find([str(run_dir)]) if run_dir else [checkpoints.Checkpoint("c", ())]
        losses = options.problem(args).open(here, rows)
        return losses.notes[-1], losses.data


def test_the_notes_say_what_is_done_to_images_and_who_says_so(tree, tmp_path):
    from torchvision.transforms import v2
    from torchvision.transforms.functional import InterpolationMode

    imagenet = "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    note, examples = treatment("--model", "resnet18", "--data", tree, "--split", "val")
    assert note == (
        "images are resized to cover 235 x 235 pixels (bicubic) and cropped to 224 x 224 in the middle "
        f"(crop_pct 0.95), {imagenet}: timm's for resnet18; --mean, --std, --image-size, --crop-pct take others"
    )
    as_said = v2.Compose([
        v2.Resize(235, InterpolationMode.BICUBIC), v2.CenterCrop(224),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    first = sorted((tree / "val").glob("*/*"))[0]
    torch.testing.assert_close(examples.batches[0][0][0], as_said(Image.open(first).convert("RGB")), rtol=0, atol=1e-6)

    note, _ = treatment("--model", "cnn3", "--data", tree, "--split", "val", "--image-size", 32, "--std", 0.5)
    assert note == (
        "images are resized to cover 32 x 32 pixels (bicubic) and cropped to 32 x 32 in the middle "
        "(crop_pct 1; up to 64 pixels nothing more is cut off), mean 0.485 0.456 0.406, std 0.5 0.5 0.5: as --std and "
        "--image-size say, the rest timm's defaults, which know nothing of cnn3; --mean, --crop-pct take others"
    )
    pixels = torch.arange(2 * 3 * 64).view(2, 3, 8, 8).to(torch.uint8)
    np.savez(tmp_path / "p.npz", x=pixels.numpy(), y=np.array([0, 1]))
    note, examples = treatment("--model", "resnet18", "--data", tmp_path / "p.npz", "--mean", 0.25)
    assert note == (
        "pixels are divided by 255, not resized or cropped, mean 0.25 0.25 0.25, std 0.229 0.224 0.225: as --mean "
        "says, the rest timm's for resnet18; --std take others"
    )
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(examples.batches[0][0], (pixels / 255 - 0.25) / std)
    path, *_ = images(tmp_path / "d.npz")
    assert treatment("--model", "cnn3", "--data", path)[0] == "x is taken as it is"
    assert "mean and std of the training half" in treatment("--model", "cnn3", "--data", "digits")[0]
    squash = Preprocessing((3, 40, 60), crop_pct=0.8, crop_mode="squash")
    assert "resized whatever their proportions to 50 x 75 pixels (bilinear) and" in described(squash.arguments())


def test_the_pixels_of_a_run_are_said_to_be_those_of_the_run(tmp_path):
    saved("run of the benchmarks", tmp_path, network(0), network(1))
    pixels = {"image_size": [3, 8, 8], "preprocessing": {"mean": [0.1], "std": [0.2]}}
    (tmp_path / "config.json").write_text(json.dumps({"options": {"model": "cnn3"}, "data": pixels}))
    x = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    np.savez(tmp_path / "p.npz", x=x.numpy(), y=np.zeros(4, dtype=int))
    note, _ = treatment("--data", tmp_path / "p.npz", run_dir=tmp_path)
    assert "mean 0.1 0.1 0.1, std 0.2 0.2 0.2: those of the runs' config.json; --mean, --std take others" in note


def test_runs_that_do_not_say_how_they_see_pixels_need_a_word():
    assert Preprocessing.of_run({"image_size": [3, 32, 32]}) is None  # of an older version
    assert Preprocessing.of_run({"image_size": [1, 8, 8], "preprocessing": {}}) is None  # digits
