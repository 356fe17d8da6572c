"""Cross-entropy of a fine-tuned transformer over the lines of a table of texts."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core.errors import InputError, one_line, unknown
from sam_optim.core.files import read_bytes
from sam_optim.core.random import Stream
from sam_optim.core.results import plain
from sam_optim.loss import Loss
from sam_optim.sweep.processes import Processes
from sam_optim.sweep.settings import Losses, Settings
from sam_optim.vision import weights
from sam_optim.vision.checkpoints import Checkpoint
from sam_optim.vision.images import read_class_to_idx


@dataclass(frozen=True)
class TextProblem(Settings):
    """Cross-entropy of models for the classification of texts, each a folder of `save_pretrained` with its tokenizer.

    Args:
        text: .csv, or .tsv and .txt with tabs; the first line names the columns.
        text_columns: one, or two for pairs of texts. label_column: classes, by name or number.
        class_to_idx: a JSON file with the number of each name; None: what the config.json of the model says.
        max_length: tokens of an example; longer ones are cut off.
        examples, order, batch_size: as in `ImageProblem`.
        ema, key, normalize_logits, batch_statistics, dtype: as in `Settings`.
    """

    text: Path
    text_columns: Sequence[str]
    label_column: str = "label"
    class_to_idx: Path | None = None
    max_length: int = 128
    examples: int = 512
    order: str = "file"
    batch_size: int = 128

    @property
    def name(self) -> str:
        return str(self.text)

    def open(self, here: Processes, rows: Sequence[Checkpoint]) -> TextLosses:
        if not rows:
            raise InputError("no CHECKPOINT is given; name folders of save_pretrained")
        return TextLosses(self, here)


class TextLosses(Losses):
    is_training = True  # a table of the task that the model was fine-tuned for

    def __init__(self, problem: TextProblem, here: Processes):
        super().__init__(problem, here)
        self._problem = problem
        self._numbers = read_class_to_idx(problem.class_to_idx) if problem.class_to_idx else None
        lines = read_table(problem.text, [*problem.text_columns, problem.label_column])
        count = min(problem.examples or len(lines), len(lines))
        order = Stream(0).permutation(len(lines)).tolist() if problem.order == "mixed" else range(len(lines))
        self._lines = [lines[i] for i in order[:count]]
        self.notes = [f"{count} of {len(lines)} lines of {problem.text}"]
        self._cached: tuple[str, Any, list[dict[str, Tensor]]] = ("", None, [])
        self._num_cut = 0  # examples of the cached batches that are longer than max_length

    @property
    def about(self) -> dict[str, Any]:
        problem = self._problem
        about = {"source": "text", "columns": [*problem.text_columns, problem.label_column]}
        return about | {"examples": len(self._lines), "order": problem.order, "max_length": problem.max_length}

    def identity(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        assert checkpoint is not None
        config, batches = self._prepare(checkpoint)
        content = hashlib.sha256()
        for batch in batches:
            for name, x in sorted(batch.items()):
                content.update(f"{name} {tuple(x.shape)}".encode() + x.contiguous().numpy().tobytes())
        about = {"model": plain(config.to_dict()), "data": content.hexdigest()[:16]}
        return self._identity() | about | {"batch_size": self._problem.batch_size}

    def loss(self, checkpoint: Checkpoint | None) -> Loss:
        assert checkpoint is not None
        config, batches = self._prepare(checkpoint)
        if getattr(config, "quantization_config", None):
            raise InputError(f"{checkpoint.name} is quantized; give the weights that it was made from")
        kind = _transformers().AutoModelForSequenceClassification
        # eager attention: a file may name another implementation, which would be downloaded
        state = self._read(checkpoint)
        try:
            with weights.limited(state, checkpoint.name):
                model = kind.from_config(config, attn_implementation="eager", trust_remote_code=False)
        except InputError:
            raise
        except Exception as error:  # whatever transformers makes of a damaged file
            reason = one_line(error)[:200]
            raise InputError(f"{checkpoint.name} is not a text classifier of transformers: {reason}") from None
        model.load_state_dict(self.state(checkpoint, model), strict=False)
        if self._num_cut:
            limit = f"{self._problem.max_length} tokens (--max-length)"
            cut = f"{self._num_cut} of {len(self._lines)} texts are cut at {limit}"
            self.choice = "; ".join(filter(None, (self.choice, cut)))
        return self._loss(model, nn.CrossEntropyLoss(), self._here.share(batches))

    def state(self, checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
        return weights.fitted_or_converted(model, self._read(checkpoint, model), checkpoint.name)

    def _prepare(self, checkpoint: Checkpoint) -> tuple[Any, list[dict[str, Tensor]]]:
        """The configuration of the model, and the batches made by its tokenizer."""
        if self._cached[0] != checkpoint.name:
            folder = Path(checkpoint.name)
            if not (folder / "config.json").is_file():
                raise InputError(f"{folder} is not a folder of save_pretrained: it has no config.json")
            library = _transformers()
            safely: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            try:
                config = library.AutoConfig.from_pretrained(str(folder), **safely)
                tokenizer = library.AutoTokenizer.from_pretrained(str(folder), **safely)
            except Exception as error:  # whatever transformers makes of a damaged file
                reason = one_line(error)[:200]
                raise InputError(f"{folder} has no model or tokenizer of transformers: {reason}") from None
            for name in config.architectures or ():
                if not name.endswith("ForSequenceClassification"):
                    raise InputError(
                        f"{folder} holds a {name}, and --text measures classifiers of texts; its own loss, such as "
                        "that of the next token, needs --target with a function that returns (model, None, batches)"
                    )
            self._cached = (checkpoint.name, config, self._batches(config, tokenizer))
        return self._cached[1], self._cached[2]

    def _batches(self, config: Any, tokenizer: Any) -> list[dict[str, Tensor]]:
        problem = self._problem
        numbers = self._numbers or {str(name): int(i) for name, i in (config.label2id or {}).items()}
        labels = class_numbers([line[problem.label_column] for line in self._lines], numbers, config.num_labels)
        options = {"padding": True, "truncation": True, "max_length": problem.max_length, "return_tensors": "pt"}
        around = tokenizer.num_special_tokens_to_add(pair=len(problem.text_columns) == 2)
        if problem.max_length <= around:
            raise InputError(
                f"--max-length {problem.max_length} leaves nothing of a text: {around} tokens stand around it"
            )
        holds = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or problem.max_length)
        batches, self._num_cut = [], 0
        for i in range(0, len(labels), problem.batch_size):
            lines = self._lines[i : i + problem.batch_size]
            texts = [[line[column] for line in lines] for column in problem.text_columns]
            whole = tokenizer(*texts, verbose=False)["input_ids"]
            self._num_cut += sum(len(tokens) > problem.max_length for tokens in whole)
            longest = min(max(map(len, whole)), problem.max_length)
            if longest > holds:
                raise InputError(f"the model holds {holds} tokens, and a text has {longest}: --max-length {holds}")
            batches.append({**tokenizer(*texts, **options), "labels": labels[i : i + problem.batch_size]})
        return batches


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a table, with these columns."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
        if path.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""))
        else:
            reader = csv.DictReader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
        header = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
        lines = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a table in UTF-8: {one_line(error)}") from None
    if not columns[:-1]:
        raise InputError(f"--text-columns says which of {', '.join(header)} hold the texts, one or two of them")
    for column in columns:
        if column not in header:
            raise unknown(f"column of {path}", column, header)
    for number, line in enumerate(lines, 2):
        if any(line.get(column) is None for column in columns):
            raise InputError(f"{path}, line {number} of the table has too few columns")
    if not lines:
        raise InputError(f"{path} has a header and no rows")
    return [{column: line[column].strip() for column in columns} for line in lines]


def class_numbers(names: Sequence[str], numbers: Mapping[str, int], num_classes: int) -> Tensor:
    """(n,) int64 of the names of classes, whatever their case, or of numbers."""
    lower = {name.lower(): i for name, i in numbers.items()}
    if all(name.isdecimal() and name.isascii() for name in names):
        labels = [int(name) for name in names]
    elif missing := [name for name in dict.fromkeys(names) if name.lower() not in lower]:
        raise InputError(
            f"the model has no class {missing[0]!r}, only {', '.join(list(numbers)[:8])}: give --class-to-idx FILE"
        )
    else:
        labels = [lower[name.lower()] for name in names]
    if max(labels) >= num_classes:
        raise InputError(f"the table has labels up to {max(labels)}, the model has {num_classes} classes")
    return torch.tensor(labels, dtype=torch.int64)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError("--text needs transformers: pip install 'sam_optim[integrations]'") from None
    return transformers
