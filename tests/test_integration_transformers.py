"""Hugging Face's Trainer: SAMTrainer on a small BERT made from a configuration, against SAM written out by hand."""

import inspect
import itertools
import socket

import pytest
import torch
from by_hand import add_sam_gradient, largest_difference, seed_step, sgd, train

from sam_optim import MSAM, SAM, asam_param_groups, late_phase, proportional_to_lr

MATRIX = [(accumulate, clip) for accumulate in (1, 2) for clip in (0.0, 0.05)]
SETTINGS = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "num_labels": 3,
}


@pytest.fixture(autouse=True)
def _importable():
    pytest.importorskip("transformers")


def bert(**settings):
    """Dropout everywhere; an embedding whose gradient has rows of zeros; T = 1 for biases and LayerNorm in ASAM."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**SETTINGS, **settings)).train()


def sentences():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(32, (64, 12), generator=generator), torch.randint(3, (64,), generator=generator)


def arguments(tmp_path, **kwargs):
    from transformers import TrainingArguments

    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    fixed = {"num_train_epochs": 1, "learning_rate": 0.01, "optim": "adamw_torch_fused"}
    if _has_strategies():
        fixed["train_sampling_strategy"] = "sequential"
    return TrainingArguments(str(tmp_path), per_device_train_batch_size=8, **(quiet | fixed | kwargs))


def _has_strategies():
    """Since transformers 5 the order of a training set is an argument."""
    from transformers import TrainingArguments

    return "train_sampling_strategy" in inspect.signature(TrainingArguments).parameters


def trainer(model, args, *, cls=None, **kwargs):
    from transformers import TrainerCallback

    from sam_optim.integrations.transformers import SAMTrainer

    class Seeds(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            seed_step(state.global_step)

    ids, labels = sentences()
    data = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    cls, kwargs = (SAMTrainer, {"rho": 0.1} | kwargs) if cls is None else (cls, kwargs)
    if not _has_strategies():
        sampler = {"_get_train_sampler": lambda self, *_: torch.utils.data.SequentialSampler(self.train_dataset)}
        cls = type(cls.__name__, (cls,), sampler)
    return cls(model, args, train_dataset=data, callbacks=[Seeds()], **kwargs)


def divisor(model, accumulate):
    """What a Trainer divides the loss of a micro-batch by.

    Of a model whose forward takes any keyword (this one does since transformers 5) it believes that the loss is a sum
    divided by the number of examples of a step, and does not divide it. This model's is a mean.
    """
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    return 1 if takes_any else accumulate


def by_hand(*, accumulate=1, clip=0.0, autocast=None, groups=lambda model: None):
    """AdamW, fused and with a linear schedule. Both passes see the same."""
    from transformers import get_linear_schedule_with_warmup

    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 8 // accumulate)
    ids, labels = sentences()
    losses = train(
        model,
        optimizer,
        list(zip(ids.split(8), labels.split(8), strict=True)),
        rho=0.1,
        accumulate=accumulate,
        divide=divisor(model, accumulate),
        clip=clip or None,
        loss_of=lambda m, x, y: m(input_ids=x, labels=y).loss,
        after=schedule.step,
        autocast=autocast,
        groups=groups(model),
    )
    return model, losses


@pytest.mark.parametrize(("accumulate", "clip"), MATRIX)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # Accelerate's own, in version 1.0
def test_the_trainer(bf16, accumulate, clip, tmp_path):
    model = bert()
    args = arguments(tmp_path, bf16=bf16, gradient_accumulation_steps=accumulate, max_grad_norm=clip)
    sam = trainer(model, args)
    result = sam.train()
    truth, losses = by_hand(accumulate=accumulate, clip=clip, autocast=torch.bfloat16 if bf16 else None)
    assert largest_difference(model, truth) == 0.0
    assert result.global_step == 8 // accumulate
    num_losses = 8 // accumulate * divisor(model, accumulate)
    assert result.training_loss == pytest.approx(sum(losses) / num_losses, rel=1e-6)  # at w
    assert sam.perturbation.param_groups[0]["rho"] == 0.1


def test_the_groups_of_the_asam_paper(tmp_path):
    model = bert()
    trainer(model, arguments(tmp_path, max_grad_norm=0.0), param_groups=asam_param_groups).train()

    def groups(m):
        return [
            ([p for p in m.parameters() if (p.ndim > 1) == large], eta) for large, eta in ((True, 0.01), (False, None))
        ]

    assert largest_difference(model, by_hand(groups=groups)[0]) == 0.0


def test_another_optimizer_and_a_checkpoint(tmp_path):
    """Resuming is not stopping."""
    through, model = bert(), bert()
    args = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    trainer(through, arguments(tmp_path / "a", num_train_epochs=2, **args)).train()
    stopped = trainer(model, arguments(tmp_path / "b", num_train_epochs=1, save_strategy="epoch", **args))
    stopped.train()
    resumed_model = bert()
    resumed = trainer(resumed_model, arguments(tmp_path / "b", num_train_epochs=2, **args))
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(resumed_model, through) == 0.0
    assert largest_difference(resumed_model, model) > 1e-3


def test_each_training_has_the_model_that_it_was_given(tmp_path):
    """As hyperparameter searches do: `model_init` makes a model and an optimizer for each."""
    made = []

    def model_init():
        made.append(bert())
        return made[-1]

    sam = trainer(None, arguments(tmp_path, max_grad_norm=0.0), model_init=model_init)
    sam.train()
    sam.train()
    assert all(largest_difference(model, by_hand()[0]) == 0.0 for model in made[-2:])


def test_a_fault_in_the_second_pass_leaves_the_weights_as_they_were(tmp_path):
    from sam_optim.integrations.transformers import SAMTrainer

    class Faulty(SAMTrainer):
        passes = 0

        def compute_loss(self, model, *args, **kwargs):
            self.passes += 1
            if self.passes == 4:
                raise ZeroDivisionError
            return super().compute_loss(model, *args, **kwargs)

        def training_step(self, *args, **kwargs):
            if self.passes == 2:
                self.before = [p.detach().clone() for p in self.model.parameters()]
            return super().training_step(*args, **kwargs)

    model = bert()
    faulty = trainer(model, arguments(tmp_path, gradient_accumulation_steps=2), cls=Faulty, rho=0.1)
    with pytest.raises(ZeroDivisionError):
        faulty.train()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), faulty.before, strict=True))


def test_a_stock_trainer_with_sam_would_train_its_base_and_says_so(tmp_path):
    from transformers import Trainer

    model = bert()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = SAM.wrap(sgd(model), rho=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    stock = trainer(model, arguments(tmp_path), cls=Trainer, optimizers=(optimizer, schedule))
    with pytest.raises(RuntimeError, match="would train the base optimizer alone"):
        stock.train()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))


def test_a_sam_inside_a_sam_trainer_is_refused(tmp_path):
    model = bert()
    optimizer = SAM.wrap(sgd(model), rho=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    twice = trainer(model, arguments(tmp_path), optimizers=(optimizer, schedule))
    with pytest.raises(ValueError, match=r"SAM, which perturbs .* base, SGD"):
        twice.train()


def test_a_variant_with_one_pass_is_the_optimizer_of_a_sam_trainer(tmp_path):
    model, truth = bert(), bert()
    optimizer = MSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3)
    lasting = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.0)
    sam = trainer(model, args, optimizers=(optimizer, lasting), rho=0.05)
    sam.train()
    by_hand = MSAM(truth.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3)
    ids, labels = sentences()
    truth.train()
    for step in range(4):
        seed_step(step)
        by_hand.zero_grad()
        for k in (2 * step, 2 * step + 1):
            with by_hand.perturbed():
                loss = truth(input_ids=ids[8 * k : 8 * k + 8], labels=labels[8 * k : 8 * k + 8]).loss
                (loss / divisor(truth, 2)).backward()
        by_hand.step()
    assert largest_difference(model, truth) == 0.0


def test_a_schedule_leaves_out_second_passes(tmp_path):
    from transformers import Trainer

    model, plain = bert(), bert()
    args = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}
    trainer(model, arguments(tmp_path / "a", **args), schedule=late_phase(8)).train()
    trainer(plain, arguments(tmp_path / "b", **args), cls=Trainer).train()
    assert largest_difference(model, plain) == 0.0
    late = bert()
    trainer(late, arguments(tmp_path / "c", **args), schedule=late_phase(7)).train()
    assert largest_difference(late, plain) > 1e-5
    with pytest.raises(ValueError, match="proportional_to_lr"):
        trainer(late, arguments(tmp_path / "d", **args), schedule=proportional_to_lr(0.0, 0.1))


def test_what_cannot_be_done_is_refused_when_the_trainer_is_made(tmp_path, monkeypatch):
    from transformers import Trainer

    from sam_optim.integrations.transformers import SAMTrainer

    with pytest.raises(ValueError, match="-1"):
        trainer(bert(), arguments(tmp_path), rho=-1.0)
    for optim in ("adalomo", "galore_adamw_layerwise"):
        with pytest.raises(RuntimeError, match=rf"{optim}.*updates the weights in the first backward"):
            trainer(bert(), arguments(tmp_path, optim=optim))

    def with_deepspeed(self, *args, **kwargs):
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "__init__", with_deepspeed)
    with pytest.raises(RuntimeError, match="DeepSpeed runs a backward of its own"):
        SAMTrainer(bert(), arguments(tmp_path))


WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLIP = {1: 0.0, 2: 0.05}  # without it what the losses are multiplied by matters
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


def on_one_rank(rank, port, folder, results):
    import os
    import warnings

    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    for shared, accumulate in itertools.product((None, True), (1, 2)):
        model = bert(**WITHOUT_DROPOUT)
        kwargs = {"gradient_accumulation_steps": accumulate, "max_grad_norm": CLIP[accumulate], "ddp_backend": "gloo"}
        sam = trainer(model, arguments(folder, **kwargs, **SGD), sync_ascent=shared)
        sam.train()
        assert type(sam.perturbation.module) is torch.nn.parallel.DistributedDataParallel
        results[rank, shared, accumulate] = [p.detach() for p in model.parameters()]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """The ranks take turns at batches of 8. The Trainer multiplies losses by the number of ranks: gradients add up."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(on_one_rank, (port, str(tmp_path), results), nprocs=2)
        results = dict(results)
    ids, labels = sentences()
    for shared, accumulate in itertools.product((None, True), (1, 2)):
        model = bert(**WITHOUT_DROPOUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        size = 16 if shared else 8
        for i in range(64 // size):

            def loss_of(m, i=i, size=size):
                x, y = ids[size * i :][:size], labels[size * i :][:size]
                return m(input_ids=x, labels=y).loss * (size / 8)

            add_sam_gradient(model, loss_of, rho=0.1)
            if size * (i + 1) % (16 * accumulate) == 0:
                if CLIP[accumulate]:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP[accumulate])
                optimizer.step()
                optimizer.zero_grad()
        first, second = (results[rank, shared, accumulate] for rank in (0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for w, p in zip(first, model.parameters(), strict=True):
            torch.testing.assert_close(w, p.detach(), rtol=0, atol=1e-6)


def test_a_monitor_sees_every_step_reports_and_resumes(tmp_path):
    from sam_optim import Loss, SharpnessMonitor
    from sam_optim.core.errors import InputError
    from sam_optim.integrations.transformers import MonitorCallback

    def train_(steps, **kwargs):
        ids, labels = sentences()
        model = bert()
        loss = Loss(model, None, [{"input_ids": ids[:8].clamp(min=1), "labels": labels[:8]}])  # 0 is padding
        monitor = SharpnessMonitor(loss, every=2, budget=None)
        args = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=4)
        sam_trainer = trainer(model, args, rho=0.1)
        if kwargs.pop("watched", True):
            sam_trainer.add_callback(MonitorCallback(sam_trainer, monitor))
        sam_trainer.train(**kwargs)
        return sam_trainer, monitor, [p.detach().clone() for p in model.parameters()]

    _, _, plain = train_(8, watched=False)
    sam_trainer, whole, watched = train_(8)
    assert all(map(torch.equal, plain, watched))
    assert [row["step"] for row in whole.history] == [2, 4, 6, 8]
    assert all(row["worst_case"] > 0 and row["lambda_max"] > 0 for row in whole.history)
    logged = [row["sharpness/lambda_max"] for row in sam_trainer.state.log_history if "sharpness/lambda_max" in row]
    assert logged == [row["lambda_max"] for row in whole.history]
    _, resumed, _ = train_(8, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name in ("step", "lambda_max", "critical_sharpness"):
        assert [row[name] for row in resumed.history] == [row[name] for row in whole.history]

    saved = tmp_path / "checkpoint-4" / MonitorCallback.FILE
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        train_(8, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
