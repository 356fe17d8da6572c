"""Readers of files against thousands of damaged ones: an `InputError` of one line or a value, nothing else."""

import gzip
import io
import json
import pickle
import resource
import shutil
import tempfile
import time
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_frontier import PLAN

from benchmarks import command, finetune_text, pretrained
from benchmarks.corruptions import Published
from benchmarks.frontier import __main__ as frontier
from benchmarks.frontier import plan as frontier_plan
from benchmarks.frontier import report as frontier_report
from benchmarks.frontier import runs as frontier_runs
from benchmarks.study import __main__ as study
from benchmarks.study import config as study_config
from benchmarks.study.report import from_csv
from benchmarks.train import options
from benchmarks.train.data import other_labels
from sam_optim.core.errors import InputError
from sam_optim.core.files import read_json
from sam_optim.landscape import grid
from sam_optim.sweep import TextProblem, reports, store
from sam_optim.sweep.processes import Processes
from sam_optim.sweep.text import read_table
from sam_optim.vision import arrays, checkpoints, cifar, data, images

pytest.importorskip("timm")
pytest.importorskip("safetensors")
from safetensors.torch import save

SECONDS, MEMORY = 20, 2 << 30
EXAMPLES = 2000
FEWER = {"page": 60, "finetuned": 300}  # a page with pictures takes half a second, a model of transformers a tenth
ENTRY = {"checkpoint": "a", "key": "k", "column": "trace", "sha256": "0", "measure": "trace", "rho": 0.1}
ENTRY |= {"identity": {"checkpoint": "0", "loss": {"model": "m"}, "options": {"ball": {"rho": 0.1}}}, "data": {}}
RESULT = {"type": "Estimate", "value": 1.0, "stderr": 0.1, "num_samples": 3, "converged": True, "settings": {"m": 3}}
ENTRY |= {"result": RESULT | {"provenance": {"torch": "2"}}, "quality": {"loss": 1.0, "accuracy": 0.5, "chance": 0.1}}


def npz():
    np.savez_compressed(file := io.BytesIO(), x=np.arange(12.0).reshape(4, 3), y=np.arange(4))
    return file.getvalue()


def lzma():
    with (
        zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_LZMA) as archive,
        zipfile.ZipFile(io.BytesIO(npz())) as a,
    ):
        for name in a.namelist():
            archive.writestr(name, a.read(name))
    return file.getvalue()


def saved(**options):
    torch.save(
        {"state_dict": network(0, num_classes=2).state_dict(), "metric": np.float64(1)}, file := io.BytesIO(), **options
    )
    return file.getvalue()


def safetensors():
    return save(network(0, num_classes=2).state_dict())


def image(kind, mode="RGB"):
    Image.new(mode, (9, 7), 100).save(file := io.BytesIO(), kind)
    return file.getvalue()


def idx():
    return bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 3]) + bytes(range(18))


def batch():
    return pickle.dumps({"data": np.ones((2, 3072), np.uint8), "labels": [0, 1], "filenames": ["a", "b"]}, protocol=2)


def index():
    return json.dumps(
        {"metadata": {"total_size": 3}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    ).encode()


def config():
    about = {"image_size": [1, 8, 8], "preprocessing": {"mean": [0.5], "std": [0.2], "crop_pct": 1.0}}
    options = {"model": "cnn3", "model_kwargs": [], "label_noise": 0.1}
    return json.dumps({"options": options, "data": about}).encode()


def results():
    return json.dumps({"format": store.FORMAT, "entries": [ENTRY, ENTRY | {"checkpoint": "b"}]}).encode()


def result():
    curve = {
        "type": "Landscape",
        "coordinates": [[-1.0, 0.0, 1.0]],
        "losses": [1.0, 0.5, None],
        "directions": {"a": [1.0]},
    }
    return json.dumps(curve | {"settings": {"n": 3}, "provenance": {}}).encode()


def table():
    return b"checkpoint,loss,accuracy,trace,trace error,test_error\na.pt,1,0.5,2,0.1,3\nb.pt,1,0.5,3,0.1,4\n"


RECIPE = b"model: cnn3\nlr: 1e-1\nopt-kwargs: {nesterov: false}\nno-aug: true\nmean: [0.5, 0.4, 0.3]\ndata: folder\n"
STUDY = b"""name = "x"
[grid]
lr = [0.1, 0.2]
[grid.method]
sgd = {sam_rho = 0}
sam = {sam_rho = 0.1, adaptive = "filter"}
[fixed]
epochs = 3
opt_kwargs = {nesterov = false}
[[measures]]
names = ["worst"]
rho = 0.1
[evaluate]
test_examples = 5
[sampler]
trials = 2
"""
PAIRS = b"sentence1\tsentence2\tlabel\na\tb\t1\nc\td\t2\n"


def array(dtype):
    np.save(file := io.BytesIO(), np.zeros((20, 3, 3, 3), dtype))
    return file.getvalue()


def labels():
    np.savez(file := io.BytesIO(), human=np.arange(4), clean_label=np.arange(4))
    return file.getvalue()


def read_published(path):
    np.save(path.with_name("labels.npy"), np.zeros(20, np.int64))
    Published(path.parent).images("fog", 1)


def read_labels(path):
    path.with_name("fog.npy").write_bytes(array(np.uint8))
    Published(path.parent).check_labels(np.zeros(4, np.int64), in_order=True)


def read_plan(path):
    plan = frontier_plan.load(path)
    frontier.status(plan, path.parent / "runs")


def report(path):
    reports.write_report([path], path.with_name("page.html"))


def read_run(path):
    (path.parent / "checkpoints").mkdir(exist_ok=True)
    (path.parent / "checkpoints" / f"checkpoint-{1:09d}-{'0' * 16}.pt").write_bytes(b"")
    checkpoints.find([path.parent])


def read_class(path):
    for row in range(len(split := data.open_split(path.parents[1]))):
        split.picture(row, "RGB")


def xy():
    return {"x": torch.arange(12.0).reshape(4, 3), "y": torch.arange(4)}


def tensors():
    torch.save(xy(), file := io.BytesIO())
    return file.getvalue()


def record():
    about = {"method": "SAM", "condition": "", "candidate": {"sam_rho": 0.1}, "seed": 0, "tuning": True}
    about |= {"passes": 2.0, "cpu_seconds": 1.5, "validation_accuracy": 50.0, "test_accuracy": None}
    return json.dumps(about | {"failed": None, "provenance": {"torch": "2"}}).encode()


def compared():
    """The committed runs of one condition of a comparison."""
    content = read_json(frontier_report.RESULTS / "digits.json")
    first = dict(list(content["plan"]["conditions"].items())[:1])
    runs = [run for run in content["runs"] if run["condition"] in first and not run["tuning"]]
    return json.dumps(content | {"plan": content["plan"] | {"conditions": first}, "runs": runs}).encode()


def read_compared(path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(frontier_report, "RESULTS", path.parent)
        path.with_name("page.md").write_text(f"{frontier_report.BEGIN}\n{frontier_report.END}\n")
        frontier_report.write(path.with_name("page.md"))


def study_results():
    rows = [{"lr": 0.1 * (k % 3 + 1), "seed": k, "worst": k * 0.3 % 1, "test_error": k * 0.7 % 1} for k in range(9)]
    about = {"config": {"grid": {"lr": [], "seed": []}}}
    compared = [{"measure": "worst", "target": "test_error", "by_factor": {}}]
    return json.dumps({"models": rows, "about": about, "comparisons": compared, "failed": []}).encode()


def report_again(path):
    study.main(["report", "--csv", str(path), "--out", str(path.parent / "out"), "--resamples", "10"])


def status_of_study(folder, command="status"):
    config = folder.parent / "s.toml"
    config.write_text('name = "x"\n[grid]\nlr = [0.1]\n[fixed]\nepochs = 1\ntrain_examples = 60\n')
    study.main([command, str(config), "--out", str(folder)])


@cache
def finished_study():
    folder = Path(tempfile.mkdtemp()) / "run"
    status_of_study(folder, "run")
    return (folder / "study.db").read_bytes()


@cache
def text_model():
    transformers = pytest.importorskip("transformers")
    folder = Path(tempfile.mkdtemp())
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcd"]))
    sizes = {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
    }
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def of_text_model(name):
    def read(path):
        shutil.copytree(text_model(), path.parent, dirs_exist_ok=True)
        (path.parent / name).write_bytes(path.read_bytes())
        (path.parent / "t.tsv").write_text("sentence1\tlabel\na\t0\nb\t1\n")
        problem = TextProblem(path.parent / "t.tsv", ["sentence1"], max_length=8)
        (row,) = checkpoints.find([path.parent])
        problem.open(Processes(0, 1, torch.device("cpu")), [row]).loss(row).value()

    return lambda: (text_model() / name).read_bytes(), read


def of_finetuned(name):
    def read(path):
        shutil.copytree(text_model(), path.parent, dirs_exist_ok=True)
        (path.parent / name).write_bytes(path.read_bytes())
        finetune_text.model_of(finetune_text.Settings(model=str(path.parent), train=path, validation=path))

    return lambda: (text_model() / name).read_bytes(), read


# what a file is called -> (a good one, how it is read)
READERS = {
    "d.npz": (npz, arrays.from_file),
    "xy.pt": (tensors, arrays.from_file),
    "xy.safetensors": (lambda: save(xy()), arrays.from_file),
    "lzma.npz": (lzma, arrays.from_file),
    "c.pt": (saved, lambda path: checkpoints.read(checkpoints.find([path])[0])),
    "old.pt": (
        lambda: saved(_use_new_zipfile_serialization=False),
        lambda p: checkpoints.read(checkpoints.find([p])[0]),
    ),
    "c.safetensors": (safetensors, lambda path: checkpoints.read(checkpoints.find([path])[0])),
    "a/x.png": (lambda: image("PNG"), read_class),
    "a/y.png": (lambda: image("PNG", "I;16"), read_class),
    "a/x.jpg": (lambda: image("JPEG"), read_class),
    "a/x.gif": (lambda: image("GIF"), read_class),
    "a/x.webp": (lambda: image("WEBP"), read_class),
    "a/x.tif": (lambda: image("TIFF"), read_class),
    "train-images-idx3-ubyte": (idx, lambda path: arrays._idx(path.parent, "train-images-idx3", 3)),
    "train-images-idx3-ubyte.gz": (
        lambda: gzip.compress(idx()),
        lambda path: arrays._idx(path.parent, "train-images-idx3", 3),
    ),
    "batch": (batch, lambda path: cifar._read_file(path, "labels")),
    "model.safetensors.index.json": (index, lambda path: checkpoints.find([path.parent])),
    "config.json": (config, read_run),
    "numbers.json": (lambda: b'{"cat": 0, "dog": 1}', images.read_class_to_idx),
    "o.json": (results, store.read),
    "page of o.json": (results, report),
    "page of r.json": (result, report),
    "t.csv": (table, reports._read_csv),
    "page of t.csv": (table, report),
    "any.json": (results, read_json),
    "run/config.json": (config, lambda path: options.of_run(path.parent)),
    "c.yaml": (lambda: RECIPE, lambda path: options.parse(["--config", str(path), "--out", "x"])),
    "s.toml": (lambda: STUDY, study_config.load),
    "s.yaml": (lambda: json.dumps(tomllib.loads(STUDY.decode())).encode(), study_config.load),
    "plan.toml": (PLAN.encode, read_plan),
    "m.jsonl": (lambda: b'{"epoch": 1, "loss": 0.5}\n{"epoch": 2}\n', command.read_jsonl),
    "models.csv": (table, lambda path: from_csv(path, ["trace"], ["test_error"], ["loss"])),
    "text.tsv": (lambda: PAIRS, lambda path: read_table(path, ["sentence1", "label"])),
    "pairs.tsv": (lambda: PAIRS, finetune_text.read),
    "pairs.jsonl": (lambda: b'{"premise": "a", "hypothesis": "b", "label": 1}\n' * 2, finetune_text.read),
    "fog.npy": (lambda: array(np.uint8), read_published),
    "labels.npy": (lambda: array(np.int64), read_labels),
    "errors.csv": (
        lambda: b"checkpoint,sha256,data,test_error\na.pt,0,1,3.5\nb.pt,2,1,4\n",
        pretrained.read_errors,
    ),
    "record.json": (record, frontier_runs.read_record),
    "page of frontier.json": (compared, read_compared),
    "page of results.json": (study_results, report_again),
    "study.db": (finished_study, lambda path: status_of_study(path.parent)),
    "grid.json": (
        lambda: b'{"key": "k", "losses": ["0x1.0p+0", "0x1.8p+1"]}',
        lambda path: grid._finished(path, "k"),
    ),
    "text/config.json": of_text_model("config.json"),
    "page/tokenizer.json": of_text_model("tokenizer.json"),
    "finetuned/config.json": of_finetuned("config.json"),
    "finetuned/model.safetensors": of_finetuned("model.safetensors"),
    "labels.npz": (labels, lambda path: other_labels(f"{path}:human", torch.arange(4), 4, path.parent)),
}


@st.composite
def damaged(draw, content):
    """The content with some bytes changed, inserted, removed or repeated, or its end cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, max(len(changed) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "set", "insert", "remove", "repeat", "cut"]))
        if kind == "flip" and changed:
            changed[i] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            word = draw(
                st.sampled_from(
                    [b"\xff" * 4, b"\0" * 4, b"[[[[", b'"1"', b"[]", b"{}", b"null", b"1e999", b"-1", b"true"]
                )
            )
            changed[i : i + len(word)] = word
        elif kind == "insert":
            changed[i:i] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "remove":
            del changed[i : i + draw(st.integers(1, 16))]
        elif kind == "repeat":
            changed[i:i] = changed[i : i + draw(st.integers(1, 64))]
        else:
            del changed[i:]
    return bytes(changed)


@st.composite
def other_values(draw, content):
    """The same JSON with another value in some place."""
    value = json.loads(content)
    places = [(value, key) for key in value]
    for holder, key in places:
        inside = holder[key]
        if isinstance(inside, (dict, list)):
            places += [(inside, k) for k in (inside if isinstance(inside, dict) else range(len(inside)))]
    holder, key = draw(st.sampled_from(places))
    simple = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    holder[key] = draw(simple | st.lists(simple, max_size=3) | st.dictionaries(st.text(max_size=3), simple, max_size=3))
    return json.dumps(value).encode()


def read_or_refuse(path: Path, content: bytes, reader) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    started = time.process_time()  # of this process: beside other work the clock on the wall says little
    try:
        reader(path)
    except (InputError, OSError) as error:
        assert isinstance(error, OSError) or "\n" not in str(error)  # noqa: PT017
    assert time.process_time() - started < SECONDS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path_factory):
    make, reader = READERS[name]
    content = make()
    path = tmp_path_factory.mktemp("fuzz") / "data" / name
    read_or_refuse(path, content, reader)
    reader(path)  # the good one is read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    contents = damaged(content)
    if name.endswith((".json", "s.yaml")):
        contents = contents | other_values(content)

    @settings(
        max_examples=next((FEWER[kind] for kind in FEWER if name.startswith(kind)), EXAMPLES),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(contents)
    def try_it(content):
        read_or_refuse(path, content, reader)

    try_it()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
