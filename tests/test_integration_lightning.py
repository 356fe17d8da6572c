"""Lightning: SAMCallback under automatic optimization, and SAM from configure_optimizers, against SAM by hand."""

import random
import socket

import pytest
import torch
from by_hand import LOSS, Overflows, add_sam_gradient, batches, largest_difference, network, seed_step, sgd, train

from sam_optim import SAM, Perturbation, asam_param_groups, late_phase

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # Lightning's own, under torch 2.15
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice on loading data
]
MATRIX = [(accumulate, clip) for accumulate in (1, 2) for clip in (None, 0.2)]
DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
SCALE = 2.0**16


@pytest.fixture(scope="module", autouse=True)
def _imported():
    pytest.importorskip("lightning")
    import_lightning()


def import_lightning():
    global L, Module
    import lightning as L

    Module = module_class(L.LightningModule)


def module_class(base):
    class Module(base):
        """Counts what training_step does; the seed of a step does not depend on what the Trainer draws."""

        def __init__(self, optimizer_of=sgd, loss_of=lambda m, x, y: LOSS(m(x), y)):
            super().__init__()
            self.net, self.optimizer_of, self.loss_of, self.calls = network(), optimizer_of, loss_of, 0

        def on_train_batch_start(self, batch, batch_idx):
            accumulate = self.trainer.accumulate_grad_batches
            if batch_idx % accumulate == 0:
                seed_step(batch_idx // accumulate)

        def training_step(self, batch, batch_idx):
            self.calls += 1
            loss = self.loss_of(self.net, *batch)
            self.log("loss", loss)
            self.log_dict({"twice": 2 * loss, "call": float(self.calls)})
            return loss

        def configure_optimizers(self):
            return self.optimizer_of(self)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(batches(), batch_size=None)

    return Module


def in_memory_logger():
    from lightning.pytorch.loggers.logger import DummyLogger

    class InMemory(DummyLogger):
        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, metrics))

        def save(self):
            pass

    return InMemory()


def trainer(callbacks, *, accumulate=1, clip=None, precision="32-true", package=None, **kwargs):
    if precision == "16-mixed":  # the Trainer itself would turn it into bf16-mixed on a CPU
        from lightning.pytorch.plugins.precision import MixedPrecision

        kwargs["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]
    else:
        kwargs["precision"] = precision
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    kwargs = {"max_epochs": 1, "logger": False, "log_every_n_steps": 1, "accelerator": "cpu"} | quiet | kwargs
    return (package or L).Trainer(
        callbacks=callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=clip, **kwargs
    )


def callback(**kwargs):
    from sam_optim.integrations.lightning import SAMCallback

    return SAMCallback(**({"rho": 0.1} | kwargs))


def by_hand(precision="32-true", **kwargs):
    model = network()
    scale = SCALE if precision == "16-mixed" else 1.0
    losses = train(model, sgd(model), batches(), rho=0.1, scale=scale, autocast=DTYPES[precision], **kwargs)
    return model, losses


@pytest.mark.parametrize(("accumulate", "clip"), MATRIX)
@pytest.mark.parametrize("precision", DTYPES)
def test_the_callback(precision, accumulate, clip):
    module, logger = Module(), in_memory_logger()
    fit = trainer([callback()], precision=precision, accumulate=accumulate, clip=clip, logger=logger)
    fit.fit(module)
    model, losses = by_hand(precision, accumulate=accumulate, clip=clip)
    assert largest_difference(module.net, model) == 0.0
    assert fit.global_step == 8 // accumulate
    assert module.calls == 16
    assert int(module.net[1].num_batches_tracked) == 8
    assert fit.lightning_module.log.__func__ is L.LightningModule.log
    rows = [row for _, row in logger.rows if "loss" in row]
    last = range(accumulate - 1, 8, accumulate)  # the loss at w of the last micro-batch of each step
    assert [row["loss"] for row in rows] == [losses[i] for i in last]
    assert [row["call"] for row in rows] == [2 * i + 1 for i in last]
    assert fit.callback_metrics["twice"] == 2 * losses[-1]


def test_a_schedule_leaves_out_second_passes():
    module, plain = Module(), Module()
    trainer([callback(schedule=late_phase(8))]).fit(module)
    trainer([]).fit(plain)
    assert largest_difference(module.net, plain.net) == 0.0
    assert module.calls == 8
    module = Module()
    trainer([callback(schedule=late_phase(2))], accumulate=2).fit(module)
    assert module.calls == 4 + 2 * 4


@pytest.mark.parametrize(("accumulate", "clip"), MATRIX)
@pytest.mark.parametrize("call", [4, 5], ids=["at w", "at w + e"])
def test_an_overflow_in_fp16_skips_the_step(call, accumulate, clip):
    module = Module(loss_of=Overflows(call))
    fit = trainer([callback()], precision="16-mixed", accumulate=accumulate, clip=clip)
    fit.fit(module)
    model, _ = by_hand("16-mixed", accumulate=accumulate, clip=clip, loss_of=Overflows(call))
    assert largest_difference(module.net, model) == 0.0
    assert fit.precision_plugin.scaler.get_scale() == SCALE / 2


def test_infinite_losses_in_every_pass_leave_the_weights_alone():
    module = Module(loss_of=Overflows(*range(16)))
    start = [p.detach().clone() for p in module.parameters()]
    fit = trainer([callback()], precision="16-mixed")
    fit.fit(module)
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), start, strict=True))
    assert fit.precision_plugin.scaler.get_scale() == SCALE / 2**8


def test_hooks_run_once_a_batch_and_find_the_gradient_at_w_plus_e():
    seen, ascents = [], []

    class Before(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            ascents.append(pl_module.net[4].bias.grad.clone())

    class Hooked(Module):
        def on_before_backward(self, loss):
            seen.append("before")

        def on_after_backward(self):
            seen.append(self.net[4].bias.grad.clone())

    trainer([Before(), callback()], limit_train_batches=2).fit(Hooked())
    assert [kind == "before" for kind in seen[::2]] == [True, True]
    assert len(seen) == 4
    (x, y), model = batches()[0], network()
    seed_step(0)
    LOSS(model(x), y).backward()
    assert torch.equal(ascents[0], model[4].bias.grad)
    seed_step(0)
    model = network()
    add_sam_gradient(model, lambda m: LOSS(m(x), y), rho=0.1)
    assert torch.equal(seen[1], model[4].bias.grad)


def test_the_groups_of_the_asam_paper():
    module, model = Module(), network()
    trainer([callback(param_groups=asam_param_groups)]).fit(module)
    weights, others = ([p for p in model.parameters() if (p.ndim > 1) == large] for large in (True, False))
    train(model, sgd(model), batches(), rho=0.1, groups=[(weights, 0.01), (others, None)])
    assert largest_difference(module.net, model) == 0.0


def test_an_optimizer_that_maximizes_has_its_ascent_downwards():
    def maximizes(model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, maximize=True)

    module = Module(maximizes, loss_of=lambda m, x, y: -LOSS(m(x), y))
    trainer([callback()]).fit(module)
    assert largest_difference(module.net, by_hand()[0]) == 0.0


def test_what_the_optimizer_does_not_train_does_not_move_until_a_callback_adds_it():
    """A layer left out of the optimizer has gradients all the same; BaseFinetuning adds one later."""
    seen = []

    class Unfreezes(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters())})

    class Watches(Module):
        def training_step(self, batch, batch_idx):
            seen.append(self.net[0].weight.detach().clone())
            return super().training_step(batch, batch_idx)

    module = Watches(optimizer_of=lambda m: torch.optim.SGD([*m.net[1].parameters(), *m.net[4].parameters()], lr=0.1))
    trainer([Unfreezes(), callback()]).fit(module)
    moved = [not torch.equal(seen[2 * i], seen[2 * i + 1]) for i in range(8)]
    assert moved == [False] * 4 + [True] * 4


def test_metrics_see_the_first_pass_alone():
    import torchmetrics

    outputs = []

    class Measured(Module):
        def __init__(self):
            super().__init__()
            kind = {"task": "multiclass", "num_classes": 3}
            self.accuracy = torchmetrics.Accuracy(**kind)
            self.values = torchmetrics.CatMetric()  # a state that is a list
            self.several = torchmetrics.MetricCollection(  # two of them share one state
                [torchmetrics.Precision(**kind, average="macro"), torchmetrics.Recall(**kind, average="macro")]
            )

        def training_step(self, batch, batch_idx):
            x, y = batch
            out = self.net(x)
            if self.calls % 2 == 0:
                outputs.append((out.detach(), y))
            self.calls += 1
            self.log("batch", self.accuracy(out, y))
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            self.values.update(out.detach().norm())
            self.several.update(out, y)
            return LOSS(out, y)

    module = Measured()
    trainer([callback()]).fit(module)
    out, y = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    assert len(outputs) == 8
    assert module.several["MulticlassRecall"]._update_count == 8
    assert module.values.compute().tolist() == [float(o.norm()) for o, _ in outputs]
    kind = {"num_classes": 3, "average": "macro"}
    functional = torchmetrics.functional.classification
    found = module.several.compute()
    assert found["MulticlassPrecision"] == functional.multiclass_precision(out, y, **kind)
    assert found["MulticlassRecall"] == functional.multiclass_recall(out, y, **kind)
    assert module.trainer.callback_metrics["accuracy"] == functional.multiclass_accuracy(out, y, 3, average="micro")


@pytest.mark.parametrize("replay", [False, True])
def test_replayed_draws(replay):
    """Of torch and of Python, also those that training_step makes itself; and the generators advance once."""
    masks = []

    class Draws(Module):
        def training_step(self, batch, batch_idx):
            out = self.net[3](torch.ones(100))
            masks.append(((out == 0).tolist(), random.random()))
            return super().training_step(batch, batch_idx)

    trainer([callback(replay_rng=replay)], limit_train_batches=1).fit(Draws())
    after = torch.get_rng_state()
    assert (masks[0] == masks[1]) is replay
    seed_step(0)
    model = network()
    model[3](torch.ones(100))
    model(batches()[0][0])
    assert torch.equal(torch.get_rng_state(), after) is replay


@pytest.mark.parametrize("where", ["first backward", "second training_step", "second backward"])
def test_a_fault_leaves_weights_and_the_module_as_they_were(where):
    state = {}

    class Faulty(Module):
        def training_step(self, batch, batch_idx):
            if self.calls == 5 and where == "second training_step":
                raise ZeroDivisionError
            if self.calls == 4:
                state.update({k: v.clone() for k, v in self.net.state_dict().items()})
            return super().training_step(batch, batch_idx)

        def backward(self, loss):
            super().backward(loss)
            if self.calls == {"first backward": 5, "second backward": 6}.get(where):
                raise ZeroDivisionError

    module = Faulty()
    sam = callback()
    fit = trainer([sam], accumulate=4)
    with pytest.raises(ZeroDivisionError):
        fit.fit(module)
    assert all(torch.equal(p, state[k]) for k, p in module.net.named_parameters())
    assert not sam.perturbation.active
    assert "log" not in module.__dict__


def test_resuming_from_a_checkpoint_is_not_stopping(tmp_path):
    through, first, second = Module(), Module(), Module()
    trainer([callback()], max_epochs=2).fit(through)
    fit = trainer([callback()])
    fit.fit(first)
    fit.save_checkpoint(tmp_path / "half.ckpt")
    fit = trainer([callback()], max_epochs=2)
    fit.fit(second, ckpt_path=tmp_path / "half.ckpt")
    assert fit.global_step == 16
    assert largest_difference(second, through) == 0.0
    assert largest_difference(second, first) > 1e-3


def test_the_package_under_its_older_name():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    module = module_class(pytorch_lightning.LightningModule)()
    trainer([callback()], package=pytorch_lightning, accumulate=2, clip=0.2).fit(module)
    assert largest_difference(module.net, by_hand(accumulate=2, clip=0.2)[0]) == 0.0


def manual():
    class Manual(Module):
        automatic_optimization = False

    return Manual()


def iterating():
    class Iterates(Module):
        def on_train_batch_start(self, batch, batch_idx):
            pass

        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    return Iterates()


iterates = [
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument"),
]


def own_backward():
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class OwnBackward(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    return OwnBackward(device="cpu")


@pytest.mark.parametrize(
    ("module", "kwargs", "error", "what"),
    [
        (manual, {}, RuntimeError, r"Manual steps its optimizers itself.*sam_optim.Perturbation"),
        (lambda: Module(lambda m: [sgd(m.net[0]), sgd(m.net[4])]), {}, RuntimeError, "multiple optimizers is only"),
        pytest.param(iterating, {}, RuntimeError, "take `batch`", marks=iterates),
        (lambda: Module(), {"strategy": own_backward}, RuntimeError, "OwnBackward runs a backward of its own"),
        (lambda: Module(lambda m: SAM.wrap(sgd(m), rho=0.1)), {}, ValueError, "SAM, which perturbs .* base, SGD"),
    ],
    ids=["manual", "several optimizers", "iterator", "strategy", "SAM"],
)
def test_what_the_callback_cannot_do_is_refused_before_the_first_step(module, kwargs, error, what):
    module = module()
    start = [p.detach().clone() for p in module.parameters()]
    fit = trainer([callback()], **{k: make() for k, make in kwargs.items()})
    with pytest.raises(error, match=what):
        fit.fit(module)
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), start, strict=True))


def test_making_the_callback_draws_no_numbers():
    before = torch.get_rng_state()
    callback()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_radius_that_does_not_exist_is_refused_where_it_is_given():
    with pytest.raises(ValueError, match="-1"):
        callback(rho=-1.0)
    with pytest.raises(ValueError, match="Lightning calls training_step"):
        callback(rounding="float32")


def test_a_second_pass_without_a_loss_is_an_error():
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.calls == 4 else loss

    with pytest.raises(RuntimeError, match="None at w \\+ e"):
        trainer([callback()]).fit(Skips())


def on_one_rank(rank, port, results):
    import os
    import warnings

    import_lightning()
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    class Spawned(LightningEnvironment):
        creates_processes_externally = True

    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}

    class Half(Module):
        def train_dataloader(self):
            data = [(x[4 * rank :][:4], y[4 * rank :][:4]) for x, y in batches()]
            return torch.utils.data.DataLoader(data, batch_size=None)

    warnings.filterwarnings("error", message="the ascent gradients of all ranks are the same")
    for shared in (None, True):
        for accumulate, clip in MATRIX:
            module = Half()
            module.net = without_randomness()
            strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=Spawned())
            quiet = {"use_distributed_sampler": False, "strategy": strategy, "devices": 2}
            trainer([callback(sync_ascent=shared)], accumulate=accumulate, clip=clip, **quiet).fit(module)
            results[rank, shared, accumulate, clip] = [p.detach() for p in module.parameters()]


def without_randomness():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3))


@pytest.fixture(scope="module")
def ranks():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(on_one_rank, (port, results), nprocs=2)
        return dict(results)


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "clip"), MATRIX)
@pytest.mark.parametrize("shared", [None, True], ids=["a perturbation each", "one for both"])
def test_two_ranks(shared, accumulate, clip, ranks):
    model = without_randomness()
    optimizer = sgd(model)
    for i, (x, y) in enumerate(batches()):
        parts = [slice(None)] if shared else [slice(4), slice(4, None)]
        share = len(parts) * accumulate
        for part in parts:

            def loss_at(m, x=x[part], y=y[part], share=share):
                return LOSS(m(x), y) / share

            add_sam_gradient(model, loss_at, rho=0.1)
        if (i + 1) % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    first, second = (ranks[rank, shared, accumulate, clip] for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for w, p in zip(first, model.parameters(), strict=True):
        torch.testing.assert_close(w, p.detach(), rtol=0, atol=1e-6)


# SAM from configure_optimizers, without the callback


def sam(model):
    return SAM.wrap(sgd(model), rho=0.1, module=model)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sam_as_the_optimizer_of_automatic_optimization(precision):
    """Works, and does twice what training_step does: it counts and logs in both passes."""
    module = Module(sam)
    fit = trainer([], precision=precision)
    fit.fit(module)
    assert largest_difference(module.net, by_hand(precision)[0]) == 0.0
    assert fit.global_step == 8
    assert int(module.net[1].num_batches_tracked) == 8
    assert module.calls == 16


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [({"accumulate": 2}, "left gradients from before"), ({"precision": "16-mixed"}, "would train the base optimizer")],
    ids=["accumulating", "16-mixed"],
)
def test_sam_as_the_optimizer_where_lightning_would_train_something_else(kwargs, what):
    module = Module(sam)
    start = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(RuntimeError, match=what):
        trainer([], **kwargs).fit(module)
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), start, strict=True))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_module_with_a_loop_of_its_own(precision):
    """Manual optimization: the contexts around `manual_backward`, which scales, and the module's plain optimizer."""

    class Loops(Module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            if batch_idx == 0:
                self.sam = Perturbation(self, rho=0.1)
            self.manual_backward(self.loss_of(self.net, *batch))
            with self.sam.perturbed():
                self.manual_backward(self.loss_of(self.net, *batch))
            optimizer.step()
            optimizer.zero_grad()

    module = Loops()
    fit = trainer([], precision=precision)
    fit.fit(module)
    assert largest_difference(module.net, by_hand(precision)[0]) == 0.0
    assert fit.global_step == 8


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_monitor_sees_every_step_and_training_does_not_notice(accumulate, tmp_path):
    from sam_optim import Loss, SharpnessMonitor
    from sam_optim.integrations.lightning import MonitorCallback, SAMCallback

    results = []
    for watched in (False, True):
        module, logger = Module(), in_memory_logger()
        monitor = SharpnessMonitor(Loss(module.net, LOSS, batches()[:2]), every=2, budget=None)
        callbacks = [SAMCallback(rho=0.1), *([MonitorCallback(monitor)] if watched else [])]
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=2, callbacks=callbacks, logger=logger, accumulate_grad_batches=accumulate,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module)
        results.append([p.detach().clone() for p in module.parameters()])
    assert all(map(torch.equal, *results))
    num = 2 * len(batches()) // accumulate
    assert [row["step"] for row in monitor.history] == list(range(2, num + 1, 2))
    assert monitor.history[0]["worst_case"] > 0
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["MonitorCallback"]
    assert state["history"] == monitor.history
    logged = [row["sharpness/lambda_max"] for _, row in logger.rows if "sharpness/lambda_max" in row]
    assert logged == [row["lambda_max"] for row in monitor.history]
