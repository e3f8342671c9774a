"""Which arguments a resumed run may change, which have to stay, and whether the run is complete already."""

import hashlib
import json
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments

from train_llava.common.files import replacing
from train_llava.data import LlavaDataset
from train_llava.dataset.sources import find_records
from train_llava.modeling.weights import first_values
from train_llava.training.checkpointing import SETTINGS, requested_checkpoint
from train_llava.training.memory import zero_of
from train_llava.training.stopping import stopped_early

# A resume may change these. `LlavaTrainer` sets them after the optimizer's state; each change is printed and stored
RATES = {"learning_rate", "projector_learning_rate", "vision_learning_rate"}
SCHEDULE = {"lr_scheduler_type", "lr_scheduler_kwargs"}
LENGTH = {"max_steps", "num_train_epochs"}
HONOURED = RATES | SCHEDULE | LENGTH | {"warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
HONOURED |= {"max_grad_norm", "lora_dropout"}
# A resume may change what these names and patterns match silently: the order of records, the optimizer's state and the
# loss do not depend on them. All other arguments have to stay
LOGGING = """logging_* log_* disable_tqdm report_to run_name project trackio_* include_num_input_tokens_seen debug
    skip_memory_metrics"""
SAVING = "output_dir save_* enable_jit_checkpoint push_to_hub hub_*"
EVALUATION = """eval_[!f]* per_device_eval_batch_size prediction_loss_only include_for_metrics batch_eval_metrics
    *_full_eval load_best_model_at_end early_stopping_patience do_*"""  # not eval_fraction
COMPUTING = """attn_implementation activation_checkpointing* gradient_checkpointing* torch_* use_liger_kernel
    liger_kernel_config use_cache use_cpu local_rank preflight dataloader_num_workers dataloader_p*
    dataloader_multiprocessing_context ddp_* price_per_hour"""
DATA = "image_dir bad_samples max_bad_fraction"  # the records themselves are compared by their fingerprint
RESUMING = "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint"
FREE = " ".join([LOGGING, SAVING, EVALUATION, COMPUTING, DATA, RESUMING]).split()
BATCH = "per_device_train_batch_size"
SCORE = {"metric_for_best_model", "greater_is_better"}  # may be added and dropped, and not exchanged
STATEFUL = {"reduce_lr_on_plateau", "greedy"}  # schedules that compute the rate from the scores so far


def settings_of(*arguments: Any) -> dict[str, Any]:
    """The arguments of a run that a resume compares, by name, as JSON holds them.

    If a value is shown in one form and compared in another, it is a dict of `text` and `same`. `arguments` are the
    instances of the run's dataclasses; the last are its `TrainingArguments`.
    """
    args = arguments[-1]
    values = {field.name: getattr(part, field.name) for part in arguments for field in fields(part)}
    settings = {name: value for name, value in values.items() if not any(fnmatch(name, free) for free in FREE)}
    for name in ("model_name_or_path", "data_path", "global_batch_size", BATCH):
        del settings[name]
    # A step takes the same records, in however many batches
    batch, steps = args.per_device_train_batch_size, settings.pop("gradient_accumulation_steps")
    text = f"{batch} x {steps}" if args.batches is None else batch * steps
    settings[f"{BATCH} x --gradient_accumulation_steps"] = {"text": text, "same": batch * steps}
    # But the workers of a stream take turns by batches, and the last records of a pass are dropped by batches
    if args.dataloader_drop_last or (values["streaming"] and args.dataloader_num_workers > 1):
        settings[BATCH] = batch if args.batches is None else "auto"
    stage, offload = zero_of(args)
    settings["deepspeed"] = None if stage is None else f"ZeRO-{stage}" + " with offload" * offload
    if values["streaming"]:  # each worker reads shards of its own
        settings["dataloader_num_workers"] = args.dataloader_num_workers
    return json.loads(json.dumps(settings, default=str))


def compare_sources(
    checkpoint: str | None, args: TrainingArguments, model_name: str, model: nn.Module, *sources: Any
) -> dict[str, Any]:
    """Compares the data (see `data_fingerprint`) and the model that a run starts from, just opened; returns both."""
    numbers = hashlib.sha256(json.dumps(first_values(model)).encode()).hexdigest()[:12]
    settings = {"data_path": data_fingerprint(*sources)}
    settings["model_name_or_path"] = {"text": f"{model_name}, fingerprint {numbers}", "same": numbers}
    compare(checkpoint, settings, args)
    return settings


def data_fingerprint(dataset: LlavaDataset | None, data_path: list[str], image_dir: str | None) -> str:
    """The size of each source and a fingerprint of all, as a text.

    It covers the ids and texts of all records in order or, without `dataset`, the names and sizes of a stream's
    files.
    """
    counts, fingerprint = [], hashlib.blake2b(digest_size=8)
    if dataset is None:
        for path in data_path:
            files, _ = find_records(path, image_dir, streaming=True)
            counts.append(f"{len(files):,} files")
            for file in files:  # the path of one on the hub has its commit
                name = f"{file.name} {file.stat().st_size}" if isinstance(file, Path) else str(file)
                fingerprint.update(name.encode())
    # The tables' own memory, without a copy
    for table in () if dataset is None else dataset.tables:
        counts.append(f"{len(table):,} records")
        for name in ("id", "messages"):
            for chunk in table.data.column(name).chunks:
                for buffer in filter(None, chunk.buffers()):
                    fingerprint.update(buffer)
    return f"{' + '.join(counts)}, fingerprint {fingerprint.hexdigest()}"


def compare(checkpoint: str | None, settings: dict[str, Any], args: TrainingArguments) -> list[str]:
    """The changes of settings since a run began, those of earlier resumes first.

    A complete run has no step left, so only its length may change. A ValueError names both values of a setting that a
    resume cannot change.
    """
    if checkpoint is None or not (Path(checkpoint) / SETTINGS).exists():
        return []
    saved = json.loads((Path(checkpoint) / SETTINGS).read_text(encoding="utf-8"))
    # What may change: see the head of this file
    earlier, changes = saved["settings"], saved["changes"]
    schedules = {earlier.get("lr_scheduler_type"), settings.get("lr_scheduler_type")}
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    complete = is_run_complete(state, args)
    honoured = LENGTH if complete else HONOURED - (RATES | SCHEDULE if schedules & STATEFUL else set())
    # Each setting that differs
    for name, now in settings.items():
        before = earlier.get(name, now)
        (text, same), (text_before, same_before) = map(_text_and_same, (now, before))
        if same == same_before or (name in SCORE and None in (now, before)):
            continue
        if name not in honoured or (name in RATES and 0 in (now, before)):  # at 0, a part is frozen
            raise ValueError(
                f"--{name} {text}: {checkpoint} was trained with {text_before}, which a resume cannot change: "
                "give that, or begin anew in another --output_dir"
            )
        if not complete:
            changes = [*changes, f"{name} {text_before} → {text} from step {state.global_step}"]
    return changes


def _text_and_same(value: Any) -> tuple[Any, Any]:
    """A value of the settings as it is shown, and as it is compared."""
    return (value["text"], value["same"]) if isinstance(value, dict) and "same" in value else (value, value)


def write_settings(output_dir: str, settings: dict[str, Any], changes: list[str]) -> None:
    """Writes the settings that a resume compares to a run's folder; each checkpoint gets a copy."""
    with replacing(Path(output_dir) / SETTINGS) as file:
        text = json.dumps({"settings": settings, "changes": changes}, indent=1, ensure_ascii=False)
        file.write_text(text, encoding="utf-8")


def changes_of(output_dir: Path) -> list[str]:
    """The changes that resumes have made in a run, by its folder."""
    path = output_dir / SETTINGS
    return json.loads(path.read_text(encoding="utf-8"))["changes"] if path.exists() else []


def is_run_complete(state: TrainerState, args: TrainingArguments) -> bool:
    """Whether a run in this state has done all its steps, or was stopped early."""
    by_steps = args.max_steps > 0
    done = state.global_step >= args.max_steps if by_steps else state.epoch >= args.num_train_epochs - 1e-9
    return done or stopped_early(args, state)


def completed(args: TrainingArguments, settings: dict[str, Any]) -> str | None:
    """A line for the user if the run to resume is complete, and its model written; else None. Raises as `compare`."""
    folder, (resume, checkpoint) = Path(args.output_dir), requested_checkpoint(args)
    own = resume is True or (checkpoint and Path(checkpoint).absolute().parent.resolve() == folder.resolve())
    # A run writes this state last
    if not own or not (folder / "trainer_state.json").exists() or not any(folder.glob("*.safetensors")):
        return None
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    early, states = ", stopped early" if stopped_early(args, state) else "", [state]
    if checkpoint is not None and args.save_strategy in ("steps", "epoch") and not early:
        # The last step of a complete run has a checkpoint. If it was removed, the run resumes from the one before
        states.append(TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")))
    if not all(is_run_complete(state, args) for state in states):
        return None
    compare(args.output_dir, settings, args)
    more = "a higher --max_steps or --num_train_epochs trains on"
    return f"done: {state.global_step} of {state.max_steps} steps{early}; the model is in {folder}; {more}"
