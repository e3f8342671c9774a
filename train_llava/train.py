"""Trains a LLaVA checkpoint on pictures and conversations, with a plain Hugging Face `Trainer`.

    python -m train_llava.train --train_type lora \
        --model_name_or_path output/llava --data_path data --output_dir output/run

runs in one process. `bash run_zero2.sh` takes the same arguments and trains with DeepSpeed ZeRO-2 on every GPU.
All of `TrainingArguments` is accepted. A recipe, a YAML file of arguments, may come first.
"""

from functools import partial
from pathlib import Path

import torch
from datasets import IterableDataset
from transformers import IntervalStrategy, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

from train_llava.chat import Chat, chat_of
from train_llava.cli import given_arguments, parse_arguments, run_command
from train_llava.common.files import writing
from train_llava.data import CheckedDataset, LlavaCollator, LlavaDataset
from train_llava.dataset.apart import divided, keep_apart
from train_llava.dataset.lengths import order_seed
from train_llava.dataset.packing import PackedDataset
from train_llava.dataset.replay import add_replay
from train_llava.dataset.streaming import stream_items
from train_llava.model import LoraArguments, count_parameters, load_checkpoint, set_trainable
from train_llava.modeling.adapter import continue_adapter, continued
from train_llava.modeling.verification import padding_is_invisible, verify_for_training
from train_llava.modeling.weights import save_projector
from train_llava.trainer import LlavaTrainer
from train_llava.training import resume
from train_llava.training.arguments import check_argument_pairs, check_batches, check_training_options
from train_llava.training.batch_size import choose_batch, recompute_activations
from train_llava.training.cards import write_run_card
from train_llava.training.checkpointing import locked, on_first_rank, starting_point, write_recipe
from train_llava.training.liger import use_liger
from train_llava.training.memory import precision, print_estimate
from train_llava.training.optimizer import describe_trainable, use_float32
from train_llava.training.options import DataArguments, ModelArguments, TrainArguments
from train_llava.training.preflight import preflight
from train_llava.training.throughput import describe_throughput
from train_llava.training.waits import check_on_device


def load_data(
    data_arguments: DataArguments, args: TrainArguments, chat: Chat
) -> tuple[CheckedDataset | IterableDataset, CheckedDataset | None]:
    """The data to train on and the held-out data, if there is any. Bad records are replaced or left out."""
    folder, settings = Path(args.output_dir), (data_arguments.bad_samples, data_arguments.max_bad_fraction)
    sources = (data_arguments.data_path, data_arguments.image_dir, data_arguments.data_weights)
    held_out = eval_dataset = None
    if data_arguments.eval_data_path is not None:
        held_out = LlavaDataset(data_arguments.eval_data_path, data_arguments.eval_image_dir)
    records = None if data_arguments.streaming else LlavaDataset(*sources)
    if (fraction := data_arguments.eval_fraction) is not None:
        apart = on_first_rank(args, lambda: keep_apart(records, fraction, order_seed(args), folder))
        records, held_out = divided(records, apart)
    # Each data set logs its bad records in a file of its own
    log = folder / "bad_samples.jsonl"
    if held_out is not None:
        eval_dataset = CheckedDataset(held_out, chat, folder / "bad_eval_samples.jsonl", *settings)
    if records is None:
        return stream_items(*sources, chat, log, *settings, order_seed(args)), eval_dataset
    if args.process_index == 0:
        print(f"{len(records):,} records, {len(eval_dataset or ()):,} held out")
    return CheckedDataset(records, chat, log, *settings), eval_dataset


def main() -> None:
    # 1. The arguments
    dataclasses = (ModelArguments, LoraArguments, DataArguments, TrainArguments)
    model_arguments, parsed_lora, data_arguments, args = parse_arguments(*dataclasses)
    adapter = model_arguments.adapter_name_or_path
    check_argument_pairs(model_arguments, data_arguments, args)
    lora_arguments = parsed_lora if adapter is None else continued(adapter, given_arguments(dataclasses))
    if data_arguments.has_held_out and args.eval_strategy == "no":
        args.eval_strategy = IntervalStrategy.EPOCH  # `Trainer` reads it there
    with locked(args):
        run(model_arguments, lora_arguments, data_arguments, args)


def run(
    model_arguments: ModelArguments, lora_arguments: LoraArguments, data_arguments: DataArguments, args: TrainArguments
) -> None:
    """Runs training in a folder that is locked."""
    all_arguments = (model_arguments, lora_arguments, data_arguments, args)
    model_name, adapter = model_arguments.model_name_or_path, model_arguments.adapter_name_or_path
    streaming, packing = data_arguments.streaming, data_arguments.packing
    print_once = print if args.process_index == 0 else lambda _: None

    # 2. The checkpoint to start from, if there is one, and the changes that a resume may make
    settings = resume.settings_of(*all_arguments)
    completed = on_first_rank(args, lambda: resume.completed(args, settings))
    if completed is not None:
        print_once(completed)
        return
    print_once(f"train_type {args.train_type}, learning rate {args.learning_rate:g}, bf16 {args.bf16}")
    checkpoint = starting_point(args)
    changes = resume.compare(checkpoint, settings, args)
    for change in changes:
        print_once(change)

    # 3. The model
    if args.preflight and args.process_index == 0 and args.batches is None:
        print_estimate(model_name, lora_arguments, args, model_arguments.bits, packing, data_arguments.max_length)
    if args.deepspeed is not None:
        from train_llava.training.extension import prepare_deepspeed  # here, since DeepSpeed takes seconds

        prepare_deepspeed(args)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would build a plan for each new length
    model, processor = load_checkpoint(
        model_name, precision(args), model_arguments.attn_implementation, model_arguments.bits
    )
    check_training_options(args, model, data_arguments.eval_answers)
    verify_for_training(model, processor, packing)
    check_on_device(model)

    # 4. The data. On a GPU, few distinct lengths and no mask let attention run its fastest kernel
    on_gpu = args.device.type == "cuda"
    padding_mask = not on_gpu or is_deepspeed_zero3_enabled() or not padding_is_invisible(model, chat_of(processor))
    collator = LlavaCollator(processor, data_arguments.max_length, packing, padding_mask, 64 if on_gpu else 1)
    chat = chat_of(processor, data_arguments.max_length, data_arguments.keep_cut_boxes)
    dataset, eval_dataset = load_data(data_arguments, args, chat)
    if data_arguments.replay:
        add_replay(dataset.records, data_arguments.replay, data_arguments.replay_questions, model, chat, args)
    sources = (None if streaming else dataset.records, data_arguments.data_path, data_arguments.image_dir)
    settings |= on_first_rank(args, lambda: resume.compare_sources(checkpoint, args, model_name, model, *sources))
    if args.batches is not None:
        choose_batch(args, model, lora_arguments, model_arguments.bits, dataset, collator)

    # 5. What trains
    language_model = model.get_decoder()
    set_seed(args.seed)  # LoRA's random matrices are made now, before a Trainer sets the seed
    train_type, frozen_parts = args.train_type if adapter is None else "projector", args.frozen_parts
    model = set_trainable(model, train_type, lora_arguments, frozen_parts)
    if adapter is not None:
        model = continue_adapter(model, adapter, model_name, args.train_type, frozen_parts)
    model.config.text_config.use_cache = False  # the Trainer turns it off in `config` only
    if args.deepspeed is None:  # DeepSpeed keeps its own float32 copies
        use_float32(model, args.train_type)
    print_once(describe_trainable(model, args.learning_rates))
    recompute_activations(model, args)

    if args.torch_compile:
        # The layers alone, in one graph for all lengths: the Trainer would compile code that cannot be
        for layer in language_model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None

    # 6. The trainer, and a trial step
    train_dataset = dataset
    if args.tokens_per_batch is not None:
        train_dataset = PackedDataset(dataset, args.tokens_per_batch, args.seed)
    if not streaming:
        check_batches(len(train_dataset), args)
    trained_rates = {part: args.learning_rates[part] for part, (n, _) in count_parameters(model).items() if n}
    trainer = LlavaTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        learning_rates=args.learning_rates,
        write_card=partial(write_run_card, all_arguments, None if streaming else len(dataset), trained_rates),
        eval_answers=data_arguments.eval_answers,
        packed_model=language_model if packing and on_gpu and args.bf16 else None,
    )
    if args.preflight:
        trainer.throughput.count_flops(model.config, lora_arguments, args, language_model.is_activation_checkpointing)
    if args.use_liger_kernel:
        # In the language model alone: the Trainer would also replace the LLaVA's forward, which takes the labels
        use_liger(trainer, language_model)
        args.use_liger_kernel = False
    if args.preflight:
        preflight(trainer)

    # 7. Training, and its results
    write_recipe(*all_arguments)
    if resume.BATCH in settings:
        settings[resume.BATCH] = args.per_device_train_batch_size  # as `auto` chose
    on_first_rank(args, lambda: resume.write_settings(args.output_dir, settings, changes))
    trainer.train(resume_from_checkpoint=checkpoint)
    with writing(args.output_dir, "make room on its disk, and go on by --resume_from_checkpoint true"):
        trainer.save_model()
        if args.train_type == "projector" and args.process_index == 0:
            save_projector(Path(args.output_dir))
        trainer.save_state()  # the last file: it marks a run as complete
        trainer.create_model_card()
    print_once(describe_throughput(trainer.state.log_history))
    print_once(f"written to {args.output_dir}")
    trainer.accelerator.end_training()  # otherwise ranks may abort at exit


if __name__ == "__main__":
    run_command(main)
