"""Who may import whom, how large files may be, and what `import sam_optim` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"_version"},
    {"rng", "batchnorm", "results", "outside"},
    {"geometry", "kernels", "loss", "guards", "precision"},
    {"groups", "ranks", "diagnostics", "foreign"},
    {"passes", "plan", "base"},
    {"perturbation", "measures", "landscape", "reparametrize", "correlation"},
    {"optimizers", "report", "standard"},
    {"cli", "integrations", "graphs"},
    {"benchmarks"},
]
# modules of one part: they may import each other, and stand in the row of that part
PARTS = dict.fromkeys(("batches", "chunks", "convolutions", "products", "shares"), "loss") | {"__main__": "cli"}
PARTS |= {"closures": "perturbation", "conditional": "correlation"}
HARD = {"torch", "sam_optim"} | set(sys.stdlib_module_names)
# what only those import who have it: a class of a framework's needs that framework's class to stand on
OWN = {
    "sam_optim.integrations.lightning": {"lightning", "pytorch_lightning", "torchmetrics"},
    "sam_optim.integrations.transformers": {"transformers"},
    "sam_optim.optim.kernels.triton": {"triton"},
    "sam_optim.optim.kernels.triton_ascent": {"triton"},
    "sam_optim.optim.kernels.triton_descent": {"triton"},
    "sam_optim.optim.kernels.triton_update": {"triton"},
}


def part(module: str) -> str:
    """The unit that has a row: sam_optim.optim.kernels.swap -> kernels, benchmarks.train -> benchmarks."""
    names = module.split(".")
    name = names[0] if names[0] == "benchmarks" else (names[1] if len(names) > 1 else "")
    return PARTS.get(name, name)


def row(name: str) -> int:
    return next(i for i, names in enumerate(ROWS) if name in names)


def sources() -> list[Path]:
    return sorted([*(ROOT / "sam_optim").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, *, top_level: bool) -> set[str]:
    found = set()
    for node in run_on_import(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module)
            if node.module in ("sam_optim", "benchmarks"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def run_on_import(tree: ast.AST) -> list[ast.AST]:
    """All but what stands in functions: also in `try`, `if` and classes."""
    inside = [
        node
        for child in ast.iter_child_nodes(tree)
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in run_on_import(child)
    ]
    return [tree, *inside]


PUBLIC = [ROOT / "sam_optim" / "__init__.py"]


@pytest.mark.parametrize("path", [p for p in sources() if p not in PUBLIC], ids=module_of)
def test_a_module_imports_only_from_rows_above_it(path):
    own = part(module_of(path))
    for name in imports(ast.parse(path.read_text()), top_level=False):
        if not name.startswith(("sam_optim.", "benchmarks.")):
            continue
        other = part(name)
        is_module = any(other in names for names in ROWS)
        if is_module and other != own:
            assert row(other) < row(own), f"{module_of(path)} (row {row(own)}) imports {name} (row {row(other)})"


@pytest.mark.parametrize("path", [p for p in sources() if "sam_optim" in p.parts], ids=module_of)
def test_the_package_needs_only_torch_to_be_imported(path):
    top = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), top_level=True)}
    assert top <= HARD | OWN.get(module_of(path), set())


def test_importing_the_package_imports_torch_and_nothing_heavier():
    code = (
        "import sys, torch; before = set(sys.modules); import sam_optim;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(out.stdout.split()) - set(sys.stdlib_module_names) <= {"sam_optim", "torch"}


def test_every_public_name_of_the_package_can_be_imported():
    import sam_optim

    assert sorted(sam_optim.__all__) == sorted(set(sam_optim.__all__))
    for name in sam_optim.__all__:
        assert getattr(sam_optim, name) is not None
        assert name == "__version__" or getattr(sam_optim, name).__doc__


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_files_can_be_read_at_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 420


def test_nothing_is_loaded_that_could_run_code():
    """Checkpoints come from anywhere: torch.load only with weights_only=True, no pickle, no eval."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "yaml.load", "eval", "exec"), path
