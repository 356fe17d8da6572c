"""Function-preserving changes: the outputs stay, the weights are those of the formulas, the audit tells who noticed."""

import copy
import math

import pytest
import torch
from networks import network
from torch import nn

from sam_optim.reparametrize import permute, rescale, rescale_normalized

CHANGES = {
    "rescale": rescale,
    "rescale by channel": lambda m, **k: rescale(m, 3.0, seed=1, **k),
    "rescale_normalized": rescale_normalized,
    "rescale_normalized by layer": lambda m, **k: rescale_normalized(m, 3.0, seed=1, **k),
    "permute": lambda m, **k: permute(m, 1, **k),
}


class Residual(nn.Module):
    """Skips, one of them with a projection, grouped and depthwise convolutions, a gate, concatenation, flattening."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2)
        )
        self.norm = nn.GroupNorm(4, 8)
        self.down = nn.Conv2d(8, 6, 1, bias=False)
        self.wide = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(12, 6, 1))
        self.gate = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Sigmoid())
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 14, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.branch(x)
        y = self.down(x)
        y += self.wide(torch.relu(self.norm(x)))
        y = y * self.gate(y.mean((2, 3), keepdim=True))
        return self.head(torch.cat([y, x], dim=1))


class Transformer(nn.Module):
    """Class token, position embedding, pre-norm blocks with attention, layer scale and MLP: what a ViT is made of."""

    def __init__(self, width=8, heads=4, fused=True):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.embed = nn.Linear(3, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 6, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.rand(width) + 0.5)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.head = nn.Linear(width, 3)

    def attend(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)).softmax(dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, width))

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], dim=1) + self.position
        x = x + self.gamma * self.attend(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x)[:, 0])


def two_layers():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))


def normalised(kind):
    norms = {"batch": nn.BatchNorm2d(6), "group": nn.GroupNorm(3, 6), "instance": nn.InstanceNorm2d(6, affine=True)}
    norms |= {"plain": nn.BatchNorm2d(6, affine=False), "untracked": nn.BatchNorm2d(6, track_running_stats=False)}
    return nn.Sequential(nn.Conv2d(2, 6, 3), norms[kind], nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))


MODELS = {
    "two layers": (two_layers, (5, 4)),
    "batch": (lambda: normalised("batch"), (5, 2, 6, 6)),
    "group": (lambda: normalised("group"), (5, 2, 6, 6)),
    "instance": (lambda: normalised("instance"), (5, 2, 6, 6)),
    "plain": (lambda: normalised("plain"), (5, 2, 6, 6)),
    "untracked": (lambda: normalised("untracked"), (5, 2, 6, 6)),
    "residual": (Residual, (5, 2, 4, 4)),
    "transformer": (Transformer, (4, 5, 3)),
    "transformer by hand": (lambda: Transformer(fused=False), (4, 5, 3)),
}

NOTHING = {("two layers", "rescale_normalized"), ("plain", "rescale")}  # no normalisation; no affine parameters


def made(name, *, dtype=torch.float64, seed=0):
    """A model whose statistics and affine parameters are away from their initial values, and inputs."""
    make, shape = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.ndim == 1:
                t.add_(torch.rand(t.shape, generator=generator) * (1 if "var" in name else 0.5))
    return model.to(dtype), torch.randn(shape, generator=generator, dtype=dtype)


def changed(a, b):
    return {
        name for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True) if not x.equal(y)
    }


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_stay_and_the_weights_do_not(name, change):
    model, x = made(name)
    if (name, change.split()[0]) in NOTHING:
        with pytest.raises(ValueError, match="nothing to rescale: found no"):
            CHANGES[change](model, inputs=x)
        return
    other = CHANGES[change](model, inputs=x)
    assert changed(model, other)
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)  # not what was traced
    with torch.no_grad():
        for inputs in (x, fresh):
            torch.testing.assert_close(other.eval()(inputs), model.eval()(inputs), rtol=1e-11, atol=1e-11)


def test_two_layers_take_alpha_and_its_inverse():
    model, _ = made("two layers")
    other = rescale(model, 3.0)
    torch.testing.assert_close(other[0].weight, 3 * model[0].weight)
    torch.testing.assert_close(other[0].bias, 3 * model[0].bias)
    torch.testing.assert_close(other[3].weight, model[3].weight / 3)
    assert torch.equal(other[3].bias, model[3].bias)


def test_every_channel_has_a_factor_of_its_own_between_the_ends():
    model, _ = made("two layers")
    other, again = rescale(model, 5.0, seed=2), rescale(model, 5.0, seed=2)
    factors = other[0].bias / model[0].bias
    assert len(set(factors.tolist())) == 6
    assert bool(((factors > 1 / 5) & (factors < 5)).all())
    torch.testing.assert_close(other[3].weight, model[3].weight / factors)
    assert not changed(other, again)
    assert changed(other, rescale(model, 5.0, seed=3))


def test_batch_norm_before_relu_is_rescaled_by_its_own_parameters():
    model, x = made("batch")
    other = rescale(model, 2.0, inputs=x)
    assert changed(model, other) == {"1.weight", "1.bias", "5.weight"}
    torch.testing.assert_close(other[1].weight, 2 * model[1].weight)
    torch.testing.assert_close(other[5].weight, model[5].weight / 2)


def test_weights_before_batch_norm_take_their_statistics_and_eps_along():
    model, x = made("batch")
    other = rescale_normalized(model, 4.0, inputs=x)
    assert changed(model, other) == {"0.weight", "0.bias", "1.running_mean", "1.running_var"}
    torch.testing.assert_close(other[1].running_mean, 4 * model[1].running_mean)
    torch.testing.assert_close(other[1].running_var, 16 * model[1].running_var)
    assert other[1].eps == pytest.approx(16 * model[1].eps)
    with torch.no_grad():  # with the statistics of the batch, too
        torch.testing.assert_close(other.train()(x), model.train()(x), rtol=1e-12, atol=1e-12)


def test_without_its_eps_the_difference_is_the_one_that_is_documented():
    model, x = made("group")
    other = rescale_normalized(model, 2.0, inputs=x)
    other[1].eps = model[1].eps = 1e-3
    with torch.no_grad():
        a, b = model[:2](x), other[:2](x)
        variance = model[0](x).unflatten(1, (3, 2)).var((2, 3, 4), unbiased=False)
    centred = a - model[1].bias[:, None, None]
    expected = (1e-3 * (1 - 2.0**-2) / (2 * variance)).repeat_interleave(2, dim=1)[:, :, None, None]
    torch.testing.assert_close((b - a) / centred, expected.expand_as(a), rtol=0.05, atol=1e-6)


def test_channels_that_a_skip_ties_have_one_factor():
    model, x = made("residual")
    other = rescale(model, 3.0, seed=0, inputs=x)
    stem = other.stem[1].weight / model.stem[1].weight
    last = other.branch[3].bias / model.branch[3].bias
    torch.testing.assert_close(stem, last)
    torch.testing.assert_close(other.down.weight[0, :, 0, 0] * stem / model.down.weight[0, :, 0, 0] / (
        other.wide[2].bias / model.wide[2].bias)[0], torch.ones(8, dtype=torch.float64))  # fmt: skip


def test_values_of_attention_and_outputs_of_layer_norm_are_rescaled():
    model, x = made("transformer")
    names = changed(model, rescale(model, 2.0, inputs=x))
    assert {"norm1.weight", "norm1.bias", "qkv.weight", "qkv.bias", "out.bias", "gamma", "norm3.weight"} <= names
    other = rescale(model, 2.0, inputs=x)
    torch.testing.assert_close(other.qkv.bias / model.qkv.bias, torch.tensor([1.0] * 16 + [2.0] * 8).double())


def test_the_residual_stream_of_a_transformer_is_rescaled_as_a_whole():
    model, x = made("transformer")
    other = rescale_normalized(model, 2.0, inputs=x)
    for name in ("embed.weight", "token", "position", "mlp.2.weight", "mlp.2.bias"):
        torch.testing.assert_close(other.get_parameter(name), 2 * model.get_parameter(name))
    torch.testing.assert_close(other.gamma * other.out.bias, 2 * model.gamma * model.out.bias)
    assert [m.eps for m in (other.norm1, other.norm2, other.norm3)] == pytest.approx([4e-5] * 3)


def test_hidden_units_change_places_with_all_that_belongs_to_them():
    model, _ = made("two layers")
    other = permute(model, 3)
    order = [int((model[0].bias == b).nonzero()) for b in other[0].bias]
    assert sorted(order) == list(range(6))
    assert order != list(range(6))
    assert torch.equal(other[0].weight, model[0].weight[order])
    assert torch.equal(other[3].weight, model[3].weight[:, order])
    assert not changed(other, permute(model, 3))


def test_heads_change_places_whole():
    model, x = made("transformer")
    other = permute(model, 1, inputs=x)
    heads = [b.view(3, 4, 2).transpose(0, 1).flatten(1) for b in (model.qkv.bias, other.qkv.bias)]
    order = [int((heads[0] == head).all(dim=1).nonzero()) for head in heads[1]]
    assert sorted(order) == [0, 1, 2, 3]
    assert order != [0, 1, 2, 3]
    assert torch.equal(other.out.weight.view(8, 4, 2), model.out.weight.view(8, 4, 2)[:, order])
    assert torch.equal(other.embed.weight, model.embed.weight)  # position embeddings have no other order


@pytest.mark.parametrize("change", CHANGES)
def test_the_model_is_left_as_found(change):
    model, x = made("batch", dtype=torch.float32)
    model.train()
    model[2].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    other = CHANGES[change](model)  # on inputs of the one size that fits, guessed
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes == [m.training for m in other.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in [*model.modules(), *other.modules()])
    assert x.dtype == torch.float32


def test_what_has_no_symmetry_is_refused():
    tanh = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="found no layers joined by ReLU alone"):
        rescale(tanh)
    assert permute(tanh)[0].weight.shape == (6, 4)
    with pytest.raises(ValueError, match="found no exchangeable hidden units"):
        permute(nn.Linear(4, 3))
    for wrong in (0, -1.0, math.inf, math.nan, True, "2"):
        with pytest.raises(ValueError, match="must be a number > 0"):
            rescale(two_layers(), wrong)
    with pytest.raises(ValueError, match="pass inputs="):
        rescale(network(network.__globals__["Attention"]))
    with pytest.raises(ValueError, match="no parameters"):
        rescale(nn.ReLU())


class Shared(nn.Module):
    """The middle layer runs twice, the last one is tied to the first: no factor serves both uses."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.c = nn.Linear(4, 4, bias=False)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.b(torch.relu(self.a(x)))))))


def test_shared_weights_are_left_alone():
    with pytest.raises(ValueError, match="nothing to rescale"):
        rescale(Shared())


class Weird(nn.Module):
    """Its output depends on the scale of a weight in a way that no forward pass shows: through the weight's norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        size = float(self.a.weight.detach().numpy().__abs__().sum())
        return self.b(torch.relu(self.a(x))) * size


def test_a_change_that_changes_the_outputs_is_an_error():
    with pytest.raises((RuntimeError, ValueError), match=r"outputs changed|nothing to rescale"):
        rescale(Weird())


def test_parametrized_weights_stay():
    model = two_layers()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="nothing to rescale"):
        rescale(model)
