"""The pages: their Python runs as it stands, and prints what they say that it prints; their links lead somewhere."""

import re

import examples
import pytest
import torch

DOCS = examples.ROOT / "docs"
NEEDS = {"plain": "torch", "amp": "torch", "accelerate": "accelerate", "lightning": "lightning"}
NEEDS |= {"transformers": "transformers", "timm": "timm", "loops": "torch", "state": "torch"}
# What a training of some seconds ends with: accuracies on 899 images, whose own standard error is 0.01, and losses.
TRAINED = 0.03
ROUNDING = 0.001
TRAINERS_OWN = r"\{'train_runtime'"  # a line that the Trainer prints of its own accord: run times


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # Lightning's own, under torch 2.15
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("name", NEEDS)
def test_every_example_runs_and_prints_what_it_shows(name, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[name])
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        pairs = examples.run(DOCS / "integrations" / f"{name}.md", leave_out=TRAINERS_OWN)
    assert pairs
    examples.check(pairs, spread=TRAINED)


TRAINING = {"start", "training", "monitor"}  # and the gallery; other pages train nothing whose numbers they print
REST = [page for page in sorted(DOCS.rglob("*.md")) if page.parent.name != "integrations"]


@pytest.mark.parametrize("page", REST, ids=lambda p: p.stem)
def test_every_example_of_the_other_pages_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        pairs = examples.run(page)
    trained = page.stem in TRAINING or page.parent.name == "gallery"
    examples.check(pairs, spread=TRAINED if trained else ROUNDING)
    pictures = re.findall(r"\]\((\w+\.png)\)", page.read_text()) if page.parent.name == "gallery" else []
    assert all((tmp_path / picture).stat().st_size > 10_000 for picture in pictures)


PAGES = [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md")), DOCS.parent / "benchmarks" / "results" / "README.md"]


def anchors(page):
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS.parent)))
def test_every_link_and_every_named_file_is_there(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if "://" in target:
            continue
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), anchor
    for named in re.findall(r"\bbenchmarks/(?:studies|recipes)/[\w.-]+\.(?:toml|yaml)", page.read_text()):
        assert (DOCS.parent / named).exists(), named


def test_the_index_names_every_page():
    targets = set(re.findall(r"\]\(([^)#]+)\)", (DOCS / "index.md").read_text()))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.name != "index.md"} <= targets


def test_every_page_has_an_example():
    assert [page.stem for page in DOCS.rglob("*.md") if page.name != "index.md" and not examples.blocks(page)] == []


def test_settings_files_name_only_files_that_exist():
    folder = DOCS.parent / "benchmarks" / "studies"
    for file in folder.glob("*.toml"):
        for named in re.findall(r"[\w-]+\.toml", file.read_text()):
            assert (folder / named).exists(), named


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: p.stem)
def test_nothing_is_left_to_be_filled_in(page):
    assert not re.search(r"\b(NOTE|OUTPUT|TODO|TBD)\b", page.read_text())
