"""Who may import whom, and what `import sam_optim` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# a room imports only from rooms in the rows above its own; nobody imports `cli`
ROWS = [
    {"_version"},
    {"core"},
    {"optim", "loss", "vision", "statistics"},
    {"measures", "landscape", "symmetries", "report"},
    {"monitor"},
    {"integrations"},
    {"sweep"},
    {"cli", "benchmarks"},
    {"__main__"},
]
# what those modules import that are of no use without it
FRAMEWORKS = {
    "sam_optim.integrations.lightning": {"lightning", "pytorch_lightning", "torchmetrics"},
    "sam_optim.integrations.transformers": {"transformers"},
    "sam_optim.optim.kernels.triton": {"triton"},
}
ALWAYS_THERE = {"torch", "numpy", "sam_optim"} | set(sys.stdlib_module_names)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_of(p): p for folder in ("sam_optim", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))}


def room(module: str) -> str:
    """sam_optim.optim.kernels -> optim, benchmarks.train -> benchmarks; "" for the package itself."""
    names = module.split(".")
    return names[0] if names[0] != "sam_optim" else names[1] if len(names) > 1 else ""


def row(module: str) -> int:
    return next(i for i, rooms in enumerate(ROWS) if room(module) in rooms)


def imports(module: str, *, on_import: bool = False) -> set[str]:
    """The modules that a file imports anywhere, or only when it is imported itself."""
    names = set()
    todo: list[ast.AST] = [ast.parse(SOURCES[module].read_text())]
    for node in todo:
        inner = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (on_import and (inner or typing_only)):
            todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            inside = {f"{node.module}.{a.name}" for a in node.names} & set(SOURCES)
            names |= inside if len(inside) == len(node.names) else inside | {node.module}
    return names


def ours(module: str, **which: bool) -> set[str]:
    return {name for name in imports(module, **which) if name in SOURCES and name != module}


@pytest.mark.parametrize("module", [m for m in SOURCES if room(m)])
def test_a_room_imports_only_from_rooms_above_it(module):
    assert any(room(module) in rooms for rooms in ROWS), f"{module} is in no room"
    for name in ours(module):
        if room(name) != room(module):
            assert room(name) or room(module) == "benchmarks", f"{module} imports the package: import from the room"
            assert not room(name) or row(name) < row(module), (
                f"{module} (row {row(module)}) imports {name} (row {row(name)})"
            )


def test_there_is_no_circle_of_imports():
    """Also none through imports inside functions, or for types alone."""
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for name in sorted(ours(module)):
                if not module.startswith(f"{name}."):  # a package that its own module is in
                    follow(name, (*way, module))
            done.add(module)

    for module in SOURCES:
        follow(module, ())


def test_nothing_imports_the_command_line():
    for module in SOURCES:
        if room(module) != "cli" and module != "sam_optim.__main__":
            assert not any(name == "sam_optim.cli" or name.startswith("sam_optim.cli.") for name in imports(module)), (
                module
            )


@pytest.mark.parametrize("module", [m for m in SOURCES if m.startswith("sam_optim")])
def test_the_package_needs_only_torch_to_be_imported(module):
    names = {name.split(".")[0] for name in imports(module, on_import=True)}
    assert names <= ALWAYS_THERE | FRAMEWORKS.get(module, set())


def test_importing_the_package_imports_torch_and_nothing_heavier():
    code = (
        "import sys, torch; before = set(sys.modules); import sam_optim;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(out.stdout.split()) - set(sys.stdlib_module_names) <= {"sam_optim", "torch"}


def test_every_public_name_can_be_imported_and_explains_itself():
    import sam_optim

    for name in sam_optim.__all__:
        assert getattr(sam_optim, name) is not None
        assert name == "__version__" or getattr(sam_optim, name).__doc__


def test_nothing_is_loaded_that_could_run_code():
    """Checkpoints come from anywhere: torch.load only with weights_only=True, no pickle, no eval."""
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), module
            assert called not in ("pickle.load", "pickle.loads", "yaml.load", "eval", "exec"), module


def test_a_step_is_short(monkeypatch):
    """One step(closure) with module= of a small network runs through few functions, and few files."""
    monkeypatch.delitem(sys.modules, "accelerate.optimizer", raising=False)  # a step looks who calls where it is loaded
    import torch
    from torch import nn

    from sam_optim import SAM

    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 3))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, module=model)
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    calls = []

    def note(frame, event, arg):
        if event == "call" and f"sam_optim{'/'}" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_filename)

    optimizer.step(closure)
    sys.setprofile(note)
    try:
        optimizer.step(closure)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 120
    assert len(set(calls)) <= 8
