"""A Hugging Face `Trainer` for LLaVA: learning rates by module, and nothing lost when a run ends as it should not.

What differs from `Trainer`:

- the held-out loss is that of all answer tokens alike, whatever the batch size and the number of ranks
- the log tells the pace, too
- an evaluation also answers held-out questions, and logs the answers' scores
- conversations are grouped by their lengths as stored, where `Trainer` would open every picture first
- the vision tower and the projector may have learning rates of their own
- a whole model is loaded from a checkpoint by `from_pretrained`: its parameters have other names in files than
  in memory, and `Trainer`, which looks for the latter, would find none and resume from the model as it is
- a resumed run takes rates, decay, schedule and intervals from its arguments, and does no step beyond its last
- a checkpoint that was being written when the run died is never resumed from, and never costs an older one
- SIGTERM ends the run at the next step, with a checkpoint
- a loss that is not finite stops the run, and says at which records; so do gradients and weights, before any save
- the model card, which `Trainer` writes before it pushes to the hub, is this repo's own
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
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerState
from transformers.modeling_utils import get_state_dict_dtype
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from train_llava.chat import IGNORE
from train_llava.data import LlavaCollator, Sample
from train_llava.dataset.lengths import GroupedByLength, count_tokens, order_seed
from train_llava.evaluation.answers import score_answers
from train_llava.model import load_checkpoint, load_config, part_of
from train_llava.modeling.weights import base_tensors, check_base, read_back, save_base_fingerprint, save_weights
from train_llava.training.checkpointing import RECIPE, number_of, rotate_checkpoints, unfinished
from train_llava.training.memory import precision
from train_llava.training.resume import SETTINGS, is_run_complete
from train_llava.training.stopping import StopOnSignal, outlive_sigterm
from train_llava.training.throughput import Throughput


def with_extras(samples: list[Sample], collator: LlavaCollator) -> dict[str, Any]:
    """The collator's batch, and under `extras` what the trainer alone needs of its samples:

    their `ids`; how many `supervised` tokens each has, `(samples,)`; `is_replacement`, `(samples,)`; and
    the batch's number of `tokens` and `images`.
    """
    extras = {
        "ids": [sample.id for sample in samples],
        "supervised": torch.tensor([int((sample.labels[1:] != IGNORE).sum()) for sample in samples]),
        "is_replacement": torch.tensor([sample.is_replacement for sample in samples]),
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "images": sum(len(sample.images) for sample in samples),
    }
    return collator(samples) | {"extras": extras}


def check_finite(model: nn.Module, where: str) -> None:
    """Makes sure that what trains is finite.

    Raises:
        ValueError: a tensor is not; the message begins with `where` and names it.
    """
    for name, parameter in model.named_parameters():
        # where ZeRO-3 has shared a parameter out, a rank holds a piece of it
        if parameter.requires_grad and not getattr(parameter, "ds_tensor", parameter).isfinite().all():
            raise ValueError(f"{where}: {name} is not finite")


class LlavaTrainer(Trainer):
    """See the head of this file. `learning_rates`: one for each part of the model, as `part_of` names it.

    `write_card` writes the model card, given the run's state. `eval_answers`: how many questions an evaluation asks.
    """

    def __init__(
        self,
        *args: Any,
        learning_rates: dict[str, float],
        write_card: Callable[[TrainerState], None],
        eval_answers: int = 0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.data_collator = partial(with_extras, collator=self.data_collator)
        self.learning_rates, self.write_card, self.eval_answers = learning_rates, write_card, eval_answers
        # Trainer would remove older checkpoints too early, and of a run that was stopped its last one
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.throughput = Throughput(self.args.device, precision(self.args), self.args.world_size)
        name = self.model.config.name_or_path
        self.base = base_tensors(name)
        # what the saved model is opened in
        dtype = load_config(name).dtype or get_state_dict_dtype(self.base)
        self.dtype = dtype if self.args.save_dtype == "auto" else getattr(torch, self.args.save_dtype)
        self.add_callback(StopOnSignal())

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = count_tokens(self.train_dataset.records, self.train_dataset.chat)[:, 0]
        return GroupedByLength(batch, lengths, order_seed(self.args), epoch=lambda: int(self.state.epoch or 0))

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training  # held-out records count to the last
        loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        self.args.dataloader_drop_last = drop_last
        loader.base_dataloader.worker_init_fn = partial(outlive_sigterm, begin=loader.worker_init_fn)
        return loader

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        return SequentialSampler(eval_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments, its two groups (with weight decay, and without) split by part of a model."""
        optimizer = super().create_optimizer(model)
        names = {parameter: name for name, parameter in (model or self.model).named_parameters()}
        groups = []  # what is logged as the learning rate is the first one's
        for part in reversed(self.learning_rates):
            for group in optimizer.param_groups:
                parameters = [parameter for parameter in group["params"] if part_of(names[parameter]) == part]
                if parameters:
                    groups.append(group | {"params": parameters, "lr": self.learning_rates[part]})
        optimizer.param_groups[:] = groups
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        groups = (optimizer or self.optimizer).param_groups
        self.given = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads their states, and puts the arguments' rates, decay and schedule in force in place of theirs."""
        super()._load_optimizer_and_scheduler(checkpoint)
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        for group, given in zip(groups, self.given, strict=True):
            group |= {name: given[name] for name in ("weight_decay", "betas", "eps") if name in given}
        if isinstance(scheduler, LambdaLR):  # all but those whose rate comes of the scores so far
            scheduler.base_lrs = [given["initial_lr"] for given in self.given]
            for group, rate, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                group |= {"initial_lr": rate, "lr": rate * factor(scheduler.last_epoch)}
            scheduler._last_lr = [group["lr"] for group in groups]

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """Takes the intervals of logging, saving and evaluating, and the folder of the best checkpoint, from the
        arguments, where a checkpoint holds those of the start before."""
        outcome = super()._init_training_state(max_steps, *args)
        self.state.max_steps = max(max_steps, self.state.global_step)
        self.state.compute_steps(self.args, max_steps)
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return outcome

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if is_run_complete(self.state, self.args):  # a resumed run of which the final model alone is missing
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        extras = inputs.pop("extras")
        self.throughput.add(extras["tokens"], extras["images"])
        outcome = super().compute_loss(model, inputs, *args, **kwargs)
        loss = outcome[0] if isinstance(outcome, tuple) else outcome
        if model.training and not torch.isfinite(loss):
            step = self.state.global_step + 1
            raise ValueError(
                f"step {step}: the loss is {loss.item()} at the records {', '.join(map(repr, extras['ids']))}"
            )
        return outcome

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradients' norm; DeepSpeed may give -1 for NaN. In fp16 a step that overflows is left out."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16 and not 0 <= norm < math.inf:
            what = f"step {self.state.global_step + 1}: the gradients are not finite (norm {float(norm)})"
            raise ValueError(f"{what}; checkpoints before it are whole, and a lower --learning_rate may help")
        return norm

    def get_batch_samples(self, *args: Any) -> Any:
        with self.throughput.waiting():
            return super().get_batch_samples(*args)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        super().log(logs | self.throughput.read() if "loss" in logs else logs, *args)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[None, None, None]:
        """Adds the losses of the records of a batch, and their tokens, to `held_out`; no record counts twice."""
        inputs = self._prepare_inputs(inputs)
        extras, labels = inputs.pop("extras"), inputs.pop("shift_labels")
        del inputs["labels"]  # no loss is needed but those below
        counts = extras["supervised"]
        with torch.no_grad():
            losses = cross_entropy(model(**inputs).logits.float(), labels, reduction="none")
        sums = torch.stack([part.sum() for part in losses.split(counts.tolist())])
        sums_and_counts = torch.stack([sums, counts], dim=1) * ~extras["is_replacement"][:, None]
        self.held_out += self.accelerator.gather_for_metrics(sums_and_counts).cpu().double().sum(0)
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self.held_out = torch.zeros(2, dtype=torch.float64)
        with self.throughput.pausing():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            scores = score_answers(self, self.eval_answers) if self.eval_answers else {}
        scores["loss"] = (self.held_out[0] / self.held_out[1]).item()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, PeftModel):
            check_base(resume_from_checkpoint, self.model, self.model.config.name_or_path)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved, _ = load_checkpoint(resume_from_checkpoint, torch.float32)  # whatever its configuration says
            self.model.load_state_dict(saved.state_dict())

    def _prepare_for_training(self, max_steps: int, loader: DataLoader, checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, loader, checkpoint)
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
        except Exception:  # of a full disk any; what is written in part is not left behind
            for written in folder.glob("*.safetensors") if self.args.should_save else []:
                written.unlink()
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes a model, which is read back. Checkpoints, from which a run goes on, hold what trains as memory does;
        the outcome has the precision of the model that it began with, or that of --save_dtype."""
        if not self.args.should_save:
            return
        folder, output = Path(output_dir or self.args.output_dir), Path(self.args.output_dir)
        if folder.parent == output and number_of(folder) is not None:
            write_in = "held"
        else:
            write_in = "base" if self.args.save_dtype == "auto" else "dtype"
        tensors = save_weights(self.model, folder, state_dict, self.base, self.dtype, write_in)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        read_back(folder, tensors)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        if self.is_world_process_zero():
            self.write_card(self.state)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with unfinished(folder, self.accelerator), self.throughput.pausing():
            super()._save_checkpoint(model, trial)
            for name in (RECIPE, SETTINGS):
                if self.args.should_save and (folder.parent / name).exists():
                    shutil.copy(folder.parent / name, folder)
        if self.args.should_save:  # only now may an older one go
            rotate_checkpoints(folder.parent, self.limit, self.state.best_model_checkpoint)
