"""Fine-tune a Hugging Face classifier of sentence pairs with SAM, on local files in the format of MNLI.

    python -m benchmarks.finetune_text --model DIR --train train.tsv --validation dev_matched.tsv --sam-rho 0.05

The defaults are those of Hugging Face's run_glue example: 3 epochs, batches of 32, learning rate 2e-5, 128 tokens; for
the radius no source was found. Files are TSV with the names of the columns in the first line (MNLI's: sentence1,
sentence2, gold_label; or SICK's) or JSON Lines with those keys, or premise, hypothesis, label. Examples without a label
("-", -1) are left out.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from benchmarks.command import option, settings_of
from benchmarks.train.data import noisy
from benchmarks.train.order import derive
from benchmarks.train.recipe import sam_schedule
from sam_optim.core.arguments import number
from sam_optim.core.errors import InputError, one_line, run
from sam_optim.core.files import locked, read_bytes, write_json
from sam_optim.core.random import Stream
from sam_optim.core.results import plain, provenance
from sam_optim.sweep.processes import is_first_process
from sam_optim.vision import checkpoints

LABELS = ("entailment", "neutral", "contradiction")
FIRST, SECOND = ("sentence1", "premise", "question1", "sentence_A"), ("sentence2", "hypothesis", "sentence_B")
LABEL = ("gold_label", "label", "entailment_judgment")


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = option(help="a folder of save_pretrained, with the tokenizer", metavar="DIR")
    train: Path = option(type=Path, metavar="FILE")
    validation: Path = option(type=Path, metavar="FILE")
    test: list[Path] = option(
        [], "evaluated together after training, also on the pairs where word overlap misleads", type=Path, nargs="*"
    )
    train_examples: int = option(
        0, "number of training examples, drawn by --seed; 0 (default): all", type=number(int, 0)
    )
    label_noise: float = option(0.0, "share of the training labels that is redrawn at random", type=number(float, 0, 1))
    out: Path = option(Path("runs/text"), type=Path)
    sam_rho: float = option(0.0, "radius of SAM; 0 (default): the base optimizer, AdamW", type=number(float, 0))
    adaptive: bool = option(False, "ASAM, with T = 1 for biases and normalization parameters", action="store_true")
    sam_norm_only: bool = option(False, "SAM-ON: perturb only normalization parameters", action="store_true")
    sam_schedule: str | None = option(None, "as for benchmarks.train, e.g. late_phase:0.7")
    lr: float = option(2e-5, type=float)
    weight_decay: float = option(0.0, type=float)
    warmup_steps: int = option(0, type=int)
    epochs: float = option(3.0, type=float)
    max_steps: int = option(-1, "updates, if fewer than --epochs gives", type=int)
    batch_size: int = option(32, "of each process", type=int)
    accumulate: int = option(1, "batches in one update, each with its own perturbation", type=int)
    length: int = option(128, "largest number of tokens of a pair (default: 128)", type=int)
    bf16: bool = option(False, action="store_true")
    grad_checkpointing: bool = option(False, action="store_true")
    scratch: bool = option(False, "start from random weights, with the model's configuration", action="store_true")
    save: bool = option(False, "save the Trainer's checkpoints after each epoch", action="store_true")
    device: str = option("auto", choices=("auto", "cpu"))
    seed: int = option(0, type=int)


class Pair(NamedTuple):
    first: str
    second: str
    label: int


def read(path: Path) -> list[Pair]:
    """Sentence pairs with labels 0, 1, 2: `LABELS` in that order, as Hugging Face's copy of MNLI has them.

    Raises:
        InputError: the file or a column is missing, a line is not JSON, a label is none of `LABELS` or 0, 1, 2.
    """
    try:
        lines = io.StringIO(read_bytes(path).decode(), newline="")
        if path.suffix in (".jsonl", ".json"):
            records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
        else:
            records = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None
    pairs = []
    for i, record in enumerate(records):
        first, second, label = (_field(record, names, path, i) for names in (FIRST, SECOND, LABEL))
        label = label.lower() if isinstance(label, str) else label
        if label in ("-", -1, "-1", None):
            continue
        if label not in LABELS and str(label) not in ("0", "1", "2"):
            raise InputError(f"{path}, example {i + 1}: label {label!r} is not one of {', '.join(LABELS)}, 0, 1, 2")
        pairs.append(Pair(str(first), str(second), LABELS.index(label) if label in LABELS else int(label)))
    if not pairs:
        raise InputError(f"{path} has no labelled examples")
    return pairs


def _field(record: Any, names: tuple[str, ...], path: Path, i: int) -> Any:
    for name in names:
        if isinstance(record, dict) and name in record:
            return record[name]
    raise InputError(f"{path}, example {i + 1} has no {' or '.join(names)}")


def drawn(pairs: list[Pair], settings: Settings) -> list[Pair]:
    """--train-examples of them, with --label-noise, by --seed."""
    num = settings.train_examples or len(pairs)
    if num > len(pairs):
        raise InputError(f"there are {len(pairs)} examples to train on, so --train-examples cannot be {num}")
    rows = Stream(derive(settings.seed, "examples")).permutation(len(pairs))[:num].tolist()
    labels = noisy(torch.tensor([pairs[i].label for i in rows]), len(LABELS), settings.label_noise, settings.seed)
    return [pairs[i]._replace(label=label) for i, label in zip(rows, labels.tolist(), strict=True)]


def misleading(train: list[Pair], test: list[Pair]) -> list[Pair]:
    """Pairs of `test` on which a model of word overlap is wrong: it says entailment from that Jaccard index on which is
    best on `train`. HANS (arXiv:1902.01007) in small."""

    def overlap(pair: Pair) -> float:
        a, b = (set(re.findall(r"\w+", text.lower())) for text in (pair.first, pair.second))
        return len(a & b) / max(len(a | b), 1)

    overlaps = [(overlap(pair), pair.label == 0) for pair in train]
    threshold = max(
        sorted({x for x, _ in overlaps}), key=lambda t: sum((x >= t) == entailed for x, entailed in overlaps)
    )
    return [pair for pair in test if (overlap(pair) >= threshold) != (pair.label == 0)]


class Tokens(Dataset):
    """Pairs as the model takes them, at most `length` tokens each; a batch is padded to its longest pair."""

    def __init__(self, pairs: list[Pair], tokenizer: Any, length: int):
        first, second = [p.first for p in pairs], [p.second for p in pairs]
        self.encoded = tokenizer(first, second, truncation=True, max_length=length)
        self.labels = [p.label for p in pairs]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {key: value[i] for key, value in self.encoded.items()} | {"labels": self.labels[i]}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def model_of(settings: Settings) -> tuple[Any, Any]:
    """The tokenizer and the classifier in the folder --model; runs no code of it, and loads nothing from a hub."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    if not Path(settings.model).is_dir():
        raise InputError(
            f"--model {settings.model} is not a directory; give one with the model and tokenizer, nothing is loaded"
        )
    safely: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, **safely)
        config = AutoConfig.from_pretrained(settings.model, num_labels=len(LABELS), **safely)
        if "/" in str(config._attn_implementation):
            raise InputError(f"its attention is {config._attn_implementation!r}, which would be downloaded and run")
        torch.manual_seed(settings.seed)  # of a new head, or of all weights with --scratch
        with torch.device("cpu" if settings.scratch else "meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        if not settings.scratch:
            (checkpoint,) = checkpoints.find([settings.model])
            state = _fitted(model, checkpoints.read(checkpoint).state)
            torch.manual_seed(settings.seed)
            model = type(model).from_pretrained(None, config=config, state_dict=state)
    except Exception as error:  # whatever transformers makes of a damaged file
        raise InputError(f"--model {settings.model} holds no model with its tokenizer: {one_line(error)}") from None
    return tokenizer, model


def trainer_of(settings: Settings) -> Any:
    """The Trainer of these options: SAMTrainer where --sam-rho is not 0."""
    from transformers import Trainer, TrainingArguments

    from sam_optim import asam_param_groups, norm_only_param_groups
    from sam_optim.integrations.transformers import SAMTrainer

    pairs = {"train_dataset": drawn(read(settings.train), settings), "eval_dataset": read(settings.validation)}
    tokenizer, model = model_of(settings)
    if settings.grad_checkpointing:
        model.gradient_checkpointing_enable()
    arguments = TrainingArguments(
        str(settings.out),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=max(settings.batch_size, 64),
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        bf16=settings.bf16,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        save_strategy="epoch" if settings.save else "no",
        report_to="none",
    )
    sam: dict[str, Any] = {}
    if settings.sam_rho:
        groups = norm_only_param_groups if settings.sam_norm_only else asam_param_groups if settings.adaptive else None
        sam = {"rho": settings.sam_rho, "param_groups": groups}
    if settings.sam_schedule:
        each = -(-len(pairs["train_dataset"]) // (settings.batch_size * settings.accumulate))
        updates = settings.max_steps if settings.max_steps > 0 else math.ceil(each * settings.epochs)
        sam["schedule"] = sam_schedule(settings.sam_schedule, updates)
    data: dict[str, Any] = {key: Tokens(chosen, tokenizer, settings.length) for key, chosen in pairs.items()}
    data |= {"processing_class": tokenizer, "compute_metrics": accuracy}
    return (SAMTrainer if sam else Trainer)(model, arguments, **data, **sam)


def _fitted(model: torch.nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights, without a head for other classes, which is drawn anew like one that is missing.

    Raises:
        InputError: not the layers, or not the shapes, that config.json says. transformers would draw those layers that
            are missing, and leave out those that are too many.
    """
    prefix, wanted = f"{model.base_model_prefix}.", model.state_dict()
    pattern = re.compile(r"(.+?)\.(\d+)\.")
    numbered = [
        {match.groups() for name in names if (match := pattern.match(name.removeprefix(prefix)))}
        for names in (wanted, state)
    ]
    for layers in {name for name, _ in numbered[0]} & {name for name, _ in numbered[1]}:
        here, there = (sum(name == layers for name, _ in pairs) for pairs in numbered)
        if here != there:
            raise InputError(f"its config.json says {here} of {layers}, its weights have {there}")
    fitted = {}
    for name, x in state.items():
        full = name if name in wanted else prefix + name
        if full in wanted and x.shape != wanted[full].shape:
            if not full.startswith(prefix):
                continue
            shapes = f"{tuple(wanted[full].shape)}, its weights have {tuple(x.shape)}"
            raise InputError(f"its config.json gives {full} the shape {shapes}")
        fitted[name] = x
    return fitted


def main(argv: Sequence[str] | None = None) -> int:
    settings = settings_of(Settings, "python -m benchmarks.finetune_text", __doc__, argv)
    with locked(settings.out.resolve()) if is_first_process() else nullcontext():
        report = finetune(settings)
        if report:
            print(f"validation loss {report['loss']:.4f}  accuracy {report['accuracy']:.4f}")
            options = json.loads(json.dumps(asdict(settings), default=str))
            settings.out.mkdir(parents=True, exist_ok=True)
            write_json(settings.out / "result.json", plain({"options": options, "provenance": provenance(), **report}))
    return 0


def finetune(settings: Settings) -> dict[str, Any]:
    """Trains and evaluates; what is reported, on one process. `passes`: forward and backward, of the model, in epochs.

    Raises:
        InputError: an option of SAM without --sam-rho.
    """
    for name in ("adaptive", "sam_norm_only", "sam_schedule"):
        if getattr(settings, name) and not settings.sam_rho:
            raise InputError(f"--{name.replace('_', '-')} needs a radius: give --sam-rho, e.g. 0.5")
    trainer = trainer_of(settings)
    counted = Counted(trainer.model)
    trained = trainer.train()
    evaluated = trainer.evaluate()
    if not trainer.is_world_process_zero():
        return {}
    report = {"train_loss": trained.training_loss, "updates": trainer.state.global_step}
    report |= {key: evaluated[f"eval_{key}"] for key in ("loss", "accuracy")}
    report |= {"passes": counted.examples / len(trainer.train_dataset), "test": {}}
    if settings.test:
        pairs = [pair for path in settings.test for pair in read(path)]
        pairs.sort(key=lambda pair: len(pair.first) + len(pair.second))  # batches of like lengths
        predicted = trainer.predict(Tokens(pairs, trainer.processing_class, settings.length))
        right = dict(zip(pairs, (predicted.predictions.argmax(-1) == predicted.label_ids).tolist(), strict=True))
        for name, chosen in (("test", pairs), ("misleading", misleading(read(settings.train), pairs))):
            if chosen:
                report["test"][name] = mean(right[pair] for pair in chosen)
    return report


class Counted:
    """Examples that a model has seen in training mode."""

    def __init__(self, model: torch.nn.Module):
        self.examples = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if model.training:
            self.examples += len(kwargs["labels"])


if __name__ == "__main__":
    sys.exit(run(main))
