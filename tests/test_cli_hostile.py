"""Damaged and hostile files and those of other formats: one line each; nothing in them runs or is measured wrongly."""

import hashlib
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import images, network, run, small, study
from limits import ONE_THREAD, PATIENCE
from torch import nn

from benchmarks.examples import diagonal_network, edge, lite0
from benchmarks.speed import host, monitor, step, throughput, whole_step
from benchmarks.speed import measures as speed_of_measures
from benchmarks.train import checkpoint
from sam_optim import cli, sweep
from sam_optim.core import errors, files
from sam_optim.core.errors import InputError
from sam_optim.core.files import locked, read_json, write_atomic
from sam_optim.sweep import store
from sam_optim.vision import arrays, checkpoints, cifar, tensor_files, weights

pytest.importorskip("timm")
pytest.importorskip("safetensors")
ROOT = Path(__file__).resolve().parents[1]


def read(path, **options):
    return checkpoints.read(checkpoints.find([path])[0], **options)


KINDS = {
    "meta": (lambda w: w.to("meta"), "on the device meta"),
    "sparse": (lambda w: w.to_sparse(), "is a sparse tensor"),
    "nested": (lambda w: torch.nested.nested_tensor([w[:1], w[:2]]), "is a nested tensor|_rebuild_nested_tensor"),
    "complex": (lambda w: w.to(torch.complex64), "is complex"),
    "fp8": (lambda w: w.to(torch.float8_e4m3fn), "has the type float8_e4m3fn"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is quantized"),
    "codes": (lambda w: w.to(torch.int8), r"holds codes \(int8\) and not weights"),
    "stride 0": (lambda w: torch.zeros(1).expand(1 << 32), "claims the shape"),
}


class TestCheckpoints:
    @pytest.mark.parametrize("kind", ["torch.save", "run", "safetensors", "older"])
    def test_no_flipped_bit_is_measured_where_there_is_a_checksum(self, tmp_path, kind):
        """300 bits, drawn at random: an error, or the weights of before bit for bit."""
        from safetensors.torch import save

        state, file = network(0, num_classes=2).state_dict(), io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=kind != "older")
        content, path = file.getvalue(), tmp_path / "c.pt"
        if kind == "run":
            path = checkpoint.save(tmp_path, {"step": 1, "model": state})
            content = path.read_bytes()
        elif kind == "safetensors":
            content, path = save(state), tmp_path / "c.safetensors"
        if kind in ("safetensors", "older"):
            path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(content).hexdigest())
        refused = 0
        for i in np.random.default_rng(0).integers(8 * len(content), size=300):
            damaged = bytearray(content)
            damaged[i // 8] ^= 1 << (i % 8)
            path.write_bytes(damaged)
            error, weights_read = None, {}
            try:
                weights_read = read(path).state
            except InputError as caught:
                error = str(caught)
            refused += error is not None
            assert error is None or (path.name in error and "\n" not in error)
            assert error or all(torch.equal(weights_read[k], w) for k, w in state.items())
        assert refused == 300 if kind != "torch.save" else refused > 280

    def test_safetensors_have_no_checksum_but_the_one_beside_them(self, tmp_path):
        from safetensors.torch import save

        path, state = tmp_path / "c.safetensors", network(0).state_dict()
        content = bytearray(save(state))
        path.write_bytes(content)
        beside = tmp_path / "c.safetensors.sha256"
        beside.write_text(f"{hashlib.sha256(content).hexdigest()}  c.safetensors\n")
        assert torch.equal(read(path).state["0.weight"], state["0.weight"])
        content[-3] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is damaged: .* c\.safetensors\.sha256 says"):
            read(path)
        beside.write_text("no sum")
        with pytest.raises(InputError, match=r"sha256 has no SHA-256"):
            read(path)

    @pytest.mark.parametrize("value", [1e11, -3e35, float("inf"), float("nan")])
    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    def test_values_that_no_training_gives(self, tmp_path, value, suffix):
        from safetensors.torch import save_file

        state = {k: w.clone() for k, w in network(0).state_dict().items()}
        state["0.weight"][0, 0, 0, 0] = value
        (torch.save if suffix == "pt" else save_file)(state, tmp_path / f"c.{suffix}")
        with pytest.raises(InputError, match=r"0\.weight has values (of up to .*damaged|that are not finite)"):
            read(tmp_path / f"c.{suffix}")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.filterwarnings("ignore:.*quantize", "ignore:The PyTorch API of nested tensors")
    def test_tensors_that_are_no_plain_weights(self, tmp_path, kind):
        change, message = KINDS[kind]
        state = network(0).state_dict()
        state["9.weight"] = change(state["9.weight"])
        torch.save(state, tmp_path / "c.pt")
        with pytest.raises(InputError, match=message):
            weights.load_(network(1), read(tmp_path / "c.pt").state, "c.pt")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"GGUF\x03\0\0\0", "a GGUF file"),
            (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a Git LFS pointer"),
            (b"\n<!DOCTYPE html><html>", "a web page"),
            (b"\x08\x07\x12\x07pytorch\x1a\x032.1", "an ONNX file"),
            (b"\x93NUMPY\x01\0", "an array of NumPy"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
    def test_other_formats_are_named(self, tmp_path, content, message, suffix):
        (tmp_path / f"c.{suffix}").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read(tmp_path / f"c.{suffix}")

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_programs_of_torch_are_named(self, tmp_path):
        torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "c.pt")
        with pytest.raises(InputError, match="is TorchScript"):
            read(tmp_path / "c.pt")
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "e.pt2")
        with pytest.raises(InputError, match=r"is an exported program \(\.pt2\)"):
            read(tmp_path / "e.pt2")
        with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
            archive.writestr("readme.txt", "hello")
        with pytest.raises(InputError, match="is an archive"):
            read(tmp_path / "z.pt")

    def test_pickles_are_refused_where_torch_reads_them_unsafely(self, tmp_path, monkeypatch):
        from safetensors.torch import save_file

        torch.save(network(0).state_dict(), tmp_path / "c.pt")
        save_file(network(0).state_dict(), tmp_path / "c.safetensors")
        monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
        monkeypatch.delenv(tensor_files.TRUST, raising=False)
        with pytest.raises(InputError, match=r"install torch 2\.10 or newer, or give \.safetensors"):
            read(tmp_path / "c.pt")
        assert read(tmp_path / "c.safetensors").state.keys() == network(0).state_dict().keys()
        monkeypatch.setenv(tensor_files.TRUST, "1")
        assert read(tmp_path / "c.pt").state.keys() == network(0).state_dict().keys()

    def test_numbers_of_numpy_cannot_bring_flags_of_their_own(self, tmp_path):
        """The state of a rebuilt numpy.dtype says where pointers are: with others it crashes the process."""

        class Dtype:
            def __reduce__(self):
                return np.dtype, ("i8", False, True), (3, "<", None, None, None, -1, -1, 255)

        class Number:
            def __reduce__(self):
                return np.float64(0).__reduce__()[0], (Dtype(), b"A" * 8)

        torch.save({"state_dict": network(0).state_dict(), "best": Number()}, tmp_path / "c.pt")
        assert tensor_files.read_file(tmp_path / "c.pt")["best"] == int.from_bytes(b"A" * 8, "little")

    @pytest.mark.parametrize("name", ["get", "items", "__len__"])
    def test_attributes_do_not_stand_in_for_methods_of_a_mapping(self, tmp_path, name):
        state = network(0).state_dict()
        state.__dict__["ABCDEFGHIJKLMN"[: len(name)]] = 3  # torch.save itself would call what has the right name
        torch.save({"state_dict": state}, content := io.BytesIO())
        with zipfile.ZipFile(content) as archive, zipfile.ZipFile(tmp_path / "c.pt", "w") as changed:
            for member in archive.namelist():
                changed.writestr(member, archive.read(member).replace(b"ABCDEFGHIJKLMN"[: len(name)], name.encode()))
        with pytest.raises(InputError, match=f"holds more than weights: an attribute '{name}'"):
            read(tmp_path / "c.pt")

    @pytest.mark.parametrize("name", ["abs", "is_complex", "numel"])
    def test_attributes_do_not_stand_in_for_methods_of_a_tensor(self, tmp_path, name):
        state = network(0).state_dict()
        setattr(state["0.weight"], name, 3)
        torch.save(state, tmp_path / "c.pt")
        with pytest.raises(InputError, match=f"holds more than weights: an attribute '{name}'"):
            read(tmp_path / "c.pt")
        state = network(0).state_dict()
        state["0.weight"].is_expert = True  # as DeepSpeed marks some
        torch.save(state, tmp_path / "c.pt")
        assert torch.equal(read(tmp_path / "c.pt").state["0.weight"], state["0.weight"])

    def test_a_tensor_that_the_file_does_not_fill(self, tmp_path):
        """torch.Tensor(n) has room for n numbers, whatever stands there."""

        class Room:
            def __reduce__(self):
                return torch.Tensor, (1 << 28,)

        torch.save(network(0).state_dict() | {"room": Room()}, tmp_path / "c.pt")
        with pytest.raises(InputError, match=r"asks for 1,073,741,824 bytes for a tensor"):
            read(tmp_path / "c.pt")

    def test_the_entry_that_holds_the_weights_can_be_named(self, tmp_path):
        a, b = network(0).state_dict(), network(1).state_dict()
        both = {f"student.{k}": w for k, w in a.items()} | {f"teacher.{k}": w for k, w in b.items()}
        torch.save({"best": {"net": a}, "epoch": 3, "last": both}, tmp_path / "c.pt")
        assert torch.equal(read(tmp_path / "c.pt", key="best.net").state["0.weight"], a["0.weight"])
        torch.save(both, tmp_path / "d.pt")
        assert torch.equal(read(tmp_path / "d.pt", key="teacher").state["0.weight"], b["0.weight"])
        with pytest.raises(InputError, match=r"no weights under state_dict, .*; it has best, epoch, last; --key NAME"):
            read(tmp_path / "c.pt")
        with pytest.raises(InputError, match="no weights under --key worst; it has best, epoch, last"):
            read(tmp_path / "c.pt", key="worst")

    def test_averaged_weights_are_taken_only_when_asked_for_and_the_choice_is_said(self, here):
        path, *_ = images(here / "d.npz")
        a, b = network(0).state_dict(), network(1).state_dict()
        torch.save({"state_dict": a, "state_dict_ema": b}, "both.pt")
        torch.save({"state_dict_ema": b}, "only.pt")
        torch.save({f"ema_model.{k}": w for k, w in b.items()}, "prefix.pt")
        common = ["--model", "cnn3", "--data", path, "--measures", "trace", "--num-probes", 2]
        _, _, err = run("measure", "both.pt", *common)
        assert "the weights under 'state_dict' are taken; --ema takes the averaged ones under 'state_dict_ema'" in err
        _, _, err = run("measure", "both.pt", *common, "--ema")
        assert "the weights under 'state_dict_ema' are taken, the averaged ones" in err
        for name, remedy in (("only.pt", "--ema takes those under state_dict_ema"), ("prefix.pt", "--key ema_model")):
            code, _, err = run("measure", name, *common)
            assert code == 1
            assert remedy in err
        assert run("measure", "prefix.pt", *common, "--key", "ema_model")[0] == 0

    def test_of_several_sets_of_weights_the_one_that_was_taken_and_the_others_are_said(self, here):
        path, *_ = images(here / "d.npz")
        a, b, c = (network(i).state_dict() for i in range(3))
        torch.save({"best": b, "net": a, "epoch": 3, "swa": c}, "entries.pt")
        torch.save({f"net.{k}": w for k, w in a.items()} | {f"net_ema.{k}": w for k, w in b.items()}, "prefixes.pt")
        torch.save({f"net.{k}": w for k, w in a.items()} | {f"net.ema.{k}": w for k, w in b.items()}, "inside.pt")
        torch.save(a | {f"ema.{k}": w for k, w in b.items()}, "beside.pt")
        torch.save({"net": a, "optimizer": {"state": {0: {"step": torch.zeros(())}}}, "epoch": 3}, "one.pt")
        said = {
            "entries.pt": "the weights under 'net' are taken; the file has others under 'best', 'swa': see --key",
            "prefixes.pt": "the weights under net are taken; the same model is there under net_ema, too: see --key",
            "inside.pt": "the weights under net are taken; the same model is there under net.ema, too: see --key",
            "beside.pt": "the weights without a prefix are taken; the same model is there under ema, too: see --key",
        }
        common = ["--model", "cnn3", "--data", path]
        for name, note in (said | {"one.pt": None}).items():
            code, _, err = run("measure", name, *common, "--measures", "trace", "--num-probes", 2)
            assert code == 0
            if note:
                assert f"note: {name}: {note}" in err
            else:
                assert "the weights" not in err
        model = network(0)
        for key, state in (("best", b), ("swa", c)):
            assert torch.equal(read(Path("entries.pt"), key=key).state["0.weight"], state["0.weight"])
        for name in ("inside.pt", "beside.pt"):
            weights.load_(model, read(Path(name)).state, name)
            assert all(torch.equal(w, a[k]) for k, w in model.state_dict().items())
        code, _, err = run("landscape", "one.pt", *common, "--other", "entries.pt", "--out", "l.json", "--points", 2)
        assert code == 0
        assert f"note: entries.pt: {said['entries.pt']}" in err

    def test_a_model_that_repeats_its_own_parts_is_one_set_of_weights(self):
        chain = nn.Linear(2, 2)
        for _ in range(3):
            outer = nn.Linear(2, 2)
            outer.next = chain
            chain = outer
        state = chain.state_dict()
        assert weights.choice(state, state) is None
        assert weights.without_prefix(state, state) == state
        assert weights.choice({f"m.{k}": w for k, w in state.items()}, state) is None

    def test_a_file_that_changes_between_hashing_and_reading_is_not_measured(self, tmp_path):
        torch.save(network(0).state_dict(), tmp_path / "c.pt")
        (checkpoint,) = checkpoints.find([tmp_path / "c.pt"])
        checkpoint.digest()
        torch.save(network(1).state_dict(), tmp_path / "c.pt")
        with pytest.raises(InputError, match="has changed while it was read"):
            checkpoints.read(checkpoint)

    @pytest.mark.parametrize("kind", ["codecs", "punycode", "idna", "bytearray", "keys"])
    def test_a_pickle_that_would_fill_memory_or_take_hours(self, tmp_path, kind):
        def text(content):
            return b"X" + struct.pack("<I", len(content)) + content

        encode = b"\x80\x02c_codecs\nencode\n"
        kinds = {
            "codecs": encode + b"q\x01" + text(b"a" * (1 << 20)) + b"q\x00" + text(b"utf-32") + b"q\x02\x86R("
            + b"h\x01h\x00h\x02\x86R" * 3000 + b"t.",
            "punycode": encode + text(("\u4e00\u4e01" * 99_999).encode()) + text(b"punycode") + b"\x86R.",
            "idna": encode + text("\u00fc".encode() * 10_000) + text(b"idna") + b"\x86R.",
            "bytearray": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (60 << 30).to_bytes(5, "little") + b"\x85R.",
            "keys": b"\x80\x02})" + b"".join(b"q%ch%ch%ch%c\x87" % (i, i, i, i) for i in range(1, 60)) + b"K\x01s.",
        }  # fmt: skip
        with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
            archive.writestr("c/data.pkl", kinds[kind])
            archive.writestr("c/version", "3\n")
            archive.writestr("c/byteorder", "little")
        (tmp_path / "old.pt").write_bytes(b"".join(pickle.dumps(x, protocol=2) for x in (1, 2, 3)) + kinds[kind])
        for name in ("c.pt", "old.pt"):
            with pytest.raises(InputError, match=name):
                read(tmp_path / name)

    def test_a_pipe_is_no_checkpoint(self, tmp_path):
        os.mkfifo(tmp_path / "c.pt")
        with pytest.raises(InputError, match="is not a regular file"):
            read(tmp_path / "c.pt")


class TestRuns:
    """config.json of a run: names and plain values, nothing else."""

    def made(self, folder, config):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        (folder / "checkpoints" / f"checkpoint-{7:09d}-{'0' * 16}.pt").write_bytes(b"")
        return folder

    @pytest.mark.parametrize(
        "kwargs",
        [
            [["checkpoint_path", "evil.pth"]],
            [["pretrained", True]],
            [["pretrained_cfg_overlay", {"url": "http://127.0.0.1/x"}]],
            [["pretrained_cfg", "x"]],
            [["cache_dir", "x"]],
            [["scriptable", True]],
            [["act_layer", "../x"]],
            [["act_layer", {"a": 1}]],
            [["act_layer", "http://x"]],
            [["num_classes", "x"]],
            [["in_chans", 0]],
            ["drop_rate"],
            3,
        ],
    )
    def test_options_that_could_be_more_are_refused(self, tmp_path, kwargs):
        run_ = self.made(tmp_path / "run", {"options": {"model": "test_resnet", "model_kwargs": kwargs}})
        with pytest.raises(InputError, match=r"config\.json is not of a run of benchmarks\.train"):
            checkpoints.find([run_])

    @pytest.mark.parametrize("option", [["embed_dim", 1 << 19], ["depth", 10**5], ["depth", 10**9]])
    def test_a_model_far_larger_than_the_weights_is_not_made(self, here, option):
        """4 TB of weights, or 100,000 blocks, for a file of 100 kB."""
        images(here / "d.npz")
        config = {"options": {"model": "test_vit", "model_kwargs": [option]}}
        folder = self.made(here / "run", config)
        next(folder.glob("checkpoints/*")).unlink()
        torch.save(network(0).state_dict(), content := io.BytesIO())
        digest = hashlib.sha256(content.getvalue()).hexdigest()[:16]
        (folder / "checkpoints" / f"checkpoint-{7:09d}-{digest}.pt").write_bytes(content.getvalue())
        code, _, err = run("measure", "run", "--data", "d.npz", "--num-classes", 10, "--quiet", "--measures", "trace")
        assert code in (1, 2)
        assert any(text in err for text in ("describes a larger model", "allocate memory", "not be beyond 1,000,000"))

    @pytest.mark.parametrize("model", ["hf-hub:x/y", "local-dir:/tmp", "../x", 3, None, ["a"], "no_such_model"])
    def test_models_that_are_no_names_are_refused(self, tmp_path, model):
        with pytest.raises(InputError, match=r"config\.json is not of a run"):
            checkpoints.find([self.made(tmp_path / "run", {"options": {"model": model}})])

    def test_options_of_the_model_are_taken(self, tmp_path):
        kwargs = [["drop_path_rate", 0.1], ["act_layer", "gelu"]]
        config = {"options": {"model": "test_vit", "model_kwargs": kwargs}}
        (checkpoint,) = checkpoints.find([self.made(tmp_path / "run", config)])
        assert checkpoint.run.model_kwargs == {"drop_path_rate": 0.1, "act_layer": "gelu"}

    @pytest.mark.parametrize(
        "config",
        ["[]", "{", "[" * 100_000, '{"options": []}', '{"options": 3}', '{"options": {"model_kwargs": {"a": 1}}}',
         '{"data": {"image_size": [1, 2], "preprocessing": {"mean": [0.5]}}}', '{"options": {"model": NaN}}',
         '{"data": {"image_size": [3, 8, 8], "preprocessing": {"mean": "abc"}}}', '{"data": [1]}',
         '{"data": {"image_size": [3, 8, 1e9], "preprocessing": {"crop_pct": 1}}}', "1" * 5000,
         '{"data": {"image_size": [3, 8, 8], "preprocessing": {"interpolation": "os.system"}}}'],
    )  # fmt: skip
    def test_configs_of_other_shapes(self, tmp_path, config):
        if config == '{"options": []}':
            assert checkpoints.find([self.made(tmp_path / "run", config)])[0].run.model == "cnn3"
            return
        with pytest.raises(InputError, match=r"config\.json"):
            checkpoints.find([self.made(tmp_path / "run", config)])

    @pytest.mark.parametrize(
        "content",
        [
            '{"weight_map": {"a": ""}}',
            '{"weight_map": {"a": ".."}}',
            '{"weight_map": {"a": "\\u0000"}}',
            '{"weight_map": {"a": "../x"}}',
            '{"weight_map": []}',
            '{"weight_map": {"a": 3}}',
            "{}",
            "[]",
            '{"weight_map": {}}',
        ],
    )
    def test_wrong_lists_of_parts(self, tmp_path, content):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
            checkpoints.find([tmp_path])


def batch_file(folder, content):
    (folder / "cifar-10-batches-py").mkdir(exist_ok=True)
    good = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, protocol=2)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        (folder / "cifar-10-batches-py" / name).write_bytes(good)
    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)


class TestCifar:
    @pytest.mark.parametrize("protocol", [2, 3, 4])
    def test_every_protocol_is_read(self, tmp_path, protocol):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
        batch = {"batch_label": "x", "labels": [1, 2, 3], "data": pixels, "filenames": ["a.png", "b.png", "c.png"]}
        batch_file(tmp_path, pickle.dumps(batch, protocol=protocol))
        (x, y), _ = cifar.read("cifar10", tmp_path)
        assert np.array_equal(x[4:7].reshape(3, 3072).numpy(), pixels)
        assert y[4:7].tolist() == [1, 2, 3]

    def hostile(self):
        class Dtype:
            def __reduce__(self):
                return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 63)

        class Array:
            def __reduce__(self):
                maker, arguments, state = np.zeros((2, 3072), np.uint8).__reduce__()
                return maker, arguments, (state[0], state[1], Dtype(), False, b"A" * 8 * 6144)

        class Sized:
            def __reduce__(self):
                maker, arguments, state = np.zeros((2, 3072), np.uint8).__reduce__()
                return maker, arguments, (state[0], (1 << 40, 3072), state[2], False, b"")

        labels = {"labels": [0, 1]}
        yield "dtype of objects", pickle.dumps({"data": Array(), **labels})
        yield "size", pickle.dumps({"data": Sized(), **labels})
        yield "table of objects", b"\x80\x02}r\xff\xff\xff\x7f."
        text = b"X\x00\x10\x00\x00" + b"a" * 4096
        encode = b"c_codecs\nencode\n"
        yield "codecs", b"\x80\x02" + text + b"q\x000" + (encode + b"h\x00X\x06\x00\x00\x00latin1\x86R") * 64 + b"."
        yield "codec", b"\x80\x02" + encode + b"X\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R."
        shared = [1] * 10
        for _ in range(9):
            shared = [shared] * 10
        yield "labels in labels", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": shared})
        yield "names", pickle.dumps({"data": Path, **labels})
        yield "state of a function", b"\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb."

    def test_nothing_else_is_made_of_a_pickle(self, tmp_path):
        for _, content in self.hostile():
            batch_file(tmp_path, content)
            with pytest.raises(InputError, match=r"data_batch_3 is not a CIFAR file"):
                cifar.read("cifar10", tmp_path)


class TestArrays:
    def test_an_array_that_claims_more_than_it_holds(self, tmp_path):
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
        header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
        npy = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.writestr("x.npy", npy)
            archive.writestr("y.npy", npy)
        with pytest.raises(InputError, match="an array claims the shape"):
            arrays.from_file(tmp_path / "d.npz")

    def test_an_archive_that_unpacks_to_far_more_than_it_is(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tensor_files, "LARGE", 1000)
        np.savez_compressed(tmp_path / "d.npz", x=np.zeros((2000, 100)), y=np.zeros(2000, np.int64))
        with pytest.raises(InputError, match="claims to unpack to"):
            arrays.from_file(tmp_path / "d.npz")


ENTRY = {"checkpoint": "a", "key": "k", "column": "trace", "identity": {"loss": {}}, "result": {"type": "Estimate"}}


class TestResults:
    @pytest.mark.parametrize(
        "change",
        [{"result": {"type": "Estimate", "value": "1"}}, {"result": []}, {"identity": 3}, {"key": 1}, {"column": []},
         {"result": {"eigenvalues": 3}}, {"result": {"eigenvalues": [[1]]}}, {"result": {"settings": []}},
         {"result": {"value": True}}, {"error": 3}, {"identity": {"loss": []}}, {"quality": {"loss": "1"}},
         {"result": {"reason": 1}}, {"result": {"value": 10**400}},
         {"result": {"type": "Estimate", "value": 1.0, "stderr": [1]}}],
    )  # fmt: skip
    def test_an_entry_that_was_changed_is_named_and_the_file_left_alone(self, here, change):
        study(here, count=1)
        content = json.dumps({"format": store.FORMAT, "entries": [ENTRY | change]})
        (here / "o.json").write_text(content)
        argv = ["--target", "study_problem:problem", "--measures", "trace", "--num-probes", 2, "--json", "o.json"]
        for command in (["measure", "c0.pt", *argv], ["report", "o.json", "-o", "r.html"]):
            code, _, err = run(*command)
            assert (code, err.count("\n")) == (2, 1)
            assert "o.json" in err
        assert (here / "o.json").read_text() == content

    @pytest.mark.parametrize(
        "content",
        ['{"type": "Estimate", "value": "1"}', '{"type": "Estimate", "value": 1, "value": 2}',
         '{"type": "Landscape", "coordinates": 3, "losses": []}',
         '{"type": "Landscape", "coordinates": [[0, 1]], "losses": [["a"]]}', '{"type": "Landscape"}',
         '{"type": "Spectrum", "eigenvalues": [{}]}', '{"type": "Correlation", "tau": []}', '{"type": []}'],
    )  # fmt: skip
    def test_a_result_of_another_shape_is_one_line(self, here, content):
        (here / "r.json").write_text(content)
        code, _, err = run("report", "r.json", "-o", "r.html")
        assert (code, err.count("\n")) == (2, 1)

    def test_a_name_that_begins_like_a_formula_cannot_run_in_a_spreadsheet_and_is_found_again(self, here):
        study(here, count=1)
        os.rename("c0.pt", "=1+1.pt")
        argv = ["--target", "study_problem:problem", "--measures", "trace", "--num-probes", 2]
        assert run("measure", "=1+1.pt", *argv, "--csv", "t.csv", "--json", "o.json")[0] == 0
        assert (here / "t.csv").read_text().splitlines()[1].startswith("'=1+1.pt,")
        (here / "e.csv").write_text("checkpoint,error\n=1+1.pt,0.5\n")
        assert run("report", "t.csv", "--targets", "e.csv", "-o", "r.html")[0] == 0

    def test_control_characters_do_not_reach_the_terminal(self, here):
        study(here, count=1)
        os.rename("c0.pt", "a\x1b[2J.pt")
        (here / "b\x1b]0;x\x07.pt").write_bytes(b"no checkpoint")
        _, out, err = run("measure", ".", "--target", "study_problem:problem", "--measures", "trace", "--num-probes", 2)
        assert "\x1b" not in out + err
        assert "\x07" not in out + err

    def test_nor_from_what_is_only_printed(self, capsys):
        assert errors.run(lambda _: print("a\x1b[2Jb\tc\u202ed")) is None
        assert capsys.readouterr().out == "a\ufffd[2Jb\tc\ufffdd\n"


class TestWriting:
    def test_a_planted_link_is_not_followed_and_the_mode_stays(self, tmp_path, monkeypatch):
        path, victim = tmp_path / "o.json", tmp_path / "victim"
        victim.write_text("mine")
        path.write_text("old")
        path.chmod(0o600)
        monkeypatch.setattr(files.secrets, "token_hex", lambda n: "guessed")
        (tmp_path / ".o.json.guessed.tmp").symlink_to(victim)
        with pytest.raises(InputError, match="File exists"):
            write_atomic(path, b"new")
        assert (victim.read_text(), path.read_text()) == ("mine", "old")
        monkeypatch.undo()
        write_atomic(path, b"new")
        assert path.read_text() == "new"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert victim.read_text() == "mine"

    def test_a_planted_link_in_the_place_of_the_lock_is_not_followed(self, tmp_path):
        (tmp_path / ".o.json.lock").symlink_to(tmp_path / "victim")
        with pytest.raises(OSError), locked(tmp_path / "o.json"):
            pass
        assert not (tmp_path / "victim").exists()

    def test_the_lock_of_a_killed_process_holds_nobody_up(self, tmp_path):
        code = "import os, sys; from pathlib import Path; from sam_optim.core.files import locked\n"
        code += "with locked(Path('o.json')): print('held', flush=True); sys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"is being written by process {process.pid}"), locked(tmp_path / "o.json"):
            pass
        process.kill()
        process.communicate()
        with locked(tmp_path / "o.json"):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_a_holder_has_a_moment_to_write_its_name(self, tmp_path):
        """Between the lock and the name another process may come."""
        fcntl = pytest.importorskip("fcntl")
        with (tmp_path / ".o.json.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            naming = threading.Timer(0.1, lambda: (lock.write("process 7"), lock.flush()))
            naming.start()
            with pytest.raises(InputError, match="is being written by process 7;"), locked(tmp_path / "o.json"):
                pass
            naming.join()

    def command(self, here, *argv, environment=None, **options):
        study(here, count=1)
        words = ["measure", "c0.pt", "--target", "study_problem:problem", "--measures", "trace", "--num-probes", "2"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), **ONE_THREAD} | (environment or {})
        return subprocess.run(
            [sys.executable, "-m", "sam_optim", *words, *argv], env=environment, timeout=PATIENCE, **options
        )

    def test_results_on_standard_output(self, here):
        done = self.command(here, "--json", "/dev/stdout", "--quiet", capture_output=True)
        assert done.returncode == 0, done.stderr
        first, _, _ = done.stdout.decode().partition("checkpoint  ")
        assert json.loads(first)["format"] == store.FORMAT

    def test_ascii_terminals_and_closed_standard_error(self, here):
        with open("out", "wb") as out:
            done = self.command(
                here, "--json", "o.json", environment={"PYTHONIOENCODING": "ascii"}, stdout=out,
                preexec_fn=lambda: os.close(2),
            )  # fmt: skip
        assert done.returncode == 0
        table = Path("out").read_bytes()
        assert table.startswith(b"checkpoint")
        assert b"\\xb1" in table
        assert len(store.read(here / "o.json")) == 1

    @pytest.mark.parametrize("unbuffered", ["", "1"])
    @pytest.mark.parametrize("kind", ["full", "closed", "nobody reads"])
    def test_results_are_written_where_standard_output_cannot_be(self, tmp_path, kind, unbuffered):
        """All three standard streams may be closed: the next file that is opened must not take their place."""
        code = "import sys; from pathlib import Path; from sam_optim.core import errors, files\n"
        code += "def main(argv):\n    print('x' * 20000, flush=True)\n    print('y')\n"
        code += "    files.write_json(Path('o.json'), [1])\n    return 1\n"
        code += "sys.exit(errors.run(main))"
        shell = {
            "full": '"$@" >/dev/full',
            "closed": '"$@" <&- >&- 2>&-',
            "nobody reads": 'set -o pipefail; "$@" | true',
        }
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
        argv = ["bash", "-c", shell[kind], "bash", sys.executable, "-c", code]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert json.loads((tmp_path / "o.json").read_text()) == [1]
        full = "error: standard output cannot be written: No space left on device\n"
        assert (done.returncode, done.stderr) == ((2, full) if kind == "full" else (1, ""))

    def test_file_names_that_are_not_utf_8(self, here):
        study(here, count=1)
        os.rename("c0.pt", b"caf\xe9.pt")
        argv = ["--target", "study_problem:problem", "--measures", "trace", "--num-probes", 2]
        code, out, _ = run("measure", ".", *argv, "--json", "o.json", "--csv", "t.csv")
        assert code == 0
        assert out.count("caf") == 1
        assert run("report", "o.json", "-o", "r.html")[0] == 0


PROBLEM = ["--target", "study_problem:problem"]
MEASURE = [cli.main, "measure", "c0.pt", *PROBLEM, "--measures", "trace", "--num-probes", 2]
OUTPUTS = {  # every option that names one file of results, at the end
    "measure --json": [*MEASURE, "--json"],
    "measure --csv": [*MEASURE, "--csv"],
    "landscape": [cli.main, "landscape", "c0.pt", *PROBLEM, "--points", 3, "--out"],
    "report": [cli.main, "report", "o.json", "--out"],
    "host": [host.main, "--tensors", 2, "--rounds", 2, "--json"],
    "step": [step.main, "--rounds", 2, "--json"],
    "whole_step": [whole_step.main, "--rounds", 2, "--json"],
    "throughput": [throughput.main, "--rounds", 2, "--json"],
    "speed of measures": [speed_of_measures.main, "--rounds", 2, "--json"],
    "monitor": [monitor.main, "cost", "--json"],
    "edge --json": [edge.main, "--json"],
    "edge --out": [edge.main, "--out"],
    "diagonal_network --json": [diagonal_network.main, "--json"],
    "diagonal_network --out": [diagonal_network.main, "--out"],
    "lite0": [lite0.main, "c0.pt"],
    "lite0 --json": [lite0.main, "c0.pt", "t.pt", "--json"],
}


class TestOutputs:
    """Refused before anything is computed: most of these commands would take minutes."""

    def refused(self, capsys, name, path):
        main, *argv = OUTPUTS[name]
        before = sorted(os.listdir())
        assert errors.run(main, [str(word) for word in (*argv, path)]) == 2
        assert sorted(os.listdir()) == before
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    @pytest.mark.parametrize("name", OUTPUTS)
    def test_a_named_pipe_would_wait_for_a_reader(self, here, capsys, name):
        os.mkfifo("p.html")
        assert "p.html is a named pipe" in self.refused(capsys, name, "p.html")

    @pytest.mark.parametrize("name", OUTPUTS)
    def test_two_at_once(self, here, capsys, name):
        with locked(here / "o.html"):
            assert f"o.html is being written by process {os.getpid()}" in self.refused(capsys, name, "o.html")

    @pytest.mark.parametrize("path", ["/dev/nowhere", "/dev", "/dev/fd/999", "."])
    def test_what_cannot_become_a_file(self, here, capsys, path):
        assert "name a file for --json" in self.refused(capsys, "measure --json", path)

    def test_a_table_does_not_replace_a_file_of_something_else(self, here):
        study(here, count=1)
        before = Path("c0.pt").read_bytes()
        code, _, err = run(*MEASURE[1:], "--csv", "c0.pt")
        assert (code, err.count("\n")) == (2, 1)
        assert "c0.pt holds no table of `sam-optim measure` and is left alone" in err
        assert Path("c0.pt").read_bytes() == before
        Path("t.csv").touch()
        assert [run(*MEASURE[1:], "--csv", "t.csv")[0] for _ in range(2)] == [0, 0]

    def test_a_table_of_very_many_columns_would_take_hours(self, here):
        study(here, count=1)
        assert run(*MEASURE[1:], "--csv", "t.csv")[0] == 0
        Path("e.csv").write_text("checkpoint," + ",".join(map(str, range(10**5))) + "\nc0.pt" + ",1" * 10**5 + "\n")
        code, _, err = run("report", "t.csv", "--targets", "e.csv", "-o", "r.html")
        assert code == 2
        assert "--targets has 100,000 columns, more than 200; choose one with --target" in err

        columns = [f"m{i},m{i} error" for i in range(1000)]
        Path("t.csv").write_text(f"checkpoint,{','.join(columns)}\na{',1' * 2000}\n")
        code, _, err = run("report", "t.csv", "-o", "r.html")
        assert code == 2
        assert "the results have 1,000 columns of measures, more than 200" in err

    def test_a_pipe_of_the_process_is_written_to(self, here):
        """As `--json >(command)`."""
        study(here, count=1)
        source, target = os.pipe()
        assert run(*MEASURE[1:], "--json", f"/dev/fd/{target}")[0] == 0
        os.close(target)
        with open(source) as file:
            assert json.load(file)["format"] == store.FORMAT


class TestQuality:
    def test_loss_and_accuracy_stand_beside_every_checkpoint(self, here):
        path, x, y = images(here / "d.npz")
        for seed in range(2):
            torch.save(network(seed).state_dict(), f"c{seed}.pt")
        common = ["--model", "cnn3", "--data", path, "--measures", "trace", "--num-probes", 2, "--batch-size", 10]
        code, out, _ = run("measure", "c0.pt", "c1.pt", *common, "--json", "o.json", "--csv", "t.csv")
        assert code == 0
        head, _, *lines = out.splitlines()
        assert head.split() == ["checkpoint", "loss", "accuracy", "trace"]
        for seed, line, entry in zip(range(2), lines, store.read(here / "o.json"), strict=True):
            outputs = network(seed)(x).detach()
            loss = float(nn.functional.cross_entropy(outputs, y))
            accuracy = float((outputs.argmax(1) == y).double().mean())
            assert entry["quality"]["loss"] == pytest.approx(loss, rel=1e-6)
            assert entry["quality"]["accuracy"] == pytest.approx(accuracy, rel=1e-12)
            assert [float(word) for word in line.split()[1:3]] == pytest.approx([loss, accuracy], abs=1e-3)
        assert (here / "t.csv").read_text().splitlines()[0] == "checkpoint,loss,accuracy,trace,trace error"
        assert run("measure", "c0.pt", "c1.pt", *common, "--json", "o.json")[1] == out  # nothing is measured again

    def test_a_network_no_better_than_a_guess_on_its_training_data_has_a_warning(self, here):
        common = ["--model", "cnn3", "--data", "digits", "--measures", "gradient_regret", "--examples", 300, "--quiet"]
        torch.save(network(0).state_dict(), "c0.pt")
        _, _, err = run("measure", "c0.pt", *common)
        assert ("warning: c0.pt: the accuracy is no better than a guess") in err
        from sam_optim.vision.arrays import digits

        x, y = (v[:300] for v in digits())
        model = network(0)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        torch.save(model.state_dict(), "c1.pt")
        _, _, err = run("measure", "c1.pt", *common)
        assert "warning" not in err
        _, _, err = run("measure", "c0.pt", *common, "--split", "test")
        assert "warning" not in err

    def test_outputs_that_are_no_classes_have_a_loss_alone(self, here):
        def problem():
            torch.manual_seed(0)
            return nn.Linear(4, 1), nn.MSELoss(), [(torch.randn(5, 4), torch.randn(5, 1))]

        measures = sweep.Measures(["trace"], num_probes=2)
        measured = sweep.measure_checkpoints([], sweep.FunctionProblem(problem), measures)
        assert measured.text().split()[:3] == ["checkpoint", "loss", "trace"]
        model, criterion, [(x, y)] = problem()
        expected = float(criterion(model(x), y).detach())
        ((_, entry),) = measured.entries.items()
        assert entry["quality"] == {"loss": pytest.approx(expected, rel=1e-6)}


FAMILIES = ["gpt2", "bert", "vit"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_folders_of_save_pretrained_with_tied_weights_and_other_names(here, family):
    transformers = pytest.importorskip("transformers")
    tiny = {"vocab_size": 40, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    tiny |= {"intermediate_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    ids = torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    if family == "gpt2":
        kind, config = transformers.GPT2LMHeadModel, transformers.GPT2Config(n_positions=16, **tiny)
    elif family == "bert":
        kind, config = transformers.BertForMaskedLM, transformers.BertConfig(**tiny)
    else:
        config = transformers.ViTConfig(image_size=32, patch_size=16, num_labels=3, **tiny)
        kind, batch = transformers.ViTForImageClassification, {"pixel_values": torch.randn(2, 3, 32, 32)}
        batch |= {"labels": torch.tensor([0, 1])}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained, other = kind(config), kind(config)
    trained.save_pretrained(here / "model")
    problem = sweep.FunctionProblem(lambda: (other, None, [batch]))
    sweep.measure_checkpoints([here / "model"], problem, sweep.Measures(["average"], num_samples=2))
    for (name, w), v in zip(trained.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(w, v), name


def test_a_function_gets_what_the_user_named(here):
    torch.save(small(0).state_dict(), "c0.pt")
    (here / "folder").mkdir()
    torch.save(small(0).state_dict(), here / "folder" / "pytorch_model.bin")
    paths = []

    def problem(path):
        paths.append(path)
        return small(0), nn.CrossEntropyLoss(), [(torch.ones(2, 4), torch.tensor([0, 1]))]

    sweep.measure_checkpoints(
        ["c0.pt", "folder"], sweep.FunctionProblem(problem), sweep.Measures(["average"], num_samples=2)
    )
    assert paths == ["c0.pt", "folder"]


def test_json_is_strict(tmp_path):
    for content in ("NaN", "[Infinity]", "[" * 100_000, "1" * 5000, "\xff", ""):
        (tmp_path / "x.json").write_text(content, encoding="latin1")
        with pytest.raises(InputError, match=r"x\.json is not valid JSON"):
            read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "directions",
    ["0", [1], {"losses": "abc"}, {"losses": [[1, 2], [1]]}, {"losses": 3}, {"norms": "q"}],
    ids=str,
)
def test_a_landscape_with_other_directions_is_refused_in_one_line(tmp_path, capsys, directions):
    result = {"type": "Landscape", "coordinates": [[-1.0, 0.0, 1.0]], "losses": [1.0, 0.5, None], "settings": {"n": 3}}
    (tmp_path / "r.json").write_text(json.dumps(result | {"directions": {}}))
    argv = ["report", str(tmp_path / "r.json"), "--out", str(tmp_path / "page.html")]
    assert errors.run(cli.main, argv) == 0
    (tmp_path / "page.html").unlink()
    (tmp_path / "r.json").write_text(json.dumps(result | {"directions": directions}))
    capsys.readouterr()
    assert errors.run(cli.main, argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "changed" in err
    assert not (tmp_path / "page.html").exists()
