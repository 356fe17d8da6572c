"""Frameworks whose pages have no helper here: what they train, beside SAM by hand in float64."""

import copy

import pytest
import torch
from test_loops import LR, RHO, assert_close, batches, gradients_by_hand, network, sam
from torch import nn
from torch.nn.functional import cross_entropy

from sam_optim import SAM, Perturbation

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks


def trained_by_hand(model, *, num=4):
    for x, y in batches(num):
        truth = gradients_by_hand(model, lambda m, x=x, y=y: cross_entropy(m(x), y))
        model(x)  # buffers of the first pass
        with torch.no_grad():
            for p, g in zip(model.parameters(), truth, strict=True):
                p.sub_(g, alpha=LR)
    return model


def check(model, twin, *, tolerance=1e-12):
    trained_by_hand(twin)
    assert_close([*model.parameters(), *model.buffers()], [*twin.parameters(), *twin.buffers()], tolerance=tolerance)


@pytest.fixture
def models():
    model = network(batch_norm=True)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("way", ["contexts", "first and second step", "closure"])
def test_fabric(models, way):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1, precision="64-true")
    model, twin = models
    wrapped, optimizer = fabric.setup(model, sam(model, module=None))
    optimizer.module = wrapped
    for x, y in batches():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = cross_entropy(wrapped(x), y)
            fabric.backward(loss)
            return loss

        if way == "closure":
            optimizer.step(closure)
            continue
        closure()
        if way == "contexts":
            with optimizer.perturbed():
                fabric.backward(cross_entropy(wrapped(x), y))
            optimizer.step()
        else:
            optimizer.first_step(zero_grad=True)
            fabric.backward(cross_entropy(wrapped(x), y))
            optimizer.second_step(zero_grad=True)
    check(model, twin, tolerance=1e-7)  # Fabric hands out float32


def test_skorch(models):
    skorch = pytest.importorskip("skorch")
    model, twin = models

    class Names(skorch.callbacks.Callback):
        def on_train_begin(self, net, **kwargs):
            net.optimizer_.module = net.module_

    net = skorch.NeuralNet(
        model,
        criterion=nn.CrossEntropyLoss,
        optimizer=SAM,
        optimizer__base_optimizer=torch.optim.SGD,
        optimizer__rho=RHO,
        lr=LR,
        max_epochs=1,
        batch_size=8,
        train_split=None,
        iterator_train__shuffle=False,
        callbacks=[Names()],
        verbose=0,
    )
    x, y = (torch.cat(parts).numpy() for parts in zip(*batches(), strict=True))
    net.fit(x, y)
    check(net.module_, twin)


def test_ignite(models):
    ignite = pytest.importorskip("ignite.engine")
    model, twin = models
    optimizer = sam(model)

    def update(engine, batch):
        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        return optimizer.step(closure)

    ignite.Engine(update).run(batches(), max_epochs=1)
    check(model, twin)
    stock = ignite.create_supervised_trainer(model, optimizer, cross_entropy)
    with pytest.raises(RuntimeError, match=r"only plain gradients.*in Ignite, write the update function"):
        stock.run(batches(), max_epochs=1)


def test_fastai(models):
    basics = pytest.importorskip("fastai.basics")
    model, twin = models

    class Moves(basics.Callback):
        def before_fit(self):
            self.perturbation = Perturbation(self.model, rho=RHO)

        def after_backward(self):
            with self.perturbation.perturbed():
                self.loss_func(self.model(*self.xb), *self.yb).backward()

    data = [pair for x, y in batches() for pair in zip(x, y, strict=True)]
    loaders = basics.DataLoaders(basics.DataLoader(data, bs=8), basics.DataLoader(data, bs=8), device="cpu")
    learner = basics.Learner(
        loaders, model, nn.CrossEntropyLoss(), opt_func=lambda params, lr: basics.SGD(params, lr), lr=LR, cbs=Moves()
    )
    learner.remove_cb(basics.Recorder)  # which averages in float32
    learner.fit(1, LR, wd=0.0)
    check(model, twin)


def test_mmengine(models):
    pytest.importorskip("mmengine")
    from mmengine.model import BaseModel
    from mmengine.optim import OptimWrapper

    net, twin = models

    class Classifier(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, inputs, targets, mode):
            return {"loss": cross_entropy(self.net(inputs), targets)}

        def train_step(self, data, optim_wrapper):
            def loss_of():
                with optim_wrapper.optim_context(self):
                    losses = self._run_forward(self.data_preprocessor(data, True), mode="loss")
                return self.parse_losses(losses)

            loss, log_vars = loss_of()
            optim_wrapper.scale_loss(loss).backward()
            optim_wrapper.optimizer.first_step()
            optim_wrapper.update_params(loss_of()[0])
            return log_vars

    model = Classifier()
    wrapper = OptimWrapper(sam(model))
    for x, y in batches():
        model.train_step((x, y), wrapper)
    check(net, twin)


def test_peft_moves_the_adapters_alone():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    model = peft.get_peft_model(network(), config).double()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    x, y = batches()[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SAM(trained, torch.optim.SGD, rho=RHO, lr=LR, module=model)
    truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y), moved=names)
    cross_entropy(model(x), y).backward()
    with optimizer.perturbed():
        cross_entropy(model(x), y).backward()
    assert_close([p.grad for p in trained], [g for g in truth if g is not None])


def test_a_loss_with_proxies_of_another_optimizer():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    trunk, criterion, (x, y) = network(batch_norm=True), losses.ProxyAnchorLoss(3, 3).double(), batches()[0]
    both = nn.ModuleList([trunk, criterion])
    optimizer = SAM(trunk.parameters(), torch.optim.SGD, rho=RHO, lr=LR, module=[trunk, criterion])
    names = [f"0.{name}" for name, _ in trunk.named_parameters()]
    truth = gradients_by_hand(both, lambda m: m[1](m[0](x), y), moved=names)
    criterion(trunk(x), y).backward()
    with optimizer.perturbed():
        criterion(trunk(x), y).backward()
    assert_close([p.grad for p in both.parameters()], truth)


# TRL


def test_trainers_that_generate_their_batch_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    from sam_optim.integrations.transformers import SAMTrainer

    class Generates(transformers.Trainer):
        def _prepare_inputs(self, inputs):
            return self._generate_and_score(inputs)

    class Buffers(transformers.Trainer):
        def _prepare_inputs(self, inputs):
            self._buffered = inputs
            return inputs

    class Renames(transformers.Trainer):
        def _prepare_inputs(self, inputs):
            return super()._prepare_inputs({"x": inputs["y"]})

    for trainer, what in ((Generates, "generates text"), (Buffers, "goes on in a buffer")):
        with pytest.raises(
            TypeError, match=rf"{trainer.__name__}\._prepare_inputs makes a new batch in each call.*{what}"
        ):
            type("Both", (SAMTrainer, trainer), {})(network())
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    type("Both", (SAMTrainer, Renames), {})(network(), arguments)


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_trl_trainers_that_generate_their_batch_are_refused(name):
    trl = pytest.importorskip("trl")
    from sam_optim.integrations.transformers import SAMTrainer

    with pytest.raises(TypeError, match=f"{name}._prepare_inputs makes a new batch in each call"):
        type("Both", (SAMTrainer, getattr(trl, name)), {})(network())


def test_a_trainer_counts_once_what_it_counts_in_its_private_attributes(tmp_path):
    transformers = pytest.importorskip("transformers")
    from sam_optim.integrations.transformers import SAMTrainer

    class Counts(transformers.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._tokens, self._metrics = 0, {"train": {"loss": []}}
            self._same = self._metrics["train"]["loss"], self._metrics

        def compute_loss(self, model, inputs, **kwargs):
            loss = cross_entropy(model(inputs["x"]), inputs["labels"])
            self._tokens += inputs["x"].numel()
            self._metrics["train"]["loss"].append(float(loss))
            return loss

    data = [{"x": x, "labels": y} for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = type("Both", (SAMTrainer, Counts), {})(network(), arguments, train_dataset=data, rho=RHO)
    trainer.train()
    assert trainer._tokens == 32 * 6
    assert len(trainer._metrics["train"]["loss"]) == 4
    assert trainer._same[1] is trainer._metrics


@pytest.mark.parametrize("algorithm", ["PPO", "A2C", "DQN", "SAC"])
def test_stable_baselines3_stops_and_works_with_a_train_of_two_passes(algorithm):
    baselines = pytest.importorskip("stable_baselines3")
    settings = {"PPO": {"n_steps": 16, "batch_size": 8}, "A2C": {}}.get(algorithm, {"learning_starts": 4})
    sam_of_policy = {"optimizer_class": SAM, "optimizer_kwargs": {"rho": RHO, "base_optimizer": torch.optim.SGD}}
    task = "Pendulum-v1" if algorithm == "SAC" else "CartPole-v1"
    agent = getattr(baselines, algorithm)("MlpPolicy", task, policy_kwargs=sam_of_policy, device="cpu", **settings)
    with pytest.raises(RuntimeError, match=r"stable-baselines3 steps inside train\(\)"):
        agent.learn(32)
    if algorithm != "A2C":
        return

    def loss_of(policy, batch):
        values, log_prob, entropy = policy.evaluate_actions(batch.observations, batch.actions.long().flatten())
        return nn.functional.mse_loss(values.flatten(), batch.returns) - (batch.advantages * log_prob + entropy).mean()

    class TwoPasses(baselines.A2C):
        def train(self):
            self._update_learning_rate(self.policy.optimizer)
            batch = next(self.rollout_buffer.get(batch_size=None))
            truth = gradients_by_hand(self.policy, lambda policy: loss_of(policy, batch))
            rate = self.policy.optimizer.param_groups[0]["lr"]
            expected = [p - rate * g for p, g in zip(self.policy.parameters(), truth, strict=True)]

            def closure():
                self.policy.optimizer.zero_grad()
                loss = loss_of(self.policy, batch)
                loss.backward()
                return loss

            self.policy.optimizer.step(closure)
            assert_close(self.policy.parameters(), expected, tolerance=1e-6)
            self._n_updates += 1

    agent = TwoPasses("MlpPolicy", task, policy_kwargs=sam_of_policy, device="cpu").learn(32)
    assert agent._n_updates == 7  # after every five steps
