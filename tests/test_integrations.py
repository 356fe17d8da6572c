"""What all integrations share: which parameters move, and what is said where the framework is missing."""

import importlib
import sys

import pytest
import torch
from by_hand import network

from sam_optim import asam_param_groups
from sam_optim.integrations.around import perturbation_around

HIDDEN = {
    "lightning": ["lightning.pytorch", "pytorch_lightning"],
    "transformers": ["transformers"],
    "timm": ["timm.optim"],
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_missing_framework_is_an_error_that_names_the_extra(name, monkeypatch):
    for module in HIDDEN[name]:
        monkeypatch.setitem(sys.modules, module, None)  # as Python does where an import has to fail
    monkeypatch.delitem(sys.modules, f"sam_optim.integrations.{name}", raising=False)

    def use():
        module = importlib.import_module(f"sam_optim.integrations.{name}")
        module.register()

    with pytest.raises(ImportError, match=rf"{name} cannot be imported .*pip install 'sam_optim\[integrations\]'"):
        use()


@pytest.mark.parametrize("name", HIDDEN)
def test_with_the_framework_the_same_import_works(name):
    pytest.importorskip(HIDDEN[name][0])
    public = {"lightning": "SAMCallback", "transformers": "SAMTrainer", "timm": "register"}[name]
    assert getattr(importlib.import_module(f"sam_optim.integrations.{name}"), public).__doc__


def test_groups_are_made_of_what_the_optimizer_trains():
    model = network()
    weight, bias = model[4].parameters()
    optimizer = torch.optim.SGD([weight, bias], lr=0.1)
    (group,) = perturbation_around(model, optimizer, param_groups=None, rho=0.3).param_groups
    assert [id(p) for p in group["params"]] == [id(weight), id(bias)]
    sam = perturbation_around(model, optimizer, param_groups=asam_param_groups, rho=0.3)
    assert [(g["adaptive"], g["rho"], [id(p) for p in g["params"]]) for g in sam.param_groups] == [
        (True, 0.3, [id(weight)]),
        (False, 0.3, [id(bias)]),
    ]
    assert sam.module is model
    with pytest.raises(ValueError, match="none of the parameters that the optimizer trains"):
        perturbation_around(network(), optimizer, param_groups=asam_param_groups)


def test_what_a_loss_of_its_own_trains_moves_too():
    model, margin = network(), torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([margin, *model.parameters()], lr=0.1)
    (group,) = perturbation_around(model, optimizer, param_groups=None).param_groups
    assert [id(p) for p in group["params"]] == [*map(id, model.parameters()), id(margin)]
