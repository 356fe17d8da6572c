"""Data sets, models and batches of the benchmarks."""

from __future__ import annotations

import gc
import gzip
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import evaluate, measure
from benchmarks.train import __main__ as train
from benchmarks.train import data, options, recipe, trained
from benchmarks.train.batches import Augment, MemoryBatches, batches, shift_and_mirror
from benchmarks.train.options import Options
from benchmarks.train.order import Loading, Order
from sam_optim.core import errors, files
from sam_optim.core.errors import InputError
from sam_optim.core.random import Stream
from sam_optim.vision import cifar, models
from sam_optim.vision.data import Split
from sam_optim.vision.preprocessing import Preprocessing

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def load(name: str, directory: Path | None = None, **options: object) -> data.Splits:
    """The splits of a run with these options."""
    return data.load(Options(data=name, data_dir=None if directory is None else str(directory), **options))


def picture_tree(root: Path, *, classes=("cat", "dog"), splits=("train", "val"), n=4, size=(16, 16)) -> Path:
    """A tree of class folders of random images."""
    draw = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def cifar_files(root: Path, n: int = 20) -> tuple[Path, np.ndarray]:
    """torchvision's layout with random pixels; returns the training pixels (5 n, 3072) too."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    draw, pixels = np.random.default_rng(0), []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        x = draw.integers(0, 256, (n, 3072), dtype=np.uint8)
        pixels.append(x)
        labels = [int(i) for i in draw.integers(0, 10, n)]
        (folder / name).write_bytes(pickle.dumps({"data": x, "labels": labels}, protocol=2))
    return root, np.concatenate(pixels[:5])


class TestOtherLabels:
    @staticmethod
    def load(root, **arrays):
        np.savez(root / "labels.npz", **arrays)
        return load("cifar10", root, train_labels=f"{root / 'labels.npz'}:human", train_examples=60, seed=1)

    def test_training_sees_them_and_nothing_else_does(self, tmp_path):
        root, _ = cifar_files(tmp_path)
        plain = load("cifar10", root)
        clean = plain.train.labels
        human = (clean + 1) % 10
        found = self.load(root, human=human.numpy().astype(np.uint8), clean_label=clean.numpy())
        usual = load("cifar10", root, train_examples=60, seed=1)
        assert torch.equal(found.train.x, usual.train.x)
        assert torch.equal(found.train.labels, (usual.train.labels + 1) % 10)
        assert torch.equal(found.clean_train_labels, usual.train.labels)
        assert torch.equal(found.test.labels, usual.test.labels)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"others": np.zeros(100, np.int64)}, "unknown array of .* 'human'; choose from others"),
            ({"human": np.zeros(99, np.int64)}, r"must hold 100 integers, got torch.int64 of shape \(99,\)"),
            ({"human": np.zeros(100)}, "must hold 100 integers, got torch.float64"),
            ({"human": np.full(100, 10)}, "labels from 0 to 9, got 10 to 10"),
            ({"human": np.zeros(100, np.int64), "clean_label": np.full(100, 3)}, "in another order"),
        ],
    )
    def test_labels_that_do_not_fit_are_refused(self, tmp_path, arrays, message):
        root, _ = cifar_files(tmp_path)
        with pytest.raises(InputError, match=message):
            self.load(root, **arrays)

    def test_wrong_words_are_refused(self, tmp_path):
        root, _ = cifar_files(tmp_path)
        with pytest.raises(InputError, match=r"FILE\.npz:ARRAY, got 'human'"):
            load("cifar10", root, train_labels="human")
        with pytest.raises(InputError, match=r"none\.npz"):
            load("cifar10", root, train_labels=f"{root}/none.npz:human")
        (root / "bad.npz").write_bytes(b"no archive")
        with pytest.raises(InputError, match=r"is not an \.npz file of labels"):
            load("cifar10", root, train_labels=f"{root}/bad.npz:human")
        with pytest.raises(InputError, match="leave --label-noise out"):
            load("cifar10", root, train_labels="x.npz:y", label_noise=0.1)


class TestDigits:
    def test_the_split_is_scikit_learns_example(self):
        from sklearn.datasets import load_digits

        splits = load("digits")
        assert splits.image_size == (1, 8, 8)
        assert splits.num_classes == 10
        assert splits.validation is None
        target = torch.tensor(load_digits().target)
        assert torch.equal(splits.train.labels, target[:898])
        assert torch.equal(splits.test.labels, target[898:])
        x = splits.train.x
        assert x.shape == (898, 1, 8, 8)
        assert x.dtype == torch.float32
        assert abs(x.mean().item()) < 1e-5
        assert abs(x.std().item() - 1) < 1e-5

    @pytest.mark.parametrize("fraction", [0.0, 0.2, 0.4, 1.0])
    def test_exactly_that_fraction_is_drawn_anew_and_only_in_training(self, fraction):
        splits = load("digits", label_noise=fraction, seed=3, validation_fraction=0.1)
        clean = load("digits", seed=3, validation_fraction=0.1)
        assert len(splits.train) == 808
        assert len(splits.validation) == 90
        assert torch.equal(splits.test.labels, clean.test.labels)
        assert torch.equal(splits.validation.labels, clean.validation.labels)
        assert torch.equal(splits.clean_train_labels, clean.train.labels)
        wrong = int((splits.train.labels != splits.clean_train_labels).sum())
        drawn = round(fraction * 808)
        assert wrong <= drawn
        four_sd = 4 * (0.9 * 0.1 * drawn) ** 0.5  # a uniform draw hits the old label 1 time in 10
        assert abs(wrong - 0.9 * drawn) <= four_sd

    def test_the_draw_depends_on_the_seed_alone(self):
        one = load("digits", label_noise=0.4, seed=1).train.labels
        torch.manual_seed(5)
        assert torch.equal(one, load("digits", label_noise=0.4, seed=1).train.labels)
        assert not torch.equal(one, load("digits", label_noise=0.4, seed=2).train.labels)

    def test_noise_replaces_exactly_the_chosen(self):
        labels = torch.full((1000,), -1)
        assert int((data.noisy(labels, 10, 0.137, 0) >= 0).sum()) == 137

    @pytest.mark.parametrize("options", [{"label_noise": 1.2}, {"validation_fraction": 1.0}])
    def test_bad_fractions(self, options):
        with pytest.raises(InputError, match="must be in"):
            load("digits", **options)


class TestBatches:
    def test_every_example_once_in_an_order_of_seed_and_epoch(self):
        numbers = torch.arange(10)
        examples = data.Examples(Split("arrays", None, numbers, numbers[:, None, None, None].float()), "L")
        shuffled = MemoryBatches(
            examples, Order(10, 4, shuffle=True, loading=Loading(seed=1)), Preprocessing((1, 1, 1))
        )
        first = torch.cat([y for _, y in shuffled])
        assert sorted(first.tolist()) == list(range(10))
        assert len(shuffled) == 3
        shuffled.set_epoch(1)
        second = torch.cat([y for _, y in shuffled])
        assert not torch.equal(first, second)
        shuffled.set_epoch(1, first_batch=1)
        assert torch.equal(torch.cat([y for _, y in shuffled]), second[4:])
        assert all(torch.equal(x.flatten(), y.float()) for x, y in shuffled)

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        splits = load("digits", label_noise=0.5)
        list(batches(splits.train, 64, splits.preprocessing, train=True))
        assert torch.equal(torch.get_rng_state(), before)

    def test_shift_is_a_crop_of_the_padded_image(self):
        """Every result must be one of the 81 crops of the padded image, or the mirror image of one."""
        pixels = torch.randint(1, 256, (20, 3, 32, 32), dtype=torch.uint8)
        moved = shift_and_mirror(pixels, 0.5, Stream(0))
        padded = torch.nn.functional.pad(pixels, (4,) * 4)
        mirrored = 0
        for image, whole in zip(moved, padded, strict=True):
            crops = [whole[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
            plain = any(torch.equal(image, c) for c in crops)
            flipped = any(torch.equal(image, c.flip(-1)) for c in crops)
            assert plain or flipped
            mirrored += flipped
        assert 0 < mirrored < 20


class TestCifar:
    def test_torchvisions_layout(self, tmp_path):
        root, pixels = cifar_files(tmp_path)
        splits = load("cifar10", root)
        assert (len(splits.train), len(splits.test), splits.image_size) == (100, 20, (3, 32, 32))
        image, _ = splits.train[3]
        assert np.array_equal(np.asarray(image), pixels[3].reshape(3, 32, 32).transpose(1, 2, 0))
        x = next(iter(batches(splits.train, 10, splits.preprocessing)))[0][3]
        mean, std = (torch.tensor(s).view(3, 1, 1) for s in cifar.STATISTICS["cifar10"])
        expected = (torch.from_numpy(pixels[3].reshape(3, 32, 32)).float() / 255 - mean) / std
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
        assert "not the files of the published archive" in data.source(Options(data="cifar10", data_dir=str(root)))

    def test_the_folder_itself_may_be_given(self, tmp_path):
        root, _ = cifar_files(tmp_path)
        assert len(load("cifar10", root / "cifar-10-batches-py").train) == 100

    def test_a_hostile_pickle_runs_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        root, _ = cifar_files(tmp_path / "data")

        class Malice:
            def __reduce__(self):
                return os.mkdir, ("harmed",)

        (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Malice()))
        with pytest.raises(InputError, match=r"data_batch_2 is not a CIFAR file .*mkdir"):
            load("cifar10", root)
        assert not (tmp_path / "harmed").exists()

    @pytest.mark.parametrize("damage", ["missing", "cut", "text", "shape"])
    def test_damaged_files(self, tmp_path, damage):
        root, _ = cifar_files(tmp_path)
        path = root / "cifar-10-batches-py" / "data_batch_1"
        if damage == "missing":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:1000])
        elif damage == "text":
            path.write_text("hello")
        else:
            path.write_bytes(pickle.dumps({"data": np.zeros((3, 7), np.uint8), "labels": [0, 1, 2]}))
        with pytest.raises(InputError, match=r"data_batch_1.*unpack the archive again"):
            load("cifar10", root)

    def test_absent_says_what_to_do(self, tmp_path):
        with pytest.raises(InputError, match=r"has no cifar-10-batches-py/: unpack"):
            load("cifar10", tmp_path)


class TestCifarAsPictures:
    """In memory, through PIL: what --aa, --color-jitter and --reprob need."""

    def batches(self, tmp_path, augment, epoch=0, first=0, **options):
        splits = load("cifar10", tmp_path)
        made = batches(
            splits.train, 10, splits.preprocessing, train=True, augment=augment, loading=Loading(3, **options)
        )
        made.set_epoch(epoch, first)
        return list(made)

    def test_without_random_choices_they_are_the_pixels(self, tmp_path):
        """Colour jitter of strength 1e-9 changes no pixel; the shift is one of 81 crops with black borders."""
        _, pixels = cifar_files(tmp_path)
        (x, labels), *_ = self.batches(tmp_path, Augment(color_jitter=1e-9, hflip=0))
        mean, std = (torch.tensor(s).view(3, 1, 1) for s in cifar.STATISTICS["cifar10"])
        shown = ((x * std + mean) * 255).round().to(torch.uint8)
        padded = torch.nn.functional.pad(torch.from_numpy(pixels).view(-1, 3, 32, 32), (4,) * 4)
        every = load("cifar10", tmp_path).train.labels
        for image, label in zip(shown[:3], labels[:3], strict=True):
            places = [(n, i, j) for n in range(100) for i in range(9) for j in range(9)]
            found = [n for n, i, j in places if torch.equal(padded[n, :, i : i + 32, j : j + 32], image)]
            assert len(found) == 1
            assert every[found[0]] == label

    @pytest.mark.parametrize("augment", [Augment(auto_augment="rand-m10-n2"), Augment(erase=1.0)], ids=["aa", "erase"])
    def test_seed_and_epoch_alone_decide(self, tmp_path, augment):
        """The same for workers, for a resume in the middle of the epoch, and other images in the next epoch."""
        cifar_files(tmp_path)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        whole = self.batches(tmp_path, augment, epoch=2)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        for other, first in (
            (self.batches(tmp_path, augment, 2, 4), 4),
            (self.batches(tmp_path, augment, 2, workers=1), 0),
        ):
            assert len(other) == len(whole) - first
            for (x, y), (u, v) in zip(whole[first:], other, strict=True):
                assert torch.equal(x, u)
                assert torch.equal(y, v)
        assert whole[0][0].shape == (10, 3, 32, 32)
        assert not torch.equal(self.batches(tmp_path, augment, 3)[0][0], whole[0][0])

    def test_without_augmentation_they_stay_in_memory(self, tmp_path):
        cifar_files(tmp_path)
        splits = load("cifar10", tmp_path)
        for chosen in ({"train": True}, {"augment": Augment(auto_augment="rand-m10-n2")}):
            assert isinstance(batches(splits.train, 10, splits.preprocessing, **chosen), MemoryBatches)
        off = recipe.augmentation(Options(data="cifar10", aa="rand-m10-n2", no_aug=True))
        assert off is None


class TestFolders:
    def test_classes_sizes_and_labels(self, tmp_path):
        splits = load("folder", picture_tree(tmp_path, size=(24, 16)))
        assert splits.num_classes == 2
        assert splits.image_size == (3, 16, 24)
        assert splits.clean_train_labels.tolist() == [0] * 4 + [1] * 4
        assert len(splits.test) == 8
        assert splits.validation is None

    def test_other_labels_are_in_the_folders_order_and_held_out_images_keep_theirs(self, tmp_path):
        root = picture_tree(tmp_path, size=(24, 16))
        np.savez(root / "labels.npz", human=np.array([1, 0, 0, 0, 1, 1, 0, 1]), clean_label=np.repeat([0, 1], 4))
        splits = load("folder", root, train_labels="labels.npz:human", validation_fraction=0.25)
        human, kept = torch.tensor([1, 0, 0, 0, 1, 1, 0, 1]), splits.train.rows
        assert torch.equal(splits.train.labels, human[kept])
        assert torch.equal(splits.validation.labels, (splits.validation.rows >= 4).long())

    def test_val_and_test_are_validation_and_test(self, tmp_path):
        splits = load("folder", picture_tree(tmp_path, splits=("train", "val", "test")))
        assert len(splits.validation) == len(splits.test) == 8

    def test_large_images_get_the_models_size(self, tmp_path):
        root = picture_tree(tmp_path, size=(80, 80), n=1)
        assert load("folder", root, model="test_resnet").image_size == (3, 160, 160)
        assert load("folder", root, img_size=48).image_size == (3, 48, 48)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_augmentation_depends_on_seed_and_epoch_only(self, tmp_path, workers):
        splits = load("folder", picture_tree(tmp_path))

        def epoch(number: int, workers: int) -> torch.Tensor:
            augment = Augment(auto_augment="rand-m9-mstd0.5", erase=0.5)
            options = {"train": True, "augment": augment, "loading": Loading(3, workers)}
            pictures = batches(splits.train, 4, splits.preprocessing, **options)
            pictures.set_epoch(number)
            return torch.cat([x for x, _ in pictures])

        state = torch.get_rng_state()
        first = epoch(1, workers)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        assert torch.equal(first, epoch(1, 0))
        assert not torch.equal(first, epoch(2, 0))

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("no train", "has no folder train"),
            ("no test", "has no folder val"),
            ("empty class", "bird has no images"),
            ("other classes", "do not have the same classes: dog"),
            ("no classes", "has no class folders"),
        ],
    )
    def test_wrong_trees(self, tmp_path, fault, message):
        picture_tree(tmp_path)
        if fault == "no train":
            (tmp_path / "train").rename(tmp_path / "training images")
        elif fault == "no test":
            (tmp_path / "val").rename(tmp_path / "holdout")
        elif fault == "empty class":
            (tmp_path / "train" / "bird").mkdir()
        elif fault == "other classes":
            (tmp_path / "val" / "dog").rename(tmp_path / "val" / ".dog")
        else:
            (tmp_path / "train").rename(tmp_path / "old")
            (tmp_path / "train").mkdir()
        with pytest.raises(InputError, match=message):
            load("folder", tmp_path)

    @pytest.mark.parametrize(("fault", "workers"), [("cut", 0), ("empty", 0), ("text", 0), ("huge", 0), ("cut", 1)])
    def test_unreadable_images_are_named_never_replaced(self, tmp_path, monkeypatch, fault, workers):
        splits = load("folder", picture_tree(tmp_path))
        bad = tmp_path / "train" / "dog" / "2.png"
        if fault == "huge":
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
        else:
            bad.write_bytes({"cut": bad.read_bytes()[:300], "empty": b"", "text": b"not an image"}[fault])
        with pytest.raises(InputError, match=r"cannot read image .*(cat/0|dog/2)\.png.*replace or remove it"):
            list(batches(splits.train, 4, splits.preprocessing, loading=Loading(workers=workers)))

    @pytest.mark.parametrize("mode", ["L", "CMYK", "I;16", "P", "RGBA", "1"])
    def test_other_modes_are_converted(self, tmp_path, mode):
        splits = load("folder", picture_tree(tmp_path))
        suffix = "tif" if mode == "CMYK" else "png"
        (tmp_path / "train" / "cat" / "0.png").unlink()
        Image.new(mode, (16, 16)).save(
            tmp_path / "train" / "cat" / "0.png", format="TIFF" if suffix == "tif" else "PNG"
        )
        x, _ = next(iter(batches(splits.train, 4, splits.preprocessing)))
        assert x.shape == (4, 3, 16, 16)


def test_timms_torchvision_data_sets(tmp_path):
    """torchvision checks the md5 sums of CIFAR, so that random files are refused, in one line."""
    cifar_files(tmp_path)
    with pytest.raises(InputError, match=r"timm cannot open data set 'torch/cifar10'"):
        load("torch/cifar10", tmp_path)


def shards(root: Path, *, num: int = 4, each: int = 6, splits=("train", "validation")) -> Path:
    """A WebDataset of grey images in two classes, with the _info.json that timm reads; the grey tells the number."""
    import io
    import json
    import tarfile

    root.mkdir(parents=True)
    info: dict = {"splits": {}}
    for split in splits:
        names = [f"{split}-{i:02d}.tar" for i in range(num)]
        for shard, name in enumerate(names):
            with tarfile.open(root / name, "w") as tar:
                for i in range(each):
                    k = shard * each + i
                    pixels = np.full((16, 16, 3), 5 * k, np.uint8)
                    file = io.BytesIO()
                    Image.fromarray(pixels).save(file, "PNG")
                    for suffix, content in (("png", file.getvalue()), ("cls", str(k % 2).encode())):
                        member = tarfile.TarInfo(f"{split}{k:05d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        lengths = [each] * num
        entry = {"name": split, "num_samples": num * each, "filenames": names, "shard_lengths": lengths}
        info["splits"][split] = entry
    (root / "_info.json").write_text(json.dumps(info))
    return root


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves a shard open where one stops
class TestStreams:
    @pytest.fixture(autouse=True)
    def closed(self):
        yield
        gc.collect()

    def numbers(self, batches) -> list[int]:
        """Which images came, from their grey."""
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        mean, std = IMAGENET_DEFAULT_MEAN[0], IMAGENET_DEFAULT_STD[0]
        return [round(float(x[0, 0, 0] * std + mean) * 255 / 5) for batch, _ in batches for x in batch]

    def splits(self, root):
        pytest.importorskip("webdataset")
        return load("wds/pictures", shards(root), num_classes=2, img_size=16)

    def test_evaluation_sees_every_example_once_with_its_label(self, tmp_path):
        splits = self.splits(tmp_path / "d")
        assert len(splits.test) == 24
        seen = list(batches(splits.test, 5, splits.preprocessing))
        assert self.numbers(seen) == list(range(24))
        assert torch.cat([y for _, y in seen]).tolist() == [k % 2 for k in range(24)]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_epoch_is_a_function_of_the_seed_and_can_be_resumed(self, tmp_path, workers):
        splits = self.splits(tmp_path / "d")
        options = {"train": True, "augment": Augment(), "loading": Loading(3, workers)}
        stream = batches(splits.train, 4, splits.preprocessing, **options)
        epochs = []
        for epoch in (0, 1, 0):
            stream.set_epoch(epoch)
            epochs.append(list(stream))
            assert len(epochs[-1]) == len(stream) == 6
        for (a, _), (b, _) in zip(epochs[0], epochs[2], strict=True):
            assert torch.equal(a, b)
        assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(epochs[0], epochs[1], strict=True))
        stream.set_epoch(1, first_batch=4)
        rest = list(stream)
        assert len(rest) == 2
        for (a, x), (b, y) in zip(rest, epochs[1][4:], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(x, y)

    def test_a_run_trains_stops_and_goes_on(self, tmp_path, monkeypatch):
        from test_train import assert_same_run, run, stop_at

        pytest.importorskip("webdataset")
        root = shards(tmp_path / "d")
        argv = ["--data", "wds/pictures", "--data-dir", root, "--num-classes", "2", "--img-size", "16"]
        argv += ["--model", "test_resnet", "--batch-size", "4", "--epochs", "2", "--sam-rho", "0.05"]
        argv += ["--measures", "none"]
        assert run(*argv, "--out", tmp_path / "whole") == 0
        with monkeypatch.context() as patch:
            stop_at(patch, 9, signal.SIGTERM)
            assert run(*argv, "--out", tmp_path / "cut") == 143
        assert run("--out", tmp_path / "cut", "--resume") == 0
        assert_same_run(tmp_path / "whole", tmp_path / "cut")

    def test_what_a_stream_cannot_do(self, tmp_path):
        pytest.importorskip("webdataset")
        root = shards(tmp_path / "d")
        with pytest.raises(InputError, match="give --num-classes"):
            load("wds/pictures", root)
        with pytest.raises(InputError, match="a stream has no numbers"):
            load("wds/pictures", root, num_classes=2, label_noise=0.1)


@pytest.mark.slow
def test_mnist_by_timms_name(tmp_path):
    archive = SHARED / "MNIST" / "raw"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in archive.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    splits = load("torch/mnist", tmp_path, label_noise=0.1)
    assert (len(splits.train), len(splits.test)) == (60_000, 10_000)
    assert splits.image_size == (1, 28, 28)
    x, _ = next(iter(batches(splits.train, 8, splits.preprocessing, train=True, augment=Augment(hflip=0))))
    assert x.shape == (8, 1, 28, 28)


@pytest.mark.slow
def test_cifar_files_made_from_the_jpegs(tmp_path):
    """torchvision's layout written by the data's own script, against the images themselves."""
    if not (SHARED / "unpack.py").exists():
        pytest.skip(f"{SHARED / 'unpack.py'} is not there")
    for layout in (["--layout", "batches"], ["--subset", "1,1", "--test-name", "test"]):
        subprocess.run([sys.executable, SHARED / "unpack.py", "cifar10", tmp_path, *layout], check=True)
    splits = load("cifar10", tmp_path)
    assert splits.train.labels.bincount().tolist() == [5000] * 10
    image = np.asarray(Image.open(tmp_path / "test" / "airplane" / "0000.jpg")).transpose(2, 0, 1)
    assert np.array_equal(splits.test.x[0].numpy(), image)


@pytest.mark.parametrize("name", ["cifar11", "imagnet"])
def test_unknown_data_sets_list_the_choices(tmp_path, name):
    with pytest.raises(InputError, match=r"unknown data set .*digits.*folder"):
        load(name, tmp_path)


class TestModels:
    def test_small_images_get_the_stem_of_the_field(self):
        model = models.build("resnet18", num_classes=10, image_size=(3, 32, 32))
        assert model.conv1.kernel_size == (3, 3)
        assert model.conv1.stride == (1, 1)
        assert isinstance(model.maxpool, nn.Identity)
        features = model.eval().forward_features(torch.zeros(1, 3, 32, 32))
        assert features.shape == (1, 512, 4, 4)
        assert sum(p.numel() for p in model.parameters()) == 11_173_962  # the ResNet-18 of the CIFAR literature

    def test_large_images_keep_timms(self):
        model = models.build("test_resnet", num_classes=10, image_size=(3, 96, 96))
        assert any(isinstance(m, nn.MaxPool2d) for m in model.modules())

    def test_vision_transformers_get_small_patches(self):
        model = models.build("test_vit", num_classes=10, image_size=(3, 32, 32))
        assert model.patch_embed.patch_size == (4, 4)
        assert model.patch_embed.num_patches == 64

    def test_gray_images(self):
        model = models.build("test_efficientnet", num_classes=10, image_size=(1, 28, 28))
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)

    def test_cnn3(self):
        model = models.build("cnn3", num_classes=10, image_size=(1, 8, 8))
        assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [16, 32, 64]
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)

    def test_a_model_that_cannot_change_its_stem_keeps_it(self, capsys):
        model = models.build("test_coatnet", num_classes=10, image_size=(3, 32, 32))
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert "keeps its own" in capsys.readouterr().err

    def test_unknown_names_list_near_ones(self):
        with pytest.raises(InputError, match=r"unknown model 'resnet19'; choose from .*resnet18"):
            models.build("resnet19", num_classes=10, image_size=(3, 32, 32))

    def test_unknown_options(self):
        with pytest.raises(InputError, match=r"test_resnet cannot be built.*nonsense"):
            models.build("test_resnet", num_classes=10, image_size=(3, 32, 32), nonsense=1)


class TestSome:
    """Files are sorted by class, so that the first examples are all of one."""

    @pytest.mark.parametrize(("total", "num"), [(100, 10), (7, 3), (10, 10), (5, 9), (5, 0), (1, 1)])
    def test_rows_are_evenly_spaced(self, total, num):
        rows = data.spaced(total, num)
        assert len(rows) == min(num or total, total)
        steps = rows.diff()
        assert rows[0] == 0
        assert rows[-1] < total
        assert len(steps) == 0 or int(steps.max() - steps.min()) <= 1

    def test_of_each_kind_of_split(self, tmp_path):
        cifar_files(tmp_path / "cifar")
        tree = picture_tree(tmp_path / "tree", n=6)
        for found in (
            load("digits"),
            load("cifar10", tmp_path / "cifar"),
            load("folder", tree),
        ):
            split = found.test
            some, rows = data.some(split, 4), data.spaced(len(split), 4)
            (x, y), (whole, labels) = (
                [torch.cat(parts) for parts in zip(*batches(s, 16, found.preprocessing), strict=True)]
                for s in (some, split)
            )
            assert torch.equal(x, whole[rows])
            assert torch.equal(y, labels[rows])
            assert data.some(split, 0) is split
            assert data.some(split, len(split)) is split
            assert (data.taken(split, 4), data.taken(split, 0), data.taken(split, 10_000)) == (
                "evenly spaced",
                "all",
                "all",
            )

    def test_a_stream_has_no_numbers(self, tmp_path):
        found = load("wds/", shards(tmp_path / "shards"), num_classes=2)
        assert data.some(found.train, 3) is found.train
        assert data.taken(found.train, 3) == "the first of the stream"

    def test_a_run_on_a_folder_is_measured_and_evaluated_on_all_classes(self, tmp_path, capsys):
        tree, out = picture_tree(tmp_path / "data", n=8), tmp_path / "run"
        argv = ["--data", "folder", "--data-dir", tree, "--epochs", 1, "--batch-size", 8, "--measures", "none"]
        assert errors.run(train.main, [str(o) for o in [*argv, "--out", out]]) == 0
        capsys.readouterr()
        argv = [str(out), "--examples", "6", "--batch-size", "4", "--measures", "worst"]
        assert errors.run(measure.main, argv) == 0
        report = files.read_json(out / "measures.json")
        assert (report["num_examples"], report["which_examples"]) == (6, "evenly spaced")
        run = trained.load(options.of_run(out))
        chosen = data.some(run.splits.train, 6)
        assert chosen.labels.bincount().tolist() == [3, 3]
        with torch.no_grad():
            x, y = next(iter(run.batches(chosen, 6)))
            loss = torch.nn.functional.cross_entropy(run.model.eval()(x), y)
        assert report["loss"] == pytest.approx(float(loss), rel=1e-6)
        capsys.readouterr()
        argv = [str(out), "--corruptions", "fog", "--severities", "1", "--examples", "6"]
        assert errors.run(evaluate.main, argv) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert first == ("Accuracy in per cent on 6 test images, evenly spaced; the damaged images are made here")
        clean = evaluate.Clean(data.some(run.splits.test, 6), run.splits.preprocessing)
        assert [y for _, _, part in clean.parts() for y in part.tolist()] == [0, 0, 0, 1, 1, 1]
        report = files.read_json(out / "corrupted.json")
        assert (report["num_examples"], report["which_examples"]) == (6, "evenly spaced")

    def test_a_run_whose_data_moved_is_measured_and_evaluated_where_they_are_now(self, tmp_path, monkeypatch, capsys):
        tree, out = picture_tree(tmp_path / "data", n=8), tmp_path / "run"
        argv = ["--data", "folder", "--data-dir", tree, "--epochs", 1, "--batch-size", 8, "--measures", "none"]
        assert errors.run(train.main, [str(o) for o in [*argv, "--workers", 1, "--out", out]]) == 0
        config = (out / "config.json").read_bytes()
        moved = tree.rename(tmp_path / "moved")
        seen = []
        monkeypatch.setattr(trained, "batches", lambda *a, **k: seen.append(k["loading"].workers) or batches(*a, **k))
        for main, more in (
            (measure.main, ["--examples", "6", "--measures", "worst", "--workers", "0"]),
            (evaluate.main, ["--examples", "6", "--corruptions", "fog", "--severities", "1"]),
        ):
            assert errors.run(main, [str(out), *more]) == 2
            assert f"--data-dir {tree} is not a directory" in capsys.readouterr().err
            assert errors.run(main, [str(out), *more, "--data-dir", str(moved)]) == 0
        assert seen == [0]
        assert (out / "config.json").read_bytes() == config
