"""Damaged images: what is drawn, how much damage a severity does, and the command that evaluates a run on them."""

from __future__ import annotations

import colorsys
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import poisson
from test_data import cifar_files, load, picture_tree

from benchmarks import command, corruptions, evaluate
from benchmarks.corruptions import KINDS, NAMES, SEVERITIES, STANDARD, Published, corrupted
from benchmarks.train import __main__ as train
from benchmarks.train import options, trained
from benchmarks.train.data import Examples
from sam_optim.core import errors, files
from sam_optim.core.errors import InputError
from sam_optim.vision.data import Split

BLURS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "gaussian_blur")


def scenes(n: int = 24, size: int = 32) -> np.ndarray:
    """Coloured disks and stripes on a shaded ground, with a little texture: (n, size, size, 3) uint8."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size] / size
    result = []
    for _ in range(n):
        ground, disk, stripes = draw.uniform(0.15, 0.8, (3, 3))
        image = ground + 0.2 * (rows + columns - 1)[..., None]
        y, x, radius = draw.uniform(0.3, 0.7, 3)
        image = np.where(((rows - y) ** 2 + (columns - x) ** 2 < (radius / 2) ** 2)[..., None], disk, image)
        wave = np.sin(2 * np.pi * draw.uniform(2, 6) * (rows * draw.normal() + columns)) > 0.8
        image = np.where(wave[..., None], stripes, image) + 0.02 * draw.standard_normal((size, size, 3))
        result.append(np.rint(255 * np.clip(image, 0, 1)))
    return np.stack(result).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the images, in dB."""
    return float(np.mean(10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean(axis=(1, 2, 3)))))


class TestDamage:
    @pytest.mark.parametrize("name", NAMES)
    def test_it_grows_with_the_severity(self, name):
        """motion_blur's fourth level is its third with a longer tail, worth less than 0.01 dB."""
        images = scenes()
        values = [psnr(images, corrupted(images, name, severity)) for severity in SEVERITIES]
        assert all(b < a + 0.01 for a, b in itertools.pairwise(values)), values
        assert values[0] - values[-1] > 1.5, values
        assert values[-1] > 8, values

    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_drawn_depends_on_the_seed_and_the_image_alone(self, name):
        images = scenes(6)
        before, state = images.copy(), np.random.get_state()[1].copy()
        whole = corrupted(images, name, 3, seed=1)
        assert np.array_equal(images, before)
        assert np.array_equal(np.random.get_state()[1], state)
        parts = [corrupted(images[:2], name, 3, seed=1), corrupted(images[2:], name, 3, seed=1, first=2)]
        assert np.array_equal(whole, np.concatenate(parts))
        assert whole.dtype == np.uint8
        drawn = not np.array_equal(whole, corrupted(images, name, 3, seed=2))
        without = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
        assert drawn == (name not in (*without, "gaussian_blur", "saturate"))

    @pytest.mark.parametrize("name", NAMES)
    def test_larger_images_and_such_that_are_not_square(self, name):
        images = scenes(2, size=64)[:, :48]
        assert corrupted(images, name, 5).shape == images.shape

    @pytest.mark.parametrize("name", BLURS)
    def test_a_blur_keeps_a_plain_image_as_it_is(self, name):
        plain = np.full((2, 32, 32, 3), (200, 100, 50), np.uint8)
        assert np.abs(corrupted(plain, name, 5).astype(int) - plain).max() <= 1

    def test_bad_arguments(self):
        images = scenes(1)
        with pytest.raises(InputError, match="unknown corruption 'rain'; choose from brightness"):
            corrupted(images, "rain", 1)
        with pytest.raises(InputError, match="a severity is 1, 2, 3, 4 or 5, got 6"):
            corrupted(images, "fog", 6)
        with pytest.raises(TypeError, match=r"must be uint8 of shape \(n, h, w, 3\), got float64"):
            corrupted(images / 255, "fog", 1)
        assert corrupted(images[:0], "fog", 1).shape == (0, 32, 32, 3)


class TestFormulas:
    """Against the numbers that the names promise."""

    grey = np.full((64, 32, 32, 3), 128, np.uint8)

    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_noise_has_the_variance_of_its_level(self, severity):
        n, x = self.grey.size, 128 / 255
        photons = KINDS["shot_noise"][1][severity - 1]
        counts = np.arange(4 * photons)
        result = (
            np.rint(255 * np.clip(counts / photons, 0, 1)) / 255
        )  # as bytes, whose steps are those of single photons
        chance = poisson.pmf(counts, x * photons)
        expected = {
            "gaussian_noise": KINDS["gaussian_noise"][1][severity - 1],
            "shot_noise": (chance @ result**2 - (chance @ result) ** 2) ** 0.5,
            "speckle_noise": x * KINDS["speckle_noise"][1][severity - 1],
        }
        for name, sigma in expected.items():
            noise = (corrupted(self.grey, name, severity).astype(float) - 128) / 255
            assert noise.std() == pytest.approx(sigma, rel=5 / (2 * n) ** 0.5 + 1e-3), name  # rounding to bytes: 1e-3
        amount = KINDS["impulse_noise"][1][severity - 1]
        result = corrupted(self.grey, "impulse_noise", severity)
        for value in (0, 255):
            assert (result == value).mean() == pytest.approx(amount / 2, abs=5 * (amount / n) ** 0.5)

    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_brightness_and_saturation_are_those_of_hsv(self, severity):
        images = scenes(1, size=8)
        for name in ("brightness", "saturate"):
            level = KINDS[name][1][severity - 1]
            result = corrupted(images, name, severity)
            for pixel, got in zip(images.reshape(-1, 3), result.reshape(-1, 3), strict=True):
                h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
                if name == "brightness":
                    v = min(v + level, 1)
                else:
                    s = min(s * level[0] + level[1], 1)
                assert np.abs(got - 255 * np.array(colorsys.hsv_to_rgb(h, s, v))).max() < 0.51

    def test_grey_stays_grey(self):
        assert np.array_equal(corrupted(self.grey[:1], "saturate", 5), self.grey[:1])
        black = np.zeros((1, 8, 8, 3), np.uint8)
        assert np.unique(corrupted(black, "brightness", 5)).tolist() == [round(0.3 * 255)]

    def test_contrast(self):
        images = scenes(3)
        mean = images.mean(axis=(1, 2), keepdims=True)
        assert np.abs(corrupted(images, "contrast", 2) - (mean + 0.5 * (images - mean))).max() < 0.51

    def test_jpeg_is_pillows(self):
        images = scenes(2)
        file = io.BytesIO()
        Image.fromarray(images[1]).save(file, "JPEG", quality=40)
        assert np.array_equal(corrupted(images, "jpeg_compression", 5)[1], np.asarray(Image.open(file)))

    def test_a_point_is_blurred_along_a_line_whose_angle_is_drawn(self):
        point = np.zeros((40, 33, 33, 3), np.uint8)
        point[:, 16, 16] = 255
        result = corrupted(point, "motion_blur", 5)[..., 0].astype(float)
        rows, columns = np.mgrid[:33, :33] - 16
        weight = result.sum(axis=(1, 2))
        assert weight == pytest.approx(255, rel=0.03)
        down, along = ((result * x).sum(axis=(1, 2)) / weight for x in (rows, columns))
        assert np.all(np.abs(along) > np.abs(down) - 0.5)  # at most 45 degrees from the horizontal
        assert np.ptp(down) > 1
        half_normal = 2.5 * (2 / np.pi) ** 0.5
        assert np.hypot(down, along).mean() == pytest.approx(half_normal, rel=0.2)


class TestPublished:
    def folder(self, root, n=4):
        draw = np.random.default_rng(0)
        root.mkdir()
        images = draw.integers(0, 256, (5 * n, 32, 32, 3), dtype=np.uint8)
        labels = np.tile(draw.integers(0, 10, n, dtype=np.uint8), 5)
        np.save(root / "fog.npy", images)
        np.save(root / "labels.npy", labels)
        return images, labels

    def test_a_severity_is_a_fifth_of_the_file(self, tmp_path):
        images, labels = self.folder(tmp_path / "c")
        result = Published(tmp_path / "c")
        assert result.names == ["fog"]
        for severity in SEVERITIES:
            x, y = result.images("fog", severity)
            assert np.array_equal(x, images[4 * (severity - 1) : 4 * severity])
            assert np.array_equal(y, labels[:4])

    def test_what_is_wrong_with_it_is_said(self, tmp_path):
        with pytest.raises(InputError, match="no folder of CIFAR-10-C"):
            Published(tmp_path)
        self.folder(tmp_path / "c")
        with pytest.raises(InputError, match="unknown corruption 'snow'; choose from fog"):
            Published(tmp_path / "c").images("snow", 1)
        np.save(tmp_path / "c" / "labels.npy", np.zeros(7))
        with pytest.raises(InputError, match=r"labels.npy has shape \(7,\)"):
            Published(tmp_path / "c").images("fog", 1)
        np.save(tmp_path / "c" / "fog.npy", np.array([{}], object), allow_pickle=True)
        with pytest.raises(InputError, match="cannot be read"):
            Published(tmp_path / "c").images("fog", 1)

    def test_labels_are_those_of_the_test_images(self, tmp_path):
        """Files of another data set have labels without an output; in another order they would only look bad."""
        root = cifar_files(tmp_path / "data")[0]
        splits = load("cifar10", root)
        split, shown = splits.test, splits.preprocessing
        labels = split.labels.numpy()
        self.folder(tmp_path / "c", n=len(labels))
        published = Published(tmp_path / "c")
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).eval()
        choices = {"names": ["fog"], "severities": [1], "published": published}
        np.save(tmp_path / "c" / "labels.npy", np.tile(labels, 5))
        assert evaluate.on_corruptions(model, split, shown, **choices)["mean"]["loss"] > 0
        np.save(tmp_path / "c" / "labels.npy", np.tile(labels, 5) + 90)
        with pytest.raises(InputError, match=rf"{tmp_path}/c/labels.npy has labels up to 99, .* up to 9: give"):
            evaluate.on_corruptions(model, split, shown, **choices)
        np.save(tmp_path / "c" / "labels.npy", np.tile(labels[::-1], 5))
        num = int((labels != labels[::-1]).sum())
        with pytest.raises(InputError, match=f"labels.npy differs from the labels of {num} of 20 test images: give"):
            evaluate.on_corruptions(model, split, shown, **choices)
        evaluate.check_labels(
            published, Examples(Split("folder", "test", split.labels, source=[]), "RGB")
        )  # folders have an order of their own


def train_one(tmp_path, *options) -> None:
    argv = ["--model", "test_resnet", "--epochs", "1", "--batch-size", "16", "--measures", "none", *options]
    assert errors.run(train.main, [str(o) for o in [*argv, "--out", tmp_path / "run"]]) == 0


class TestCommand:
    def test_in_memory_images(self, tmp_path, capsys):
        cifar_files(tmp_path / "data")
        train_one(tmp_path, "--data", "cifar10", "--data-dir", tmp_path / "data", "--model-ema", "0.9")
        logged = command.read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
        options = ["--corruptions", "gaussian_noise,fog", "--severities", "1,5"]
        assert errors.run(evaluate.main, [str(tmp_path / "run"), *options]) == 0
        report = files.read_json(tmp_path / "run" / "corrupted.json")
        assert report["clean"]["accuracy"] == logged["test_accuracy"]
        assert report["clean"]["loss"] == pytest.approx(logged["test_loss"], rel=1e-6)
        assert list(report["corrupted"]) == ["fog", "gaussian_noise"]  # sorted in the file
        cells = [cell["loss"] for levels in report["corrupted"].values() for cell in levels.values()]
        assert len(cells) == 4
        assert report["mean"]["loss"] == pytest.approx(sum(cells) / 4)
        assert "gaussian_noise" in capsys.readouterr().out
        assert errors.run(evaluate.main, [str(tmp_path / "run"), *options, "--ema"]) == 0
        assert files.read_json(tmp_path / "run" / "corrupted.json")["clean"]["accuracy"] == logged["ema_test_accuracy"]

    def test_the_accuracy_is_that_of_the_damaged_images(self, tmp_path, monkeypatch):
        """Counted by hand, in one batch, with the normalization written out."""
        cifar_files(tmp_path / "data")
        train_one(tmp_path, "--data", "cifar10", "--data-dir", tmp_path / "data")
        run = trained.load(options.of_run(tmp_path / "run"))
        model, split = run.model, run.splits.test
        monkeypatch.setattr(evaluate, "PASS", 7)
        result = evaluate.on_corruptions(model, split, run.splits.preprocessing, names=["snow"], severities=[4])
        pixels, labels = split.x, split.labels
        damaged = corrupted(pixels.permute(0, 2, 3, 1).numpy(), "snow", 4)
        mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
        x = ((torch.tensor(damaged) / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.no_grad():
            outputs = model.eval()(x)
        cell = result["corrupted"]["snow"]["4"]
        assert cell["loss"] == pytest.approx(torch.nn.functional.cross_entropy(outputs, labels).item(), rel=1e-5)
        assert cell["accuracy"] == pytest.approx((outputs.argmax(1) == labels).float().mean().item())

    def test_image_folders(self, tmp_path):
        tree = picture_tree(tmp_path / "data", n=8, size=(40, 36))
        train_one(tmp_path, "--data", "folder", "--data-dir", tree, "--img-size", "32")
        logged = command.read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
        assert errors.run(evaluate.main, [str(tmp_path / "run"), "--corruptions", "pixelate", "--examples", "0"]) == 0
        report = files.read_json(tmp_path / "run" / "corrupted.json")
        assert report["clean"]["loss"] == pytest.approx(logged["test_loss"], rel=1e-5)
        assert list(report["corrupted"]["pixelate"]) == ["1", "2", "3", "4", "5"]

    def test_a_published_folder(self, tmp_path, capsys):
        cifar_files(tmp_path / "data")
        train_one(tmp_path, "--data", "cifar10", "--data-dir", tmp_path / "data")
        TestPublished().folder(tmp_path / "c")
        options = ["--cifar-c", str(tmp_path / "c"), "--corruptions", "all"]
        assert errors.run(evaluate.main, [str(tmp_path / "run"), *options]) == 0
        report = files.read_json(tmp_path / "run" / "corrupted.json")
        assert list(report["corrupted"]) == ["fog"]
        assert report["source"] == f"files of {tmp_path / 'c'}"
        words = (
            f"Accuracy in per cent on 20 test images; the damaged images are published ones, files of {tmp_path / 'c'}"
        )
        assert words in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--corruptions", "rain"], "unknown corruption 'rain'"),
            (["--corruptions", ","], "names none"),
            (["--severities", "0"], "a severity is"),
            (["--severities", "high"], "--severities: must be numbers from 1 to 5"),
            (["--split", "validation"], "no validation split"),
            (["--ema"], "without --model-ema"),
            (["--examples", "-1"], "must be >= 0"),
            (["--cifar-c", "/nowhere"], "no folder of CIFAR-10-C"),
            (["--cifar-c", "c", "--split", "validation"], "damaged test images"),
        ],
    )
    def test_bad_options(self, tmp_path, monkeypatch, capsys, options, message):
        run = tmp_path / "run"
        monkeypatch.chdir(tmp_path)
        TestPublished().folder(tmp_path / "c")
        assert errors.run(train.main, ["--epochs", "1", "--measures", "none", "--out", str(run)]) == 0
        assert errors.run(evaluate.main, [str(run), *options]) == 2
        assert message in capsys.readouterr().err
        assert not (run / "corrupted.json").exists()

    def test_digits_are_refused(self, tmp_path, capsys):
        run = tmp_path / "run"
        assert errors.run(train.main, ["--epochs", "1", "--measures", "none", "--out", str(run)]) == 0
        assert errors.run(evaluate.main, [str(run)]) == 2
        assert "corruptions are for color images" in capsys.readouterr().err

    def test_no_run(self, tmp_path, capsys):
        assert errors.run(evaluate.main, [str(tmp_path)]) == 2
        assert "is not a run directory" in capsys.readouterr().err


def test_the_standard_ones_are_those_of_the_paper():
    assert len(STANDARD) == 15
    assert len(NAMES) == 19
    assert corruptions.NAMES[15:] == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
