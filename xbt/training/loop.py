"""Training loop of all recipes: seeded batches, held-out selection, checkpoints that resume exactly."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DynamoBackend,
    broadcast,
    broadcast_object_list,
    set_seed,
    tqdm,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from xbt.batches import SeededBatches
from xbt.config import config_to_dict, flatten
from xbt.errors import ConfigError, DataError
from xbt.projections.trainer import Score, StepSelection, mean_score
from xbt.run_dir import RunDirectory
from xbt.training.args import TrainArgs, make_optimizer

_WEIGHTS = "trainable.safetensors"
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def make_accelerator(args: TrainArgs, run: RunDirectory, config: Any, name: str) -> Accelerator:
    """Seed everything, start Accelerate for this run and prepare the run's directory.

    Batches are split, so ``batch_size`` is global. Precision, devices and processes come from
    ``accelerate launch``.
    """
    accumulated = os.environ.get(_ACCUMULATION, "1").strip()
    if accumulated != "1":
        # Accelerate would divide every loss by this number, although every batch is a step.
        raise ConfigError(
            f"{_ACCUMULATION} is {accumulated}, but every batch is one step of the optimiser; unset it (in "
            "Accelerate's config: gradient_accumulation_steps) and choose --training.batch_size"
        )
    accelerator = Accelerator(
        log_with=args.log_with,
        project_dir=str(run.path),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    set_seed(args.seed)
    if args.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"--training.batch_size {args.batch_size} cannot be split over {accelerator.num_processes} "
            f"processes; choose a multiple of {accelerator.num_processes}"
        )
    if accelerator.is_main_process:
        run.prepare()
    accelerator.wait_for_everyone()
    if args.log_with:
        flat = flatten(config_to_dict(config)).items()
        accelerator.init_trackers(
            name, config={key: v if isinstance(v, int | float | str) else str(v) for key, v in flat}
        )
    return accelerator


class TrainingLoop:
    """Training loop for a module; its forward takes a batch and returns ``(loss, metrics)``.

    Requirements: parameters that require gradients are what is trained, and with the buffers beside them
    (:class:`~xbt.training.loop.TrainedTensors`) what is checkpointed and selected; the dataset's
    ``__getitems__`` takes a list of :class:`~xbt.batches.Draw` and returns a batch.

    Args:
        accelerator: From :func:`make_accelerator`.
        run: The run's directory.
        args: Training settings; ``batch_size`` must not exceed the dataset's length.
        module: The module to train.
        dataset: The training data.
        evaluate: Returns held-out metrics, of which ``"score"`` decides: a number, or one for each held-out
            item (:class:`~xbt.projections.trainer.StepSelection`); ``None`` keeps the last step.
        after_step: Called after every optimiser step and after a checkpoint is loaded.
        no_decay: Names (or parts of names) of matrices that get no weight decay.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: RunDirectory,
        args: TrainArgs,
        module: nn.Module,
        dataset: Dataset[Any],
        *,
        evaluate: Callable[[], Mapping[str, Score]] | None = None,
        after_step: Callable[[], None] | None = None,
        no_decay: Iterable[str] = (),
    ) -> None:
        self.accelerator, self.run_dir, self.args = accelerator, run, args
        self.module, self.dataset = module, dataset
        self.evaluate, self.after_step = evaluate, after_step or (lambda: None)
        self.state = LoopState(history=[])
        self.trained = TrainedTensors(module)
        optimizer = make_optimizer(self.trained.parameters, args, no_decay)
        schedule = LambdaLR(optimizer, lambda step: args.lr_factor(step))
        with _compiled_if_possible(accelerator, module):
            self.model, self.optimizer, self.scheduler = accelerator.prepare(module, optimizer, schedule)
        accelerator.register_for_checkpointing(self.state)
        accelerator.register_save_state_pre_hook(self._save_trainable)
        accelerator.register_load_state_pre_hook(self._load_trainable)

    def fit(self) -> LoopState:
        """Train from the newest checkpoint or the start, and leave the selected weights in the module.

        Returns:
            The final state; ``best_step`` says which step's weights were kept.
        """
        if found := self._found_checkpoints():
            self.accelerator.load_state(str(found[-1]))
            self.after_step()
            self.accelerator.print(f"{self.run_dir.path}: continues from step {self.state.step}")
        if self.state.step == 0:
            self._evaluate_and_keep()
        size = len(self.dataset)  # type: ignore[arg-type]
        sampler = SeededBatches(size, self.args.batch_size, self.args.seed, self.state.step, self.args.steps)
        loader = self.accelerator.prepare(
            DataLoader(
                self.dataset,
                batch_sampler=sampler,
                collate_fn=_as_is,
                num_workers=self.args.num_workers,
                persistent_workers=False,
            )
        )
        bar = tqdm(total=self.args.steps, initial=self.state.step, desc=self.run_dir.path.name, unit="step")
        for batch in loader:
            metrics = self._step(batch)
            self.state.step += 1
            bar.update()
            self._after(metrics, bar)
        bar.close()
        if self.state.best_weights is not None:
            self.trained.set(self.state.best_weights)
        if self.evaluate is None:
            self.trained.agree()
            self.state.best_step = self.state.step
        for tracker in self.accelerator.trackers:
            # Not end_training(): it would also end the process group, which what follows still needs.
            tracker.finish()
        if self.accelerator.is_main_process:
            self.run_dir.write_json("result.json", self.result())
        score = f": held-out score {self.state.best_score:.4f}" if self.evaluate else ", the last one"
        self.accelerator.print(f"kept step {self.state.best_step}{score}")
        return self.state

    def result(self) -> dict[str, Any]:
        """Selected step, evaluations, and number of processes."""
        return {
            "best_step": self.state.best_step,
            "history": self.state.history,
            "processes": self.accelerator.num_processes,
        }

    def _step(self, batch: Any) -> dict[str, Tensor]:
        self.model.train()
        loss, metrics = self.model(batch)
        self.accelerator.backward(loss)
        if self.args.grad_clip:
            self.accelerator.clip_grad_norm_(self.trained.parameters.values(), self.args.grad_clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.after_step()
        return {"loss": loss.detach(), **metrics}

    def _after(self, metrics: dict[str, Tensor], bar: Any) -> None:
        step, args = self.state.step, self.args
        if step % args.log_every == 0 or step == args.steps:
            stacked = torch.stack([value.float() for value in metrics.values()])
            means = self.accelerator.reduce(stacked, reduction="mean").tolist()  # over processes
            values = dict(zip(metrics, means, strict=True))
            if not math.isfinite(values["loss"]):
                raise DataError(
                    f"the loss is {values['loss']} at step {step}; lower --training.lr (now {args.lr}) or "
                    "look for broken inputs, then run again with another --output_dir"
                )
            bar.set_postfix(loss=f"{values['loss']:.3f}")
            self.accelerator.log({**values, "lr": self.scheduler.get_last_lr()[0]}, step=step)
        if step % args.eval_every == 0 or step == args.steps:
            self._evaluate_and_keep()
        if args.checkpoint_every and (step % args.checkpoint_every == 0 or step == args.steps):
            self._checkpoint()

    def _evaluate_and_keep(self) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        self.trained.agree()
        # Every process takes the main one's numbers: a last-digit difference must not split their choices.
        metrics = broadcast_object_list([self.evaluate()])[0]
        means = {name: mean_score(value) for name, value in metrics.items()}
        assert self.state.history is not None
        self.state.history.append({"step": float(self.state.step), **means})
        self.accelerator.log({f"held_out/{k}": v for k, v in means.items()}, step=self.state.step)
        if self.state.improves(self.state.step, metrics["score"]):
            self.state.best_weights = self.trained.copy()

    def _checkpoint(self) -> None:
        final = self.run_dir.checkpoints / f"step_{self.state.step:08d}"
        partial = final.with_suffix(".partial")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            # A checkpoint appears under its name only when it is whole: a kill leaves a .partial behind.
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for outdated in self._found_checkpoints()[: -self.args.keep_checkpoints]:
                shutil.rmtree(outdated)
        self.accelerator.wait_for_everyone()

    def _found_checkpoints(self) -> list[Path]:
        return sorted(path for path in self.run_dir.checkpoints.glob("step_????????") if path.is_dir())

    def _save_trainable(self, models: list[nn.Module], weights: list[Any], directory: str) -> None:
        # Frozen base weights are re-read from their source: a checkpoint holds what training changes.
        weights.clear()
        if self.accelerator.is_main_process:
            Path(directory).mkdir(parents=True, exist_ok=True)
            save_file(self.trained.copy(), Path(directory) / _WEIGHTS)

    def _load_trainable(self, models: list[nn.Module], directory: str) -> None:
        models.clear()
        self.trained.set(load_file(Path(directory) / _WEIGHTS), f"the checkpoint {directory}")


@contextmanager
def _compiled_if_possible(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Keep Accelerate from compiling a module that TorchDynamo cannot trace.

    LoRA on ``nn.MultiheadAttention`` puts other tensors in the place of parameters in every forward pass.
    """
    plugin = accelerator.state.dynamo_plugin
    backend = plugin.backend
    if backend == DynamoBackend.NO or not _has_adapted_attention(module):
        yield
        return
    accelerator.print("the model is not compiled: TorchDynamo cannot trace LoRA on nn.MultiheadAttention")
    plugin.backend = DynamoBackend.NO
    try:
        yield
    finally:
        plugin.backend = backend


def _has_adapted_attention(module: nn.Module) -> bool:
    from peft.tuners.lora.layer import MultiheadAttention

    return any(isinstance(each, MultiheadAttention) for each in module.modules())


def _as_is(batch: Any) -> Any:
    return batch


@dataclass
class LoopState(StepSelection):
    """Progress of a run, saved in a checkpoint besides weights, optimiser and schedule.

    Attributes:
        step: Steps done.
        best_weights: What training changes (:class:`TrainedTensors`), as it was at the best step. Where
            nothing is held out, the last step is the best.
        history: One entry per evaluation.
    """

    step: int = 0
    best_weights: dict[str, Tensor] | None = None
    history: list[dict[str, float]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Values for Accelerate's checkpoints."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values from one of Accelerate's checkpoints."""
        vars(self).update(state)


class TrainedTensors:
    """Tensors of a module that change in training.

    They are its parameters that require gradients and the persistent buffers of what is trained: batch norm's
    running statistics above all, without which the weights alone are another model. A buffer counts as
    trained where the module that owns it has a trained parameter of its own or, if it has no parameters at
    all, where the module that holds it has one. Frozen layers, and constants such as class prototypes, are
    left out: they are read again from their source.

    Attributes:
        parameters: The trained parameters by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._owners = dict(_owners_of_trained_buffers(module))

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers by name; not cached, because a module gets new ones on another device."""
        return {name: owner.get_buffer(name.rpartition(".")[2]) for name, owner in self._owners.items()}

    def copy(self) -> dict[str, Tensor]:
        """Copy all tensors to the CPU."""
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self._all.items()}

    def set(self, values: dict[str, Tensor], source: str = "the kept weights") -> None:
        """Restore the values of :meth:`copy`.

        Args:
            values: By name.
            source: Where they come from, for the error.
        """
        with torch.no_grad():
            for name, tensor in self._all.items():
                if name not in values or values[name].shape != tensor.shape:
                    raise DataError(
                        f"{source} does not fit the model at {name!r}; it was written by another version of "
                        "xbt, so start from scratch with --overwrite true"
                    )
                tensor.copy_(values[name])

    def agree(self) -> None:
        """Copy the buffers of the main process to all others, because statistics of their shares differ."""
        for buffer in self.buffers.values():
            broadcast(buffer, from_process=0)

    @property
    def _all(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}


def _owners_of_trained_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    holders = {id(child): parent for parent in module.modules() for child in parent.children()}
    for prefix, owner in module.named_modules():
        own = list(owner.parameters(recurse=False))
        holder = holders.get(id(owner))
        if holder is not None and next(owner.parameters(), None) is None:
            own = list(holder.parameters())
        if not any(parameter.requires_grad for parameter in own):
            continue
        for name, _ in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, owner
