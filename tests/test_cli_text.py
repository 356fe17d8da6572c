"""`sam-optim measure FOLDER --text FILE`: a fine-tuned transformer and the table of texts that it was tuned for."""

import json
import os
from pathlib import Path

import pytest
import torch
from command_line import run
from torch import nn

from sam_optim import Loss, hessian_trace
from sam_optim.core.errors import InputError
from sam_optim.sweep import store
from sam_optim.sweep.text import class_numbers, read_table

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
SICK = Path(os.environ.get("SAM_OPTIM_SICK", Path(__file__).resolve().parents[2] / "shared" / "data" / "sick"))
WORDS = ["a", "boy", "girl", "dog", "cat", "is", "runs", "sleeps", "and", "the", "man", "plays", "not", "no"]
LABELS = {"CONTRADICTION": 0, "ENTAILMENT": 1, "NEUTRAL": 2}
PAIRS = [("a boy runs", "the boy runs", "ENTAILMENT"), ("a dog sleeps", "no dog sleeps", "CONTRADICTION")]
PAIRS += [("the man plays", "a girl is not the man", "NEUTRAL"), ("a cat is a cat", "the cat", "entailment")]
FLAGS = ["--text-columns", "first,second", "--label-column", "judgment", "--batch-size", 3, "--quiet"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A table `t.tsv`, and a folder `bert` of a tiny BERT with its tokenizer, as save_pretrained writes them."""
    monkeypatch.chdir(tmp_path)
    lines = ["id\tfirst\tsecond\tjudgment", *(f"{i}\t" + "\t".join(pair) for i, pair in enumerate(PAIRS))]
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained("bert")
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        label2id=LABELS, id2label={i: name for name, i in LABELS.items()},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained("bert")
    return tmp_path


def by_hand(folder):
    """The loss of the table, from what transformers itself reads and tokenizes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    batches = []
    for pairs in (PAIRS[:3], PAIRS[3:]):
        tokens = tokenizer([a for a, _, _ in pairs], [b for _, b, _ in pairs], padding=True, return_tensors="pt")
        batches.append({**tokens, "labels": torch.tensor([LABELS[name.upper()] for *_, name in pairs])})
    return Loss(model, nn.CrossEntropyLoss(), batches)


def test_the_numbers_are_those_of_the_library(here):
    code, out, err = run(
        "measure", "bert", "--text", "t.tsv", *FLAGS, "--measures", "trace", "--num-probes", 3, "--json", "o.json"
    )
    assert code == 0, err
    loss = by_hand("bert")
    (entry,) = store.read(here / "o.json")
    assert entry["result"]["value"] == pytest.approx(hessian_trace(loss, num_probes=3).value, rel=1e-4)
    assert entry["quality"]["loss"] == pytest.approx(float(loss.value()), rel=1e-6)
    with torch.no_grad():
        right = [loss.model.eval()(**b).logits.argmax(1) == b["labels"] for b in loss._batches]
    assert entry["quality"]["accuracy"] == pytest.approx(float(torch.cat(right).double().mean()))
    assert out.splitlines()[0].split() == ["checkpoint", "loss", "accuracy", "trace"]
    assert entry["data"]["columns"] == ["first", "second", "judgment"]


def test_names_of_classes_come_from_the_model_or_a_file(here):
    config = json.loads((here / "bert" / "config.json").read_text())
    config |= {"label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}}
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    (here / "bert" / "config.json").write_text(json.dumps(config))
    argv = ["measure", "bert", "--text", "t.tsv", *FLAGS, "--measures", "average", "--num-samples", 2]
    code, _, err = run(*argv)
    assert code == 1
    assert "the model has no class 'ENTAILMENT', only LABEL_0, LABEL_1, LABEL_2: give --class-to-idx FILE" in err
    (here / "n.json").write_text(json.dumps(LABELS))
    assert run(*argv, "--class-to-idx", "n.json", "--json", "o.json")[0] == 0
    assert store.read(here / "o.json")[0]["quality"]["loss"] == pytest.approx(float(by_hand("bert").value()), rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text-columns", "first,third"], "unknown column of t.tsv 'third'; choose from first, id, judgment, second"),
        ([], "--text-columns says which of id, first, second, judgment hold the texts"),
        (["--text-columns", "first", "--data", "x"], "leave --model and --data out"),
    ],
)
def test_wrong_commands(here, flags, message):
    code, _, err = run("measure", "bert", "--text", "t.tsv", "--label-column", "judgment", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_folders_that_are_no_classifiers(here):
    (here / "bert" / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoConfig": "evil.Config"}}')
    (here / "bert" / "evil.py").write_text("open('harmed', 'w')")
    code, _, err = run("measure", "bert", "--text", "t.tsv", *FLAGS, "--measures", "average")
    assert code == 1
    assert "bert" in err
    assert not (here / "harmed").exists()


def test_a_language_model_is_told_from_a_classifier(here):
    config = json.loads((here / "bert" / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (here / "bert" / "config.json").write_text(json.dumps(config))
    code, _, err = run("measure", "bert", "--text", "t.tsv", *FLAGS, "--measures", "average")
    assert code == 1
    assert "bert holds a BertForMaskedLM, and --text measures classifiers of texts" in err
    assert "--target with a function that returns (model, None, batches)" in err


def test_tables(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('text,label\n"a, b",1\n"two\nlines",0\n')
    assert read_table(path, ["text", "label"]) == [{"text": "a, b", "label": "1"}, {"text": "two\nlines", "label": "0"}]
    for content, message in (
        (b"text,label\n", "no rows"),
        (b"text,label\na\n", "line 2 of the table has too few columns"),
        (b"\xff\xfe,", "not a table in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_table(path, ["text", "label"])
    assert class_numbers(["2", "0"], {}, 3).tolist() == [2, 0]
    with pytest.raises(InputError, match="labels up to 7, the model has 3 classes"):
        class_numbers(["7"], {}, 3)


@pytest.mark.slow
@pytest.mark.skipif(not SICK.is_dir(), reason=f"no SICK in {SICK}")
def test_sick(here):
    argv = ["--text", SICK / "SICK_trial.txt", "--text-columns", "sentence_A,sentence_B", "--examples", 32]
    argv += ["--label-column", "entailment_judgment", "--measures", "average", "--num-samples", 2]
    assert run("measure", "bert", *argv, "--json", "o.json")[0] == 0
    assert store.read(here / "o.json")[0]["data"]["examples"] == 32


def test_texts_that_are_cut_are_counted(here):
    """With the three tokens around them the pairs have 9, 9, 12 and 10."""
    argv = ["measure", "bert", "--text", "t.tsv", *FLAGS, "--measures", "average", "--num-samples", 2]
    argv.remove("--quiet")
    for length, note in ((9, "2 of 4 texts are cut at 9 tokens (--max-length)"), (12, None)):
        code, _, err = run(*argv, "--max-length", length)
        assert code == 0, err
        assert (note in err) if note else ("are cut" not in err)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (3, "--max-length 3 leaves nothing of a text: 3 tokens stand around it"),
        (1000, "the model holds 512 tokens, and a text has 604: --max-length 512"),
    ],
)
def test_lengths_that_no_text_can_have(here, length, message):
    with (here / "t.tsv").open("a") as file:
        file.write(f"9\t{'boy ' * 600}\ta\tNEUTRAL\n")
    argv = ["measure", "bert", "--text", "t.tsv", *FLAGS, "--measures", "average", "--max-length", length]
    code, out, err = run(*argv)
    assert code == 1
    assert message in out + err


def test_the_language_model_of_the_page(here):
    """`lm.py` word for word, with a tokenizer that brings token_type_ids: GPT-2 would add them as embeddings."""
    page = Path(__file__).resolve().parents[1] / "docs" / "measures" / "command.md"
    code = page.read_text().split("```text\nfrom transformers")[1].split("```")[0]
    (here / "lm.py").write_text("from transformers" + code)
    texts = [a for a, _, _ in PAIRS] + [b for _, b, _ in PAIRS] * 3  # 16 in all, and a second batch below
    (here / "texts.txt").write_text("\n".join([*texts, "the girl sleeps"]) + "\n")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = transformers.AutoTokenizer.from_pretrained("bert", model_input_names=names)
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = transformers.GPT2Config(vocab_size=18, n_positions=16, n_embd=8, n_layer=1, n_head=2, **special)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    assert "token_type_ids" in transformers.AutoTokenizer.from_pretrained("gpt2")("a boy")
    argv = ["measure", "gpt2", "--target", "lm:problem", "--measures", "average", "--num-samples", 2, "--quiet"]
    code, _, err = run(*argv, "--json", "o.json")
    assert code == 0, err
    total = count = 0.0
    for text in [*texts, "the girl sleeps"]:  # one by one, without padding
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        count += len(logits)
    assert store.read(here / "o.json")[0]["quality"]["loss"] == pytest.approx(total / count, rel=1e-5)
