"""Which parameters move: SAM-ON's groups. (Those of the ASAM paper are tested with the optimizers.)"""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from sam_optim import ASAM, SAM, Ball, norm_only_param_groups

LOSS = nn.CrossEntropyLoss()


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()]
    return nn.Sequential(*layers, nn.GroupNorm(2, 8), nn.Linear(8, 3)).double()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 6, generator=generator, dtype=torch.float64), torch.randint(3, (12,), generator=generator)


NORMAL = {"1.weight", "1.bias", "4.weight", "4.bias", "6.weight", "6.bias"}


def t_of(w, adaptive):
    return w.abs() + 0.01 if adaptive else torch.ones_like(w)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("how", ["SAM", "ASAM"])
@pytest.mark.parametrize("way", ["closure", "contexts"])
def test_sam_on_is_sam_by_hand_over_the_normalization_layers(way, how, adaptive):
    """e = rho T^2 g / ||T g|| over their parameters alone; the gradient at w + e updates all."""
    model = network()
    groups = norm_only_param_groups(model, adaptive=adaptive)
    optimizer = {"SAM": SAM, "ASAM": ASAM}[how](groups, lr=0.1, momentum=0.9, rho=0.5, module=model)
    names = [n for n, _ in model.named_parameters()]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    momentum = {n: torch.zeros_like(w) for n, w in weights.items()}
    for i in range(4):
        x, y = batch(i)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            return loss

        def gradient(at, x=x, y=y):
            leaves = {n: w.clone().requires_grad_() for n, w in at.items()}
            buffers = {n: b.clone() for n, b in model.named_buffers()}
            loss = LOSS(functional_call(model, leaves | buffers, (x,)), y)
            return dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))

        g = gradient(weights)
        t = {n: t_of(weights[n], adaptive) for n in NORMAL}
        norm = torch.cat([(t[n] * g[n]).flatten() for n in NORMAL]).norm()
        moved = {n: w + 0.5 * t[n] ** 2 * g[n] / norm if n in NORMAL else w for n, w in weights.items()}
        for n, d in gradient(moved).items():
            momentum[n] = 0.9 * momentum[n] + d
            weights[n] = weights[n] - 0.1 * momentum[n]
        if way == "closure":
            optimizer.step(closure)
        else:
            closure()
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            with optimizer.perturbed():
                assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == NORMAL
                closure()
            optimizer.step()
        assert float(optimizer.last_step.dual_norm) == pytest.approx(float(norm), rel=1e-12)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[n], rtol=1e-11, atol=1e-13)


def test_the_groups_hold_every_trained_parameter_once_and_the_perturbed_ones_first():
    model = network()
    model[3].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    names = {id(p): n for n, p in model.named_parameters()}
    chosen, rest = norm_only_param_groups(model)
    assert {names[id(p)] for p in chosen["params"]} == NORMAL - {"4.bias"}
    assert {names[id(p)] for p in rest["params"]} == {"0.weight", "0.bias", "7.weight", "7.bias"}
    assert "adaptive" not in chosen
    assert rest["rho"] == 0
    assert SAM([dict(chosen), dict(rest)], lr=0.1, rho=0.3).ball == Ball(0.3)
    assert ASAM([dict(chosen), dict(rest)], lr=0.1, rho=0.3).ball == Ball(0.3, adaptive=True)
    norms_alone = nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3))
    assert [len(g["params"]) for g in norm_only_param_groups(norms_alone)] == [4]


def test_layers_of_timm_and_of_the_models_own():
    import timm
    from timm.layers import RmsNorm

    model = timm.create_model("resnet18", num_classes=3)  # BatchNorm with timm's own classes
    chosen, rest = norm_only_param_groups(model)
    assert sum(p.numel() for p in chosen["params"]) == 9600
    assert sum(len(g["params"]) for g in (chosen, rest)) == len(list(model.parameters()))
    own = nn.Sequential(nn.Linear(3, 3), RmsNorm(3))
    with pytest.raises(ValueError, match=r"Sequential has no normalization layer .* norm_layers="):
        norm_only_param_groups(own)
    chosen, rest = norm_only_param_groups(own, norm_layers=(RmsNorm,))
    assert chosen["params"] == [own[1].weight]
    assert len(rest["params"]) == 2


def test_a_normalization_without_parameters_is_none():
    with pytest.raises(ValueError, match="use SAM on all parameters"):
        norm_only_param_groups(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3, elementwise_affine=False)))
