"""Small checkpoints, data and problems for the tests of `sam-optim`."""

import contextlib
import importlib
import io
import json

import numpy as np
import torch
from torch import nn

from sam_optim.cli import main
from sam_optim.vision.models import cnn3

NUM = 24
PROBLEM = """
import torch
from torch import nn


def data():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)) for n in (5, 5, 2)]


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def problem():
    torch.manual_seed(0)
    return network(), nn.CrossEntropyLoss(), data()


def loading(path):
    model = network()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model, nn.CrossEntropyLoss(), data()


def ready(path):
    from sam_optim import Loss

    return Loss(*loading(path))


def wrong():
    return 3
"""


def run(*argv):
    """Exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def entries(path):
    """The results of a file, by checkpoint and column."""
    result = json.loads(path.read_text())["entries"]
    return {(e["checkpoint"], e["column"]): e for e in result}


def images(path, *, num=NUM):
    """An .npz of arrays for cnn3."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(num, 1, 8, 8, generator=g), torch.randint(10, (num,), generator=g)
    np.savez(path, x=x.numpy(), y=y.numpy())
    return path, x, y


def network(seed, *, num_classes=10):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cnn3(num_classes, (1, 8, 8))


def small(seed):
    """The network of PROBLEM."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def study(folder, count=3):
    """Checkpoints c0.pt, c1.pt ... of PROBLEM's network, and its module `study_problem`."""
    (folder / "study_problem.py").write_text(PROBLEM)
    importlib.invalidate_caches()
    for seed in range(count):
        torch.save(small(seed).state_dict(), folder / f"c{seed}.pt")
    return [f"c{seed}.pt" for seed in range(count)]
