"""Every recipe is read, its options are there, and it runs for an epoch of two steps on tiny models and data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_data import cifar_files, load, picture_tree
from test_train import PICTURES, run
from timm.data import create_transform, resolve_model_data_config

from benchmarks import command, evaluate, finetune_text, measure
from benchmarks.train import data, options
from benchmarks.train.batches import Augment, batches
from sam_optim.core import errors, files
from sam_optim.core.errors import InputError
from sam_optim.vision import cifar, models, wide_resnet
from sam_optim.vision.preprocessing import Preprocessing

RECIPES = sorted((Path(__file__).resolve().parents[1] / "benchmarks" / "recipes").glob("*.yaml"))
TINY = {"resnet18": "test_resnet", "resnet50": "test_resnet", "wrn28_10": "wrn10_1", "cnn": "cnn3"}


FINE_TUNED = ("imagenet_clip_vit_b32_adamw", "imagenet_clip_vit_b32_sam")


def parsed(path: Path, *more: str):
    weights = ["--initial-checkpoint", "w"] if path.stem in FINE_TUNED else []
    return options.parse(["--config", str(path), "--data-dir", "d", *weights, *more])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_says_what_its_name_says(path):
    args = parsed(path)
    kind = path.stem.rpartition("_")[2]
    assert (args.sam_rho > 0) == (kind in ("sam", "asam"))
    assert (args.adaptive is not None) == (kind == "asam")
    assert args.model in path.read_text()
    assert models.build  # the names below are built in the next test
    text = path.read_text()
    assert f"--config benchmarks/recipes/{path.name}" in text
    for line in text.splitlines():
        assert len(line) <= 120
    values = [line for line in text.splitlines() if line and not line.startswith("#")]
    numbers = [line for line in values if line.partition(":")[0] in ("lr", "sam-rho", "weight-decay", "epochs")]
    sourced_above = "All values are" in text or "big_vision" in text or "No published values" in text
    assert sourced_above or all("#" in line for line in numbers), "every number says where it is from"


def runs_by_default(path: Path) -> bool:
    """Those for CIFAR-100 differ from those for CIFAR-10 in a number."""
    return "cifar100" not in path.stem


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if runs_by_default(p) else pytest.mark.slow) for p in RECIPES],
    ids=lambda p: p.stem,
)
def test_a_recipe_runs(path, tmp_path):
    tree = picture_tree(tmp_path / "data", n=8)
    args = parsed(path)
    model = TINY.get(args.model, "test_vit")
    more = ["--model", model, "--data", "folder", "--data-dir", tree, "--batch-size", "8", "--epochs", "1"]
    more += ["--warmup-epochs", "0", "--img-size", "32", "--workers", "0", "--measures", "none"]
    if path.stem in FINE_TUNED:
        more += ["--initial-checkpoint", TestInitialCheckpoint().saved(tmp_path)[1]]
    assert run("--config", path, *more, "--out", tmp_path / "run") == 0
    config = files.read_json(tmp_path / "run" / "config.json")
    for key in ("lr", "weight_decay", "sam_rho", "adaptive", "opt", "clip_grad", "smoothing", "mixup", "aa"):
        assert config["options"][key] == getattr(args, key)
    record = command.read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert record["step"] == 2
    assert (record["train_sharpness"] != 0) == (args.sam_rho > 0)


@pytest.mark.parametrize("name", FINE_TUNED)
def test_a_recipe_that_fine_tunes_does_not_start_from_random_weights(tmp_path, capsys, name):
    path = next(p for p in RECIPES if p.stem == name)
    assert run("--config", path, "--data-dir", tmp_path, "--out", tmp_path / "run") == 2
    said = "this recipe fine-tunes: give --initial-checkpoint FILE (weights of vit_base_patch32_clip_224)"
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "run").exists()
    assert f"{path.name} --data-dir DIR --initial-checkpoint FILE" in path.read_text()


def test_a_run_whose_weights_were_required_goes_on_without_them(tmp_path):
    """The command of a recipe again, with --resume and without the file."""
    path, tree = tmp_path / "a.yaml", picture_tree(tmp_path / "data", n=8)
    path.write_text(
        "model: test_vit\ninitial-checkpoint: REQUIRED\nepochs: 1\nbatch-size: 8\nmeasures: none\ndata: folder\n"
    )
    _, weights = TestInitialCheckpoint().saved(tmp_path)
    argv = ["--config", path, "--data-dir", tree, "--out", tmp_path / "run"]
    assert run(*argv, "--initial-checkpoint", weights) == 0
    assert run(*argv, "--resume") == 0


@pytest.mark.parametrize("name", ["cifar10_vit_adamw", "cifar10_vit_sam"])
def test_the_vit_recipes_run_on_torchvisions_layout(tmp_path, name):
    """The command of their first lines, shortened; the labels, images and test set are those in memory."""
    cifar_files(tmp_path / "data")
    path = next(p for p in RECIPES if p.stem == name)
    more = ["--model", "test_vit", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "50", "--workers", "0"]
    assert run("--config", path, "--data-dir", tmp_path / "data", *more, "--out", tmp_path / "run") == 0
    config = files.read_json(tmp_path / "run" / "config.json")
    assert (config["options"]["data"], config["options"]["aa"]) == ("cifar10", "rand-m10-n2")
    assert config["data"]["preprocessing"]["mean"] == list(cifar.STATISTICS["cifar10"][0])
    assert command.read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2


def test_recipes_for_several_processes_give_the_whole_command():
    result = 0
    for path in RECIPES:
        text = path.read_text()
        if "of each of" in text:
            command_ = text.replace(" \\\n#    ", "")
            expected = (
                f"# torchrun --nproc-per-node 8 -m benchmarks.train --config benchmarks/recipes/{path.name} --data-dir"
            )
            assert expected in command_, path
            result += 1
    assert result == 6


class TestConfig:
    def test_the_command_line_replaces_the_file(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("lr: 1e-3\nno_aug: true\nopt-kwargs: {betas: '(0.8, 0.9)'}\nopt: adamw\nchannels-last: false\n")
        args = options.parse(["--config", str(path), "--opt", "lion"])
        assert (args.lr, args.no_aug, args.opt, args.channels_last) == (1e-3, True, "lion", False)
        assert args.opt_kwargs == {"betas": (0.8, 0.9)}

    def test_the_command_line_takes_back_switches_and_what_is_unset_by_default(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text(
            "sam-rho: 0.5\nadaptive: elementwise\namp: bf16\nclip-grad: 1\naa: rand-m9-n2\n"
            "no-aug: true\nfsdp: true\ndecay-all: true\ninitial-checkpoint: REQUIRED\n"
        )
        words = "--adaptive none --amp none --clip-grad none --aa none --aug --no-fsdp --no-decay-all"
        args = options.parse(["--config", str(path), *words.split(), "--initial-checkpoint", "none"])
        assert (args.adaptive, args.amp, args.clip_grad, args.aa, args.initial_checkpoint) == (None,) * 5
        assert (args.no_aug, args.fsdp, args.decay_all, args.sam_rho) == (False, False, False, 0.5)
        with pytest.raises(InputError, match=r"--amp: invalid choice: 'fp8' \(choose from .*bf16.*fp16"):
            options.parse(["--amp", "fp8"])

    def test_false_turns_off_what_is_on_by_default(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("aug: false\nfsdp: false\n")
        args = options.parse(["--config", str(path)])
        assert (args.no_aug, args.fsdp) == (True, False)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("learning-rate: 1", "unknown option in .* 'learning-rate'; choose from"),
            ("out: /tmp", "unknown option in .* 'out'"),
            ("- lr", "must be a mapping"),
            ("lr: [", "cannot be read"),
            ("lr: fast", "--lr: must be float"),
            ("lr: !!python/object/apply:os.system [ls]", "cannot be read"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, text, message):
        path = tmp_path / "a.yaml"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            options.parse(["--config", str(path)])

    def test_no_file(self, tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            options.parse(["--config", str(tmp_path / "none.yaml")])


class TestWideResNet:
    def test_it_is_the_network_of_the_paper(self):
        """36.5 million parameters, table 2 of arXiv:1605.07146, counted here from the shapes; 25 3x3 convolutions."""
        with torch.device("meta"):
            model = wide_resnet.WideResNet(28, 10, 10)
        assert sum(p.numel() for p in model.parameters()) == 36_479_194
        kernels = [m.kernel_size for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        assert kernels.count((3, 3)) == 25
        assert kernels.count((1, 1)) == 3

    def test_bad_names(self):
        for name in ("wrn27_10", "wrn4_1", "wrn28_0"):
            with pytest.raises(InputError, match="does not exist"):
                models.build(name, num_classes=10, image_size=(3, 32, 32))


class TestInitialCheckpoint:
    def saved(self, tmp_path, **more):
        torch.manual_seed(5)
        source = timm.create_model("test_vit", num_classes=7, img_size=32, **more)
        torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
        return source, tmp_path / "weights.pth"

    def test_all_but_the_head_is_loaded(self, tmp_path):
        source, path = self.saved(tmp_path, patch_size=4)
        for classes in (7, 10):
            made = models.build("test_vit", num_classes=classes, image_size=(3, 32, 32), checkpoint=str(path))
            for name, value in source.state_dict().items():
                same = made.state_dict()[name]
                if name.startswith("head.") and classes != 7:
                    assert same.shape[0] == classes
                else:
                    assert torch.equal(same, value), name

    def test_position_embeddings_are_fitted(self, tmp_path):
        source, path = self.saved(tmp_path)
        made = models.build("test_vit", num_classes=3, image_size=(3, 160, 160), checkpoint=str(path))
        assert made.pos_embed.shape != source.pos_embed.shape
        assert torch.equal(made.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)

    def test_a_run_starts_from_it_and_goes_on_without_it(self, tmp_path):
        tree = picture_tree(tmp_path / "data", n=8)
        _, path = self.saved(tmp_path)
        options = [*PICTURES, "--model", "test_vit", "--data-dir", tree, "--out", tmp_path / "run", "--epochs", "1"]
        assert run(*options, "--initial-checkpoint", path, "--grad-checkpointing") == 0
        assert files.read_json(tmp_path / "run" / "config.json")["initial_checkpoint_sha256"]
        path.unlink()
        assert run("--out", tmp_path / "run", "--resume") == 0

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "is not a file"), (b"", "is empty"), (b"PK\x03\x04x", "is damaged")],
    )
    def test_bad_files(self, tmp_path, content, message):
        path = tmp_path / "weights.pth"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            models.build("test_vit", num_classes=3, image_size=(3, 32, 32), checkpoint=str(path))


class TestPreprocessing:
    """Fine-tuned weights see images as they were trained on them; the expected values are those of timm itself."""

    def fine_tuned(self, tmp_path, *more, size=(70, 90)):
        tree = picture_tree(tmp_path / "data", n=4, size=size)
        _, path = TestInitialCheckpoint().saved(tmp_path)
        argv = [*PICTURES, "--model", "test_vit", "--data-dir", tree, "--out", tmp_path / "run", "--epochs", "1"]
        assert run(*argv, "--batch-size", "4", "--initial-checkpoint", path, *more) == 0
        return tmp_path / "run"

    def kept(self, out):
        return options.of_run(out)

    def test_it_is_that_of_the_model_and_of_every_command_that_follows(self, tmp_path, capsys):
        """test_vit: mean and std 0.5, bicubic, crop_pct 0.95; the first test image is made here by timm alone."""
        out = self.fine_tuned(tmp_path)
        config = files.read_json(out / "config.json")
        timms = resolve_model_data_config(timm.create_model("test_vit"))
        for key in ("mean", "std", "crop_pct", "interpolation", "crop_mode"):
            expected = list(timms[key]) if key in ("mean", "std") else timms[key]
            assert config["data"]["preprocessing"][key] == config["options"][key] == expected
        splits = data.load(self.kept(out))
        first = next(iter(batches(splits.test, 1, splits.preprocessing)))[0][0]
        with Image.open(tmp_path / "data" / "val" / "cat" / "0.png") as image:
            torch.testing.assert_close(first, create_transform(**timms)(image), rtol=1e-5, atol=1e-5)
        logged = command.read_jsonl(out / "metrics.jsonl")[-1]
        assert errors.run(measure.main, [str(out), "--measures", "worst", "--split", "test"]) == 0
        assert files.read_json(out / "measures.json")["loss"] == pytest.approx(logged["test_loss"], rel=1e-5)
        argv = [str(out), "--corruptions", "contrast", "--severities", "1"]
        assert errors.run(evaluate.main, argv) == 0
        result = files.read_json(out / "corrupted.json")["clean"]
        assert result["loss"] == pytest.approx(logged["test_loss"], rel=1e-5)

    def test_options_and_the_training_images(self, tmp_path):
        """Without augmentation a training image is one of evaluation; --mean given for all channels at once."""
        more = ["--mean", "0.25", "--std", "0.5", "0.25", "0.125", "--interpolation", "nearest", "--crop-pct", "1"]
        out = self.fine_tuned(tmp_path, *more, "--crop-mode", "squash", "--img-size", "80", "--no-aug")
        splits = data.load(self.kept(out))
        shown = torch.cat([x for x, _ in batches(splits.train, 4, splits.preprocessing, train=True)])
        seen = shown * torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1) + 0.25
        with Image.open(tmp_path / "data" / "train" / "dog" / "3.png") as image:
            expected = image.resize((80, 80), Image.Resampling.NEAREST)
        expected = torch.from_numpy(np.array(expected)).movedim(-1, 0) / 255
        assert any(torch.allclose(x, expected, atol=1e-6) for x in seen)

    def test_augmented_images_have_it_too(self, tmp_path):
        """Black pictures under flips and resized crops: -mean / std, whatever the crop."""
        tree = picture_tree(tmp_path / "data", n=4, size=(70, 90))
        for path in (tree / "train").glob("*/*.png"):
            Image.new("RGB", (70, 90)).save(path)
        splits = load("folder", tree, img_size=80, mean=[0.5, 0.25, 0.75], std=[0.5, 0.25, 0.25])
        x = next(iter(batches(splits.train, 8, splits.preprocessing, train=True, augment=Augment())))[0]
        assert torch.equal(x, torch.tensor([-1.0, -1.0, -3.0]).view(3, 1, 1).expand(8, 3, 80, 80))

    def test_a_run_without_these_options_stays_as_it_was(self, tmp_path):
        """Runs from before had ImageNet's statistics, also with --initial-checkpoint."""
        out = self.fine_tuned(tmp_path)
        config = files.read_json(out / "config.json")
        for key in ("mean", "std", "crop_pct", "interpolation", "crop_mode"):
            del config["options"][key]
        files.write_json(out / "config.json", config)
        shown = data.load(self.kept(out)).preprocessing
        assert (shown.image_size, shown.mean) == ((3, 160, 160), (0.485, 0.456, 0.406))
        assert (shown.crop_pct, shown.interpolation) == (0.875, "bilinear")
        assert run("--out", out, "--resume") == 0

    def test_cifar_in_memory_has_its_own_unless_given(self, tmp_path):
        cifar_files(tmp_path / "cifar")
        _, path = TestInitialCheckpoint().saved(tmp_path, patch_size=4)
        argv = ["--data", "cifar10", "--data-dir", str(tmp_path / "cifar"), "--model", "test_vit"]
        args = options.parse([*argv, "--initial-checkpoint", str(path)])
        mean, std = cifar.STATISTICS["cifar10"]
        shown = data.load(args).shown_as()
        assert (shown["mean"], shown["std"], shown["crop_pct"]) == (list(mean), list(std), 1.0)
        args = options.parse([*argv, "--mean", "0.5", "--std", "0.25"])
        splits = data.load(args)
        x = next(iter(batches(splits.test, 1, splits.preprocessing)))[0][0]
        pixels = splits.test.x[0]
        torch.testing.assert_close(x, (pixels / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--mean", "0.5"], "digits are normalized as they are read"),
            (["--data", "cifar10", "--crop-pct", "0.9"], "is not resized: leave --crop-pct"),
            (["--std", "0"], "--std: must be > 0"),
            (["--interpolation", "cubic"], "choose from"),
        ],
    )
    def test_what_makes_no_sense_is_said(self, argv, message):
        with pytest.raises(InputError, match=message):
            options.parse(argv)

    def test_two_numbers_for_three_channels(self, tmp_path, capsys):
        tree = picture_tree(tmp_path / "data", n=8)
        assert run(*PICTURES, "--data-dir", tree, "--out", tmp_path / "run", "--mean", "0.1", "0.2") == 2
        assert "--mean needs 1 or 3 numbers" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_a_grey_image_takes_the_mean_of_the_colours(self):
        shown = Preprocessing((1, 28, 28), mean=(0.2, 0.4, 0.9), std=(0.1, 0.2, 0.3))
        assert shown.mean == pytest.approx((0.5,))
        assert shown.std == pytest.approx((0.2,))
        assert Preprocessing((1, 28, 28)).mean == (0.5,)

    def test_a_list_in_a_recipe(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("data: folder\ndata-dir: d\nmean: [0.5, 0.25, 0.125]\n")
        assert options.parse(["--config", str(path)]).mean == [0.5, 0.25, 0.125]


class TestText:
    @pytest.fixture
    def model(self, tmp_path):
        """A BERT of 2 layers with a vocabulary of words, as save_pretrained writes it."""
        transformers = pytest.importorskip("transformers")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "runs", "sleeps", "not"]
        folder = tmp_path / "bert"
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
        config.save_pretrained(folder)
        return folder

    def files(self, tmp_path):
        rows = [("a dog runs", "a dog runs", "entailment"), ("a dog runs", "a dog not runs", "contradiction")]
        rows += [("a cat sleeps", "a dog runs", "neutral"), ("a cat", "a dog", "-")]
        tsv, jsonl = tmp_path / "train.tsv", tmp_path / "dev.jsonl"
        lines = ["index\tsentence1\tsentence2\tgold_label"] + [f"{i}\t" + "\t".join(r) for i, r in enumerate(rows * 6)]
        tsv.write_text("\n".join(lines) + "\n")
        keys = ("premise", "hypothesis", "label")
        jsonl.write_text("\n".join(json.dumps(dict(zip(keys, r, strict=True))) for r in rows) + "\n")
        return tsv, jsonl

    def test_both_formats_are_read(self, tmp_path):
        tsv, jsonl = self.files(tmp_path)
        assert len(finetune_text.read(tsv)) == 18
        assert finetune_text.read(jsonl)[1] == ("a dog runs", "a dog not runs", 2)

    @pytest.mark.parametrize("options", [[], ["--sam-rho", "0.05"], ["--sam-rho", "0.5", "--adaptive"]], ids=str)
    def test_two_steps(self, tmp_path, model, options, capsys):
        tsv, jsonl = self.files(tmp_path)
        argv = ["--model", str(model), "--train", str(tsv), "--validation", str(jsonl), "--out", str(tmp_path / "out")]
        argv += ["--scratch", "--max-steps", "2", "--batch-size", "4", "--length", "16", "--device", "cpu"]
        assert errors.run(finetune_text.main, [*argv, *options]) == 0
        result = files.read_json(tmp_path / "out" / "result.json")
        assert result["updates"] == 2
        assert 0 <= result["accuracy"] <= 1
        assert result["loss"] == pytest.approx(1.1, abs=0.3)  # log 3, of a model that has learnt nothing yet

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"auto_map": {"AutoConfig": "code.C"}, "model_type": "theirs"}, "trust_remote_code"),
         ({"_attn_implementation": "a-hub/kernels"}, "would be downloaded"), ({"hidden_size": "16"}, "hidden_size"),
         ({"dtype": "theirs"}, "theirs"), ({"num_attention_heads": 0}, "zero"), ({}, "is a pickle"),
         ({"num_hidden_layers": 1}, "says 1 of encoder.layer, its weights have 2"),
         ({"num_hidden_layers": 3}, "says 3 of encoder.layer, its weights have 2"),
         ({"intermediate_size": 8}, "its config.json gives bert.encoder.layer."),
         ({}, "values that are not finite"), ({}, "is damaged: its SHA-256")],
    )  # fmt: skip
    def test_a_folder_of_a_stranger(self, tmp_path, model, changes, message, capsys, monkeypatch):
        from safetensors.torch import save_file
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(model)
        state = dict(AutoModelForSequenceClassification.from_config(config).state_dict())
        if message == "is a pickle":
            monkeypatch.setattr(torch, "__version__", "2.9.1")
            monkeypatch.delenv("SAM_OPTIM_TRUST_PICKLES", raising=False)  # with which all tests run on an old torch
            torch.save(state, model / "pytorch_model.bin")
        else:
            state["classifier.bias"][0] = float("nan" if message.startswith("values") else 0)
            save_file(state, model / "model.safetensors", {"format": "pt"})
            if message.startswith("is damaged"):
                (model / "model.safetensors.sha256").write_text("0" * 64)
        path = model / "config.json"
        path.write_text(json.dumps(files.read_json(path) | changes))
        (model / "code.py").write_text("raise SystemExit('it ran')")
        tsv, jsonl = self.files(tmp_path)
        argv = ["--model", str(model), "--train", str(tsv), "--validation", str(jsonl), "--out", str(tmp_path / "out")]
        capsys.readouterr()
        assert errors.run(finetune_text.main, argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err.splitlines()[-1]

    def test_a_head_for_other_classes_is_new_and_all_else_is_not(self, tmp_path, model):
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(model, num_labels=2)
        saved = AutoModelForSequenceClassification.from_config(config)
        saved.save_pretrained(model)
        _, loaded = finetune_text.model_of(finetune_text.Settings(model=str(model), train=model, validation=model))
        assert loaded.classifier.weight.shape == (3, 16)
        assert all(map(torch.equal, loaded.bert.state_dict().values(), saved.bert.state_dict().values()))

    @pytest.mark.parametrize(
        ("options", "passes"),
        [([], 1), (["--sam-norm-only"], 2), (["--sam-schedule", "late_phase:0.5"], 1.5)],
        ids=str,
    )
    def test_few_noisy_labels_are_paid_for_as_said_and_tested_where_overlap_misleads(
        self, tmp_path, model, options, passes
    ):
        tsv, jsonl = self.files(tmp_path)
        fooling = tmp_path / "fooling.tsv"
        fooling.write_text("sentence1\tsentence2\tgold_label\na dog\tdog a\tneutral\n")
        rho = ["--sam-rho", "0.05"] if options else []
        argv = ["--model", str(model), "--train", str(tsv), "--validation", str(jsonl), "--out", str(tmp_path / "out")]
        argv += ["--scratch", "--epochs", "2", "--batch-size", "4", "--length", "16", "--device", "cpu", *rho, *options]
        argv += ["--train-examples", "8", "--label-noise", "0.5", "--test", str(tsv), str(fooling)]
        assert errors.run(finetune_text.main, argv) == 0
        result = files.read_json(tmp_path / "out" / "result.json")
        assert result["passes"] == 2 * passes
        assert result["updates"] == 4
        assert set(result["test"]) == {"test", "misleading"}

    def test_pairs_that_mislead_and_labels_of_a_seed(self, tmp_path):
        tsv, _ = self.files(tmp_path)
        pairs = finetune_text.read(tsv)
        more = [finetune_text.Pair("a cat", "cat a", 1), finetune_text.Pair("x", "y", 0)]
        assert finetune_text.misleading(pairs, [*pairs, *more]) == more
        settings = finetune_text.Settings(model="m", train=tsv, validation=tsv, train_examples=10, label_noise=1.0)
        noisy = finetune_text.drawn(pairs, settings)
        assert len(noisy) == 10
        assert noisy == finetune_text.drawn(pairs, settings) != finetune_text.drawn(pairs, replace(settings, seed=1))
        with pytest.raises(errors.InputError, match="18 examples"):
            finetune_text.drawn(pairs, replace(settings, train_examples=19))

    def test_columns_of_sick_are_read(self, tmp_path):
        path = tmp_path / "sick.txt"
        path.write_text(
            "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n1\ta\tb\t4.5\tNEUTRAL\n"
        )
        assert finetune_text.read(path) == [("a", "b", 1)]

    def test_bad_input(self, tmp_path, model, capsys):
        tsv, jsonl = self.files(tmp_path)
        argv = ["--model", str(model), "--train", str(tsv), "--validation", str(jsonl), "--out", str(tmp_path / "out")]
        assert errors.run(finetune_text.main, [*argv, "--adaptive"]) == 2
        jsonl.write_text('{"premise": "a", "hypothesis": "b", "label": "maybe"}')
        assert errors.run(finetune_text.main, argv) == 2
        jsonl.write_text('{"premise": "a"}')
        assert errors.run(finetune_text.main, argv) == 2
        assert errors.run(finetune_text.main, [*argv[:3], str(tmp_path / "none.tsv"), *argv[4:]]) == 2
        err = capsys.readouterr().err.splitlines()
        assert "label 'maybe' is not one of" in err[1]
        assert "has no sentence2 or hypothesis" in err[2]
        assert "cannot be read" in err[3]
        assert not (tmp_path / "out").exists()
