"""A Hugging Face `Trainer` for LLaVA: learning rates by part, and nothing lost when a run ends early.

What differs from `Trainer`:

- the held-out loss is the mean over all supervised tokens, and an evaluation also answers held-out questions
- `group_by_length` reads stored lengths; `Trainer` would open every image first
- each part of the model has its own learning rate, and the log holds the throughput
- a whole model resumes by `from_pretrained`, since parameters have other names in files
- a resumed run takes rates, decay, schedule and intervals from its arguments, and does no step beyond its last
- an incomplete checkpoint is never resumed from, and never costs an older one
- SIGTERM ends the run at the next step, with a checkpoint
- a loss, a gradient or a weight that is not finite stops the run before any save
"""

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.modeling_utils import get_state_dict_dtype
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from train_llava.dataset.lengths import GroupedByLength, count_tokens, order_seed
from train_llava.evaluation.answers import score_answers
from train_llava.model import load_checkpoint, load_config
from train_llava.modeling.attention import in_one_call
from train_llava.modeling.weights import base_tensors, check_base, read_back, save_base_fingerprint, save_weights
from train_llava.training.checkpointing import RECIPE, SETTINGS, marked_incomplete, number_of, rotate_checkpoints
from train_llava.training.extras import loss_sums, with_extras
from train_llava.training.memory import precision
from train_llava.training.optimizer import check_finite, restore_settings, split_by_part
from train_llava.training.resume import is_run_complete
from train_llava.training.stopping import StopOnSignal, outlive_sigterm
from train_llava.training.throughput import Throughput, print_log
from train_llava.training.waits import check_losses, keep_positions, wait_once_for_norm

ProgressCallback.on_log = PrinterCallback.on_log = print_log


class LlavaTrainer(Trainer):
    """See the head of this file.

    Args:
        eval_answers: the number of questions that an evaluation asks.
        packed_model: the language model, if it computes packed rows in one call; see `in_one_call`.
    """

    def __init__(
        self,
        *args: Any,
        learning_rates: dict[str, float],
        write_card: Callable[[TrainerState], None],
        eval_answers: int = 0,
        packed_model: nn.Module | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.data_collator = partial(with_extras, collator=self.data_collator)
        self.learning_rates, self.write_card, self.eval_answers = learning_rates, write_card, eval_answers
        self.packed_model = packed_model
        self.losses: list[tuple[list[str], torch.Tensor]] = []  # of the step's batches, with their records
        # Trainer would remove older checkpoints too early; `_save_checkpoint` removes them
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.throughput = Throughput(self.args.device, precision(self.args), self.args.world_size)
        # The outcome is saved in the precision of the model that the run began with, or in --save_dtype
        name = self.model.config.name_or_path
        self.base = base_tensors(name)
        dtype = load_config(name).dtype or get_state_dict_dtype(self.base)
        self.dtype = dtype if self.args.save_dtype == "auto" else getattr(torch, self.args.save_dtype)
        self.add_callback(StopOnSignal())

    # Data

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = count_tokens(self.train_dataset.records, self.train_dataset.chat)[:, 0]
        return GroupedByLength(batch, lengths, order_seed(self.args), epoch=lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        return SequentialSampler(eval_dataset)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        # --dataloader_drop_last is for training: every held-out record counts
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        self.args.dataloader_drop_last = drop_last
        loader.base_dataloader.worker_init_fn = partial(outlive_sigterm, begin=loader.worker_init_fn)
        return loader

    def get_batch_samples(self, *args: Any) -> Any:
        with self.throughput.waiting():
            return super().get_batch_samples(*args)

    # Learning rates and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        split_by_part(optimizer, model or self.model, self.learning_rates)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.group_settings = [group | {"params": None} for group in (optimizer or self.optimizer).param_groups]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        restore_settings(self.optimizer, self.lr_scheduler, self.group_settings)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """Takes intervals and the best checkpoint's folder from the arguments, not from the checkpoint."""
        outcome = super()._init_training_state(max_steps, *args)
        self.state.max_steps = max(max_steps, self.state.global_step)
        self.state.compute_steps(self.args, max_steps)
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return outcome

    # Steps and evaluation

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with in_one_call(self.packed_model):
            return super().training_step(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if is_run_complete(self.state, self.args):  # the final model alone is missing
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        extras = inputs.pop("extras")
        self.throughput.add(extras["tokens"], extras["images"])
        del inputs["logits_to_keep"]
        with keep_positions(self.model, extras["positions"]):
            outcome = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss = outcome[0] if isinstance(outcome, tuple) else outcome
            self.losses.append((extras["ids"], loss.detach().to("cpu", non_blocking=True)))
        return outcome

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = None if norm is None else float(norm)  # waits for the GPU, unless DeepSpeed has done so
        check_losses(self.losses, self.state.global_step + 1)
        # DeepSpeed may give -1 for NaN. In fp16, a step that overflows is left out
        if norm is not None and not self.args.fp16 and not 0 <= norm < math.inf:
            reason = f"step {self.state.global_step + 1}: the gradients are not finite (norm {norm})"
            raise ValueError(f"{reason}; checkpoints before it are whole, and a lower --learning_rate may help")
        return norm

    def log(self, logs: dict[str, float], *args: Any) -> None:
        super().log(logs | self.throughput.read() if "loss" in logs else logs, *args)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[None, None, None]:
        """Adds each sample's loss and number of supervised tokens to `loss_sums`; no record counts twice."""
        inputs = self._prepare_inputs(inputs)
        sums = loss_sums(model, inputs)
        self.loss_sums += self.accelerator.gather_for_metrics(sums).cpu().double().sum(0)
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self.loss_sums = torch.zeros(2, dtype=torch.float64)  # of losses and of tokens
        with self.throughput.pausing():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            scores = score_answers(self, self.eval_answers) if self.eval_answers else {}
        scores["loss"] = (self.loss_sums[0] / self.loss_sums[1]).item()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    # Loading and saving

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, PeftModel):
            check_base(resume_from_checkpoint, self.model, self.model.config.name_or_path)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved, _ = load_checkpoint(resume_from_checkpoint, torch.float32)  # whatever its configuration says
            self.model.load_state_dict(saved.state_dict())

    def _prepare_for_training(self, max_steps: int, loader: DataLoader, checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, loader, checkpoint)
        if self.is_deepspeed_enabled:
            wait_once_for_norm(self.deepspeed.optimizer)
        if checkpoint is not None:
            check_finite(self.model, f"{checkpoint} is nothing to go on from; take an earlier one")
        return prepared

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        check_finite(self.model, f"step {self.state.global_step}")
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and isinstance(self.model, PeftModel):  # before a push takes the folder
            save_base_fingerprint(self.model, folder)
        try:
            super().save_model(output_dir, _internal_call)
        except Exception:  # a full disk raises any type; no part of a model is left behind
            if self.args.should_save:
                for file in folder.glob("*.safetensors"):
                    file.unlink()
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes a model and reads it back: a checkpoint in the precision of memory, the outcome in `dtype`."""
        if not self.args.should_save:
            return
        folder, output = Path(output_dir or self.args.output_dir), Path(self.args.output_dir)
        is_checkpoint = folder.parent == output and number_of(folder) is not None
        outcome_in = "base" if self.args.save_dtype == "auto" else "dtype"
        write_in = "memory" if is_checkpoint else outcome_in
        tensors = save_weights(self.model, folder, state_dict, self.base, self.dtype, write_in)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        read_back(folder, tensors)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        if self.is_world_process_zero():
            self.write_card(self.state)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with marked_incomplete(folder, self.accelerator), self.throughput.pausing():
            super()._save_checkpoint(model, trial)
            for name in (RECIPE, SETTINGS):
                if self.args.should_save and (folder.parent / name).exists():
                    shutil.copy(folder.parent / name, folder)
        if self.args.should_save:  # only now may an older one go
            rotate_checkpoints(folder.parent, self.limit, self.state.best_model_checkpoint)
