"""What the integrations say to those who do not have the framework."""

import importlib
import sys

import pytest

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
