"""A loss whose batches are shared out over processes: the numbers of one process, and no rank that waits for ever."""

import pytest
import torch
from ranks import spawn
from torch import nn

import sam_optim
from sam_optim import Ball, Loss

SIZES = (7, 5, 6, 4, 8)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()


def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)) for n in SIZES]


def loss_of(found, seed=0, **options):
    return Loss(model(seed), nn.CrossEntropyLoss(), found, **options)


def numbers(loss):
    """One of each way in which measures use a loss; plain Python."""
    v = [torch.ones_like(w) for w in loss.params]
    ball = Ball(0.1, adaptive=True)
    value, gradient = loss.value_and_gradient()
    result = {
        "sizes": loss.batch_sizes,
        "value": float(loss.value()),
        "values": loss.batch_values(),
        "value_again": float(value),
        "gradient": torch.cat([g.flatten() for g in gradient]),
        "norms": torch.tensor(loss.over_batches(lambda b: float(b.gradient()[0].norm()))),
        "gradients": torch.stack(loss.over_batches(lambda b: b.gradient()[0])),
        "average": sam_optim.average_sharpness(loss, ball, num_samples=6).value,
        "average_error": sam_optim.average_sharpness(loss, ball, num_samples=6).stderr,
        "worst": sam_optim.worst_case_sharpness(loss, ball, num_steps=4).value,
        "worst_error": sam_optim.worst_case_sharpness(loss, ball, num_steps=4).stderr,
        "regret": sam_optim.gradient_regret(loss).value,
        "regret_fisher": sam_optim.gradient_regret(loss, metric="fisher", damping=0.1).value,
        "trace": sam_optim.hessian_trace(loss, num_probes=4).value,
        "eigenvalues": sam_optim.hessian_eigenvalues(loss, num=2, ball=ball).eigenvalues,
    }
    for matrix in ("hessian", "ggn", "fisher", "empirical_fisher"):
        with loss.curvature(matrix) as product:
            result[matrix] = torch.cat([x.flatten() for x in product(v)])
    result["data"] = loss.settings()["data"]
    return result


def share_of(rank, world, count):
    return numbers(loss_of(batches()[:count][rank::world]))


@pytest.mark.parametrize(("world", "count"), [(2, 5), (3, 2)], ids=["uneven shares", "an empty share"])
def test_every_rank_gets_the_numbers_of_one_process(world, count):
    expected = numbers(loss_of(batches()[:count]))
    for result in spawn(share_of, world, count, world=world):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, (str, tuple)):
                assert result[name] == value, name
            else:
                torch.testing.assert_close(result[name], value, rtol=1e-10, atol=1e-13, msg=name)


def failures(rank):
    """What each rank is told when one of them fails; a rank that waited for another would run into the timeout."""
    own = batches()[rank::2]

    def fails(b):
        if rank == 1 and b.batch_sizes == (4,):
            raise ArithmeticError("of rank 1")
        return 1.0

    def bad(model, batch):
        if batch[0][0, 0] == bad_entry:
            raise ArithmeticError("a bad example")
        return model(batch[0]), batch[1]

    bad_entry = batches()[1][0][0, 0]
    attempts = {
        "over_batches": lambda: loss_of(own).over_batches(fails),
        "value": lambda: loss_of(own, forward=bad).value(),
        "gradient": lambda: loss_of(own, forward=bad).gradient(),
        "product": lambda: loss_of(own, forward=bad).hessian_product(
            [torch.ones_like(w) for w in model().parameters()]
        ),
        "construction": lambda: loss_of(own if rank == 0 else iter(own)),
        "duplicates": lambda: loss_of(batches()),
        "weights": lambda: loss_of(own, seed=rank),
        "nothing": lambda: loss_of([]),
    }
    told = {}
    for name, attempt in attempts.items():
        with pytest.raises((ArithmeticError, RuntimeError, ValueError)) as caught:
            attempt()
        told[name] = f"{type(caught.value).__name__}: {caught.value}"
    told["alone"] = float(loss_of(batches(), distributed=False).value())
    return told


def test_an_error_on_one_rank_is_an_error_on_all():
    first, second = spawn(failures)
    assert first["over_batches"] == "RuntimeError: rank 1 failed: ArithmeticError: of rank 1"
    assert second["over_batches"] == "ArithmeticError: of rank 1"
    for name in ("value", "gradient", "product"):
        assert first[name] == "RuntimeError: rank 1 failed: ArithmeticError: a bad example"
        assert second[name] == "ArithmeticError: a bad example"
    assert "iterator" in first["construction"]
    assert "iterator" in second["construction"]
    for told in (first, second):
        assert "ranks 0 and 1 hold the same batches" in told["duplicates"]
        assert "rank 1 holds other weights" in told["weights"]
        assert "no rank has any" in told["nothing"]
        assert told["alone"] == float(loss_of(batches()).value())


def test_distributed_needs_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        loss_of(batches(), distributed=True)
