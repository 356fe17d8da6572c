"""Against curvlinops (GGN, Fisher), and on models as users have them: Hugging Face, timm."""

import pytest
import torch
from networks import NETWORKS, batches, flat, like, network
from torch import nn

from sam_optim.loss import Loss
from sam_optim.measures import by_layer, hessian_eigenvalues, hessian_trace, spectral_density

cross_entropy = nn.CrossEntropyLoss()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, in its forward mode
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("matrix", ["ggn", "fisher"])
def test_gauss_newton_and_fisher_are_those_of_curvlinops(kind, matrix):
    """Its GGN is right where its Hessian is not; for cross-entropy the Fisher matrix is the GGN."""
    curvlinops = pytest.importorskip("curvlinops")
    model, data = network(kind).eval(), batches(kind)
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        peer = curvlinops.GGNLinearOperator(model, cross_entropy, params, data)
        v = torch.linspace(-1, 1, sum(p.numel() for p in params), dtype=torch.float64)
        expected = peer @ v
    loss = Loss(model, cross_entropy, data)
    with loss.curvature(matrix) as product:
        torch.testing.assert_close(flat(product(like(v, params))), expected, rtol=1e-10, atol=1e-12)


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).double()


@pytest.mark.parametrize("criterion", [None, cross_entropy], ids=["outputs.loss", "criterion"])
def test_a_hugging_face_model(criterion):
    """Mapping batches; the mode and the attention backend that the model came with are as they were."""
    model = bert().train()
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(20, (12, 6), generator=generator), torch.randint(3, (12,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    loss = Loss(model, criterion, [batch], chunk_size=4)
    result = hessian_eigenvalues(loss, num=2)
    assert result.converged
    x = result.eigenvectors[0]
    torch.testing.assert_close(
        flat(loss.hessian_product(x)),
        float(result.eigenvalues[0]) * flat(x),
        rtol=0,
        atol=float(result.residuals[0]) * 2,
    )
    step = 1e-5
    with loss.displaced([step * v for v in x]):
        above = flat(loss.gradient())
    with loss.displaced([-step * v for v in x]):
        below = flat(loss.gradient())
    curvature = float(flat(x) @ (above - below)) / (2 * step)
    assert curvature == pytest.approx(float(result.eigenvalues[0]), rel=1e-5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_timm_models(name):
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, img_size=32) if "vit" in name else timm.create_model(name)
        x = torch.randn(24, 3, 32, 32)
    loss = Loss(model, cross_entropy, [(x, torch.arange(24) % 10)])
    split = Loss(model, cross_entropy, [(x, torch.arange(24) % 10)], chunk_size=7)
    top, again = (hessian_eigenvalues(one, matrix="ggn", tol=1e-3) for one in (loss, split))
    assert top.converged
    assert float(top.eigenvalues) == pytest.approx(float(again.eigenvalues), rel=1e-3)
    assert hessian_trace(loss, matrix="ggn", num_probes=20).value > 0
    assert len(by_layer(hessian_trace, loss.block("head" if "vit" in name else "fc"), num_probes=4)) == 1
    assert spectral_density(loss, num_probes=2, num_lanczos=8).num_products == 16
