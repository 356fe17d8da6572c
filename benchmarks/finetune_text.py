"""Fine-tune a Hugging Face classifier of sentence pairs with SAM, on local files in the format of MNLI.

    python -m benchmarks.finetune_text --model DIR --train train.tsv --validation dev_matched.tsv --sam-rho 0.05

The defaults are those of Hugging Face's run_glue example: 3 epochs, batches of 32, learning rate 2e-5, 128 tokens; for
the radius no source was found. Files are TSV with the names of the columns in the first line (MNLI's: sentence1,
sentence2, gold_label) or JSON Lines with those keys, or premise, hypothesis, label. Examples without a label ("-", -1)
are left out.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from benchmarks.command import option, settings_of
from sam_optim.core.arguments import number
from sam_optim.core.errors import InputError, one_line, run
from sam_optim.core.files import read_bytes, write_json
from sam_optim.core.results import provenance

LABELS = ("entailment", "neutral", "contradiction")
FIRST, SECOND, LABEL = ("sentence1", "premise", "question1"), ("sentence2", "hypothesis"), ("gold_label", "label")
FAULTS = (OSError, ValueError, RuntimeError, KeyError, ImportError)


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = option(help="of save_pretrained, with the tokenizer", metavar="DIR")
    train: Path = option(type=Path, metavar="FILE")
    validation: Path = option(type=Path, metavar="FILE")
    out: Path = option(Path("runs/text"), type=Path)
    sam_rho: float = option(0.0, "radius; 0 (default) is the base optimizer, AdamW", type=number(float, 0))
    adaptive: bool = option(False, "ASAM, T = 1 for biases and normalization parameters", action="store_true")
    lr: float = option(2e-5, type=float)
    weight_decay: float = option(0.0, type=float)
    warmup_steps: int = option(0, type=int)
    epochs: float = option(3.0, type=float)
    max_steps: int = option(-1, "stop earlier", type=int)
    batch_size: int = option(32, "of each process", type=int)
    accumulate: int = option(1, "batches for one update, each with its own perturbation", type=int)
    length: int = option(128, "tokens of a pair", type=int)
    bf16: bool = option(False, action="store_true")
    grad_checkpointing: bool = option(False, action="store_true")
    scratch: bool = option(False, "random weights of the model's configuration", action="store_true")
    save: bool = option(False, "the Trainer's checkpoints, after each epoch", action="store_true")
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
        if label in ("-", -1, "-1", None):
            continue
        if label not in LABELS and str(label) not in ("0", "1", "2"):
            raise InputError(f"{path}, example {i + 1}: label {label!r} is none of {', '.join(LABELS)}, 0, 1, 2")
        pairs.append(Pair(str(first), str(second), LABELS.index(label) if label in LABELS else int(label)))
    if not pairs:
        raise InputError(f"{path} has no labelled examples")
    return pairs


def _field(record: Any, names: tuple[str, ...], path: Path, i: int) -> Any:
    for name in names:
        if isinstance(record, dict) and name in record:
            return record[name]
    raise InputError(f"{path}, example {i + 1} has no {' or '.join(names)}")


class Tokens(Dataset):
    """Pairs as the model takes them, padded to `length`."""

    def __init__(self, pairs: list[Pair], tokenizer: Any, length: int):
        first, second = [p.first for p in pairs], [p.second for p in pairs]
        self.encoded = tokenizer(
            first, second, truncation=True, padding="max_length", max_length=length, return_tensors="pt"
        )
        self.labels = torch.tensor([p.label for p in pairs])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {key: value[i] for key, value in self.encoded.items()} | {"labels": self.labels[i]}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(settings: Settings) -> Any:
    """The Trainer of these options: SAMTrainer where --sam-rho is not 0."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    from sam_optim import asam_param_groups
    from sam_optim.integrations.transformers import SAMTrainer

    files = {"train_dataset": read(settings.train), "eval_dataset": read(settings.validation)}
    if not Path(settings.model).is_dir():
        raise InputError(
            f"--model {settings.model} is not a directory; give one with the model and tokenizer, nothing is loaded"
        )
    torch.manual_seed(settings.seed)  # of a new head, or of all weights with --scratch
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
        if settings.scratch:
            config = AutoConfig.from_pretrained(settings.model, local_files_only=True, num_labels=len(LABELS))
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                settings.model, local_files_only=True, num_labels=len(LABELS)
            )
    except FAULTS as error:
        raise InputError(f"--model {settings.model} holds no model with its tokenizer: {one_line(error)}") from None
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
        sam = {"rho": settings.sam_rho, "param_groups": asam_param_groups if settings.adaptive else None}
    data = {key: Tokens(pairs, tokenizer, settings.length) for key, pairs in files.items()}
    return (SAMTrainer if sam else Trainer)(model, arguments, **data, **sam, compute_metrics=accuracy)


def main(argv: Sequence[str] | None = None) -> int:
    settings = settings_of(Settings, "python -m benchmarks.finetune_text", __doc__, argv)
    if settings.adaptive and not settings.sam_rho:
        raise InputError("--adaptive needs a radius: give --sam-rho, e.g. 0.5")
    trainer = trainer_of(settings)
    trained = trainer.train()
    evaluated = trainer.evaluate()
    if trainer.is_world_process_zero():
        report = {"train_loss": trained.training_loss, "updates": trainer.state.global_step}
        report |= {key: evaluated[f"eval_{key}"] for key in ("loss", "accuracy")}
        print(f"validation loss {report['loss']:.4f}  accuracy {report['accuracy']:.4f}")
        options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
        settings.out.mkdir(parents=True, exist_ok=True)
        write_json(settings.out / "result.json", {"options": options, "provenance": provenance(), **report})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
