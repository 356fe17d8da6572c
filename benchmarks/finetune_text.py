"""Fine-tune a Hugging Face classifier of sentence pairs with SAM, on local files in the format of MNLI.

    python -m benchmarks.finetune_text --model DIR --train train.tsv --validation dev_matched.tsv --sam-rho 0.05

The defaults are those of Hugging Face's run_glue example: 3 epochs, batches of 32, learning rate 2e-5, 128 tokens; for
the radius no source was found. Files are TSV with the names of the columns in the first line (MNLI's: sentence1,
sentence2, gold_label) or JSON Lines with those keys, or premise, hypothesis, label. Examples without a label ("-", -1)
are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from benchmarks import command
from benchmarks.command import InputError, one_line
from benchmarks.train import options
from sam_optim.core.results import provenance

LABELS = ("entailment", "neutral", "contradiction")
FIRST, SECOND, LABEL = ("sentence1", "premise", "question1"), ("sentence2", "hypothesis"), ("gold_label", "label")
FAULTS = (OSError, ValueError, RuntimeError, KeyError, ImportError)


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
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix in (".jsonl", ".json"):
                records: list[dict[str, Any]] = [json.loads(line) for line in file if line.strip()]
            else:
                records = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
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


def trainer(args: argparse.Namespace) -> Any:
    """The Trainer of these options: SAMTrainer where --sam-rho is not 0."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    from sam_optim import asam_param_groups
    from sam_optim.integrations.transformers import SAMTrainer

    files = {"train_dataset": read(args.train), "eval_dataset": read(args.validation)}
    if not Path(args.model).is_dir():
        raise InputError(
            f"--model {args.model} is not a directory; give one with the model and tokenizer, nothing is loaded"
        )
    torch.manual_seed(args.seed)  # of a new head, or of all weights with --scratch
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        if args.scratch:
            config = AutoConfig.from_pretrained(args.model, local_files_only=True, num_labels=len(LABELS))
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                args.model, local_files_only=True, num_labels=len(LABELS)
            )
    except FAULTS as error:
        raise InputError(f"--model {args.model} holds no model with its tokenizer: {one_line(error)}") from None
    if args.grad_checkpointing:
        model.gradient_checkpointing_enable()
    arguments = TrainingArguments(
        str(args.out),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=max(args.batch_size, 64),
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        warmup_steps=args.warmup_steps,
        bf16=args.bf16,
        seed=args.seed,
        use_cpu=args.device == "cpu",
        save_strategy="epoch" if args.save else "no",
        report_to="none",
    )
    sam: dict[str, Any] = {}
    if args.sam_rho:
        sam = {"rho": args.sam_rho, "param_groups": asam_param_groups if args.adaptive else None}
    data = {key: Tokens(pairs, tokenizer, args.length) for key, pairs in files.items()}
    return (SAMTrainer if sam else Trainer)(model, arguments, **data, **sam, compute_metrics=accuracy)


def parser() -> argparse.ArgumentParser:
    p = options.Parser(prog="python -m benchmarks.finetune_text", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--model", required=True, metavar="DIR", help="of save_pretrained, with the tokenizer")
    p.add_argument("--train", type=Path, required=True, metavar="FILE")
    p.add_argument("--validation", type=Path, required=True, metavar="FILE")
    p.add_argument("--out", type=Path, default=Path("runs/text"))
    p.add_argument("--sam-rho", type=float, default=0.0, help="radius; 0 (default) is the base optimizer, AdamW")
    p.add_argument("--adaptive", action="store_true", help="ASAM, T = 1 for biases and normalisation parameters")
    p.add_argument("--lr", type=float, default=2e-5)
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--warmup-steps", type=int, default=0)
    p.add_argument("--epochs", type=float, default=3.0)
    p.add_argument("--max-steps", type=int, default=-1, help="stop earlier")
    p.add_argument("--batch-size", type=int, default=32, help="of each process")
    p.add_argument("--accumulate", type=int, default=1, help="batches for one update, each with its own perturbation")
    p.add_argument("--length", type=int, default=128, help="tokens of a pair")
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--grad-checkpointing", action="store_true")
    p.add_argument("--scratch", action="store_true", help="random weights of the model's configuration")
    p.add_argument("--save", action="store_true", help="the Trainer's checkpoints, after each epoch")
    p.add_argument("--device", choices=("auto", "cpu"), default="auto")
    p.add_argument("--seed", type=int, default=0)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.sam_rho < 0:
        raise InputError(f"--sam-rho is a radius and must be >= 0, got {args.sam_rho}")
    if args.adaptive and not args.sam_rho:
        raise InputError("--adaptive needs a radius: give --sam-rho, e.g. 0.5")
    made = trainer(args)
    trained = made.train()
    found = made.evaluate()
    if made.is_world_process_zero():
        report = {"train_loss": trained.training_loss, "updates": made.state.global_step}
        report |= {key: found[f"eval_{key}"] for key in ("loss", "accuracy")}
        print(f"validation loss {report['loss']:.4f}  accuracy {report['accuracy']:.4f}")
        kept = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.out.mkdir(parents=True, exist_ok=True)
        command.write_json(args.out / "result.json", {"options": kept, "provenance": provenance(), **report})
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
