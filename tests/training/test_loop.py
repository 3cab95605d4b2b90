"""The loop keeps batch norm's running statistics wherever it keeps weights."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.utils import DynamoBackend
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from xbt.errors import ConfigError, DataError
from xbt.run_dir import RunDirectory
from xbt.training import BackboneTraining, TrainArgs
from xbt.training.args import make_optimizer
from xbt.training.loop import TrainedTensors, TrainingLoop, make_accelerator


class Killed(Exception):
    pass


class Net(nn.Module):
    """A convolution with batch norm under a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, batch):
        logits = self.head(self.body(batch["x"]).mean(dim=(2, 3)))
        return nn.functional.cross_entropy(logits, batch["y"]), {}


class Pictures:
    def __init__(self, n=40):
        generator = torch.Generator().manual_seed(0)
        self.x = 3 + 2 * torch.randn(n, 3, 6, 6, generator=generator)
        self.y = torch.randint(3, (n,), generator=generator)

    def __len__(self):
        return len(self.y)

    def __getitems__(self, draws):
        rows = torch.tensor([draw.item for draw in draws])
        return {"x": self.x[rows], "y": self.y[rows]}


def start(path, steps=12, kill_at=None, args=None, **options):
    """A loop over a new network in a run directory; it dies in the middle of the step `kill_at`."""
    args = args or TrainArgs(
        steps=steps, batch_size=8, lr=0.02, warmup_steps=1, eval_every=4, checkpoint_every=5
    )
    run = RunDirectory(path, args)
    accelerator = make_accelerator(args, run, args, "test")
    torch.manual_seed(1)
    net, count = Net(), [0]

    def after_step():
        count[0] += 1
        if count[0] == kill_at:
            raise Killed

    return net, TrainingLoop(accelerator, run, args, net, Pictures(), after_step=after_step, **options)


def same(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("scored", [False, True])
def test_a_killed_run_ends_with_the_same_weights_and_statistics(tmp_path, scored):
    def options(found):
        return (
            {"evaluate": lambda: {"score": found["net"].body[1].running_mean.sum().item()}} if scored else {}
        )

    whole, killed, again = {}, {}, {}
    whole["net"], loop = start(tmp_path / "whole", **options(whole))
    loop.fit()
    killed["net"], loop = start(tmp_path / "killed", kill_at=8, **options(killed))
    with pytest.raises(Killed):
        loop.fit()
    assert not same(killed["net"], whole["net"])
    again["net"], loop = start(tmp_path / "killed", **options(again))
    state = loop.fit()
    assert state.step == 12
    assert same(again["net"], whole["net"])
    assert whole["net"].body[1].running_mean.abs().min() > 0.01  # they moved, so there was something to keep
    assert whole["net"].body[1].num_batches_tracked == state.best_step
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0] == results[1]


def test_the_kept_step_has_its_own_statistics(tmp_path):
    seen = []

    def evaluate():
        seen.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
        return {"score": [0.1, 0.2, 0.9, 0.3][len(seen) - 1]}

    net, loop = start(tmp_path, evaluate=evaluate)
    state = loop.fit()
    assert state.best_step == 8
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, seen[2][name]), name
    assert not torch.equal(net.body[1].running_mean, seen[3]["body.1.running_mean"])


def test_without_evaluation_the_last_step_is_kept_and_said_to_be(tmp_path, capsys):
    _, loop = start(tmp_path, steps=3)
    state = loop.fit()
    assert state.best_step == 3
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "best_step": 3, "history": [], "processes": 1,
    }  # fmt: skip
    assert "kept step 3, the last one" in capsys.readouterr().out


def test_with_evaluation_the_score_is_said(tmp_path, capsys):
    _, loop = start(tmp_path, steps=3, evaluate=lambda: {"score": 0.25})
    loop.fit()
    assert "kept step 0: held-out score 0.2500" in capsys.readouterr().out


def test_a_checkpoint_without_the_statistics_is_refused(tmp_path):
    _, loop = start(tmp_path, kill_at=6)
    with pytest.raises(Killed):
        loop.fit()
    file = tmp_path / "checkpoints/step_00000005/trainable.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "running" not in name}, file)
    _, loop = start(tmp_path)
    with pytest.raises(DataError, match=r"step_00000005 does not fit the model at 'body\.1\.running_mean'"):
        loop.fit()


def test_which_buffers_are_trained():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.BatchNorm1d(2).requires_grad_(False)
            self.trained = nn.BatchNorm1d(2)
            self.plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
            self.frozen_plain = nn.Sequential(
                nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2, affine=False)
            )
            self.rotation = orthogonal(nn.Linear(3, 3, bias=False), orthogonal_map="matrix_exp")
            self.loss = nn.Module()
            self.loss.constants = nn.Module()
            self.loss.constants.register_buffer("table", torch.zeros(3))
            self.trained.register_buffer("cache", torch.zeros(1), persistent=False)

    module = Whole()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected = {f"{owner}.{name}" for owner in ("trained", "plain.1") for name in statistics}
    trained = TrainedTensors(module)
    assert set(trained.buffers) == {*expected, "rotation.parametrizations.weight.0.base"}
    assert not any("frozen" in name for name in trained.copy())


def test_buffers_are_looked_up_again():
    module = nn.BatchNorm1d(2)
    trained = TrainedTensors(module)
    kept = trained.copy()
    module.double()  # as moving to another device does, this makes other tensors
    module.running_mean.fill_(5.0)
    assert trained.copy()["running_mean"].tolist() == [5.0, 5.0]
    assert kept["running_mean"].tolist() == [0.0, 0.0]
    trained.set(kept)
    assert module.running_mean.tolist() == [0.0, 0.0]


def test_optimizers():
    parameters = dict(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).named_parameters())
    made = {
        kind: make_optimizer(
            parameters, BackboneTraining(optimizer=kind, weight_decay=0.5, momentum=0.7), ("1.",)
        )
        for kind in ("sgd", "adam", "adamw")
    }
    made["default"] = make_optimizer(parameters, TrainArgs(weight_decay=0.5), ("1.",))
    kinds = {name: type(optimizer) for name, optimizer in made.items()}
    assert kinds == {
        "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
        "default": torch.optim.AdamW,
    }  # fmt: skip
    for optimizer in made.values():
        decay, rest = optimizer.param_groups
        assert (decay["weight_decay"], rest["weight_decay"]) == (0.5, 0.0)
        assert [id(p) for p in decay["params"]] == [id(parameters["0.weight"])]
        assert len(rest["params"]) == 3
    assert made["sgd"].param_groups[0]["momentum"] == 0.7


def test_the_chosen_optimizer_trains(tmp_path):
    """One step of gradient descent, written out."""
    args = BackboneTraining(
        steps=1, batch_size=8, lr=0.1, optimizer="sgd", momentum=0.0, weight_decay=0.0, checkpoint_every=0
    )
    net, loop = start(tmp_path, args=args)
    by_hand = Net()
    by_hand.load_state_dict(net.state_dict())
    from xbt.batches import SeededBatches

    draws = next(iter(SeededBatches(40, 8, 0, 0, 1)))
    loss, _ = by_hand(Pictures().__getitems__(draws))
    loss.backward()
    loop.fit()
    for (name, ours), theirs in zip(net.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(ours, theirs - 0.1 * theirs.grad, atol=1e-6), name


def test_epochs_are_counted_in_steps():
    args = BackboneTraining(epochs=3, warmup_epochs=1, batch_size=8, steps=7, warmup_steps=2).in_steps(41)
    assert (args.steps, args.warmup_steps, args.epochs, args.warmup_epochs) == (15, 5, None, None)
    args = BackboneTraining(batch_size=8, steps=7, warmup_steps=2).in_steps(41)
    assert (args.steps, args.warmup_steps) == (7, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": -1}, "--training.epochs must not be negative, got -1"),
        ({"warmup_epochs": -2}, "--training.warmup_epochs must not be negative, got -2"),
        ({"optimizer": "lion"}, "--training.optimizer must be adam, adamw or sgd, got 'lion'"),
        ({"momentum": 1.0}, r"--training.momentum must lie in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "--training.batch_size must be at least 1, got 0"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ValueError, match=words):
        BackboneTraining(**change)


@pytest.mark.parametrize("steps", ["2", "auto"])
def test_a_loss_that_accelerate_would_divide_is_refused(steps, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
    with pytest.raises(ConfigError, match=f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}, but"):
        start(tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    start(tmp_path)


@pytest.mark.parametrize("adapted", [True, False])
def test_only_what_dynamo_can_trace_is_compiled(adapted, tmp_path, monkeypatch, capsys):
    args = TrainArgs(steps=1, batch_size=8)
    run = RunDirectory(tmp_path, args)
    accelerator = make_accelerator(args, run, args, "test")
    plugin = accelerator.state.dynamo_plugin
    monkeypatch.setattr(plugin, "backend", DynamoBackend.EAGER)
    net = Net()
    if adapted:
        net.attention = nn.ModuleDict({"layer": nn.MultiheadAttention(8, 2)})
        net.attention = get_peft_model(net.attention, LoraConfig(r=2, target_modules=["layer"]))
    loop = TrainingLoop(accelerator, run, args, net, Pictures())
    assert isinstance(loop.model, torch._dynamo.OptimizedModule) is not adapted
    assert capsys.readouterr().out.count("the model is not compiled") == int(adapted)
    assert plugin.backend == DynamoBackend.EAGER
