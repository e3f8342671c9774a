"""Rows of a budget of tokens: never more than that, each record once a pass, the losses of the same records padded."""

import json
import re
import shutil
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import NARROW, logged, run_train, run_zero2, turns
from test_data import gradients
from torch.nn.attention.varlen import varlen_attn
from torch.utils.data import BatchSampler
from transformers import AutoModel, MistralConfig

from train_llava.chat import Chat
from train_llava.data import CheckedDataset, LlavaCollator, LlavaDataset
from train_llava.dataset import lengths
from train_llava.dataset.lengths import count_tokens
from train_llava.dataset.packing import WINDOW, PackedDataset, pack
from train_llava.model import load_checkpoint
from train_llava.modeling import attention
from train_llava.modeling.verification import packing_difference, refuse_mixing
from train_llava.train import TrainArguments
from train_llava.trainer import LlavaTrainer

BUDGET, PICTURE = 240, 16  # tokens of a row; of a picture
PACKING = ["--packing", "true", "--tokens_per_batch", BUDGET, "--learning_rate", "1e-3", "--train_type", "projector"]


@pytest.fixture(scope="module")
def mixed(corpus, tmp_path_factory) -> Path:
    """Forty records: captions, several turns, text alone; a conversation of them is bad, and a picture of another."""
    root = tmp_path_factory.mktemp("mixed")
    shutil.copytree(corpus / "images_dl", root / "images")
    records = []
    for i in range(40):
        talk = ("What is this?", "a red square") * (1, 1, 4, 1, 5)[i % 5]
        record = {"id": f"record {i}", "conversations": turns(*talk)}
        if i % 4:
            record |= {"image": f"{i % 16}.png"}
            record["conversations"][0]["value"] = "<image>\n" + "What is this? " * (i % 3)
        records.append(record)
    records[9]["conversations"] = turns("<image>\nWhat is this?", "a <|im_end|>")
    records[13]["image"] = "missing.png"
    (root / "chat.json").write_text(json.dumps(records))
    return root


def checked(data: Path, processor, log: Path) -> CheckedDataset:
    return CheckedDataset(LlavaDataset(str(data)), Chat(processor, 512), log / "bad.jsonl", max_bad_fraction=0.1)


def by_hand(tokens: list[int], budget: int) -> list[list[int]]:
    """First-fit decreasing as one would do it on paper: each row's lengths."""
    rows: list[list[int]] = []
    for length in sorted(tokens, reverse=True):
        row = next((row for row in rows if sum(row) + length <= budget), None)
        if row is None:
            rows.append(row := [])
        row.append(length)
    return rows


def test_rows_are_those_of_first_fit_decreasing():
    tokens = np.random.default_rng(0).integers(1, 100, 300)
    rows = pack(tokens, np.ones(300, bool), 100)
    assert [tokens[row].tolist() for row in rows] == by_hand(tokens.tolist(), 100)
    assert sorted(np.concatenate(rows)) == list(range(300))


def test_every_record_is_in_one_row_and_no_row_above_the_budget():
    rng = np.random.default_rng(1)
    tokens, pictured = rng.integers(0, 400, 2 * WINDOW + 100), rng.random(2 * WINDOW + 100) < 0.8
    tokens[~pictured] = np.minimum(tokens[~pictured], 350)
    rows = pack(tokens, pictured, 400, blank=50, seed=3)
    assert sorted(np.concatenate(rows)) == np.flatnonzero(tokens).tolist()
    assert max(tokens[row].sum() + 50 * (not pictured[row].any()) for row in rows) == 400
    assert tokens.sum() / (400 * len(rows)) > 0.95
    again, other = (pack(tokens, pictured, 400, blank=50, seed=seed) for seed in (3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(rows, other, strict=False))


def test_a_row_without_a_picture_keeps_room_for_a_blank_one():
    tokens, pictured = np.array([6, 4, 3]), np.array([False, False, True])
    assert [row.tolist() for row in pack(tokens, pictured, 10, blank=3)] == [[0, 2], [1]]
    assert [row.tolist() for row in pack(tokens, pictured, 10)] == [[0, 1], [2]]


@pytest.mark.parametrize("many", [1, 1000])  # records from which on several processes count
def test_tokens_are_counted_once_as_they_are_trained_on(mixed, processor, tmp_path, monkeypatch, many):
    monkeypatch.setattr(lengths, "MANY", many)
    shutil.copy(mixed / "chat.json", tmp_path)
    dataset = LlavaDataset([str(tmp_path), str(mixed)], str(mixed / "images"), data_weights=[1, 0.5])
    chat = Chat(processor, max_length=100)
    counts = count_tokens(dataset, chat)
    texts = [dataset.read(i, decode=False) for i in range(60)]
    good = [i for i in range(60) if texts[i]["id"] != "record 9"]
    unlimited = Chat(processor)
    exact = [len(unlimited.encode(texts[i]["messages"])[0]) for i in good]
    assert max(exact) > 100  # a limit hides no length
    assert counts[good, 0].tolist() == exact
    assert counts[good, 1].tolist() == [PICTURE * (int(texts[i]["id"].split()[1]) % 4 > 0) for i in good]
    assert not counts[9].any()
    # they are stored: nothing is tokenised again, until another template or tokenizer asks
    monkeypatch.setattr(Chat, "tokenize", lambda *_: (np.zeros(7), None))
    assert np.array_equal(count_tokens(dataset, unlimited), counts)
    processor.tokenizer.chat_template += " "
    another = count_tokens(dataset, Chat(processor))
    processor.tokenizer.chat_template = processor.tokenizer.chat_template.removesuffix(" ")
    assert set(another[good, 0]) == {7, 7 + PICTURE - 1}


def test_a_source_without_records_has_no_tokens(mixed, processor, tmp_path):
    (tmp_path / "chat.json").write_text("[]")
    dataset = LlavaDataset([str(tmp_path), str(mixed)], str(mixed / "images"))
    assert len(count_tokens(dataset, Chat(processor))) == 40


def test_records_that_do_not_fit_in_a_row_are_logged(mixed, processor, tmp_path):
    packed = PackedDataset(checked(mixed, processor, tmp_path), BUDGET)
    assert sorted(chain(*packed.rows)) == [i for i in range(40) if i != 9]
    (bad,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert (bad["record"], bad["id"]) == (9, "record 9")


def trainer(llava: Path, mixed: Path, output: Path, seed: int = 0) -> LlavaTrainer:
    model, processor = load_checkpoint(str(llava))
    args = TrainArguments(output_dir=str(output), tokens_per_batch=BUDGET, seed=seed, report_to="none")
    dataset = PackedDataset(checked(mixed, processor, output), BUDGET, seed)
    collator = LlavaCollator(processor, packing=True)
    return LlavaTrainer(model, args, collator, dataset, learning_rates={}, write_card=print)


def passes(trainer: LlavaTrainer, number: int) -> list[list[list[str]]]:
    """The ids of each batch of some passes; each batch is looked at as the model gets it."""
    loader, found = trainer.get_train_dataloader(), []
    for epoch in range(number):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert all(len(batch["input_ids"]) == 1 for batch in batches)
        assert max(batch["input_ids"].shape[1] for batch in batches) <= BUDGET
        found.append([batch["extras"]["ids"] for batch in batches])
    return found


def test_every_pass_has_every_good_record_once_in_another_order(llava, mixed, tmp_path):
    first, second = passes(trainer(llava, mixed, tmp_path), 2)
    good = sorted(f"record {i}" for i in range(40) if i not in (9, 13))
    assert sorted(chain(*first)) == sorted(chain(*second)) == good
    assert first != second
    assert passes(trainer(llava, mixed, tmp_path), 2) == [first, second]
    assert passes(trainer(llava, mixed, tmp_path, seed=1), 1) != [first]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_have_as_many_rows_and_all_of_them(llava, mixed, tmp_path, ranks):
    loader = trainer(llava, mixed, tmp_path).get_train_dataloader()
    order, rows = BatchSampler([row for (row,) in loader.batch_sampler], 1, False), len(loader.dataset)
    shards = [[row for (row,) in BatchSamplerShard(order, ranks, rank)] for rank in range(ranks)]
    assert {len(shard) for shard in shards} == {-(-rows // ranks)}
    assert set(chain(*shards)) == set(range(rows))


def test_a_row_of_broken_pictures_alone_takes_in_one_other_record(mixed, processor, tmp_path):
    packed = PackedDataset(checked(mixed, processor, tmp_path), BUDGET)
    packed.rows[0] = np.array([13, 9])
    (item,) = packed[0]
    assert item.is_replacement
    assert item.id not in ("record 13", "record 9")
    assert len(item.input_ids) <= BUDGET


def test_a_record_above_the_budget_is_named(mixed, processor, tmp_path):
    texts = LlavaDataset(str(mixed), decode=False)
    chat = Chat(processor)
    longest = max((i for i in range(40) if i != 9), key=lambda i: len(chat.encode(texts[i]["messages"])[0]))
    length = len(chat.encode(texts[longest]["messages"])[0])
    with pytest.raises(ValueError, match=rf"--tokens_per_batch 100: record 'record {longest}' takes {length}"):
        PackedDataset(checked(mixed, processor, tmp_path), 100)


def test_a_step_has_the_loss_of_its_records_padded(llava, mixed, tmp_path, monkeypatch, capsys):
    seen, compute_loss = [], LlavaTrainer.compute_loss

    def remember(self, model, inputs, *args, **kwargs):
        seen.append(inputs["extras"]["ids"])
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LlavaTrainer, "compute_loss", remember)
    arguments = [
        *PACKING,
        "--gradient_accumulation_steps",
        "3",
        "--max_bad_fraction",
        "0.1",
        "--learning_rate",
        "1e-20",
    ]
    losses = run_train(monkeypatch, llava, mixed, tmp_path / "run", *arguments, "--num_train_epochs", "1")
    out = capsys.readouterr().out
    assert f"for a row of {BUDGET} tokens, 3 pictures in it" in out
    assert re.search(rf"preflight: the fullest row, 2[34]\d tokens of {len(seen[0])} records, forward and back", out)
    assert f"39 records in {len(seen) - 4} rows of up to {BUDGET} tokens" in out
    model, processor = load_checkpoint(str(llava))
    items = {f"record {i}": i for i in range(40)}
    dataset, rows = LlavaDataset(str(mixed)), seen[4:]  # behind those of the preflight
    steps = [list(chain(*rows[i : i + 3])) for i in range(0, len(rows), 3)]
    padded = [model(**LlavaCollator(processor)([dataset[items[id_]] for id_ in step])).loss.item() for step in steps]
    assert losses == pytest.approx(padded, abs=1e-5)
    assert f"{3 * BUDGET} tokens ({BUDGET} x 3 x 1 ranks)" in (tmp_path / "run" / "README.md").read_text()


def test_attention_is_computed_for_each_conversation(llava, mixed, monkeypatch):
    """To the loss and the gradients that one mask for the whole row gives."""
    model, processor = load_checkpoint(str(llava))
    dataset, seen = LlavaDataset(str(mixed)), []
    batch = LlavaCollator(processor, packing=True)([dataset[i] for i in (0, 1, 2, 4)])
    lengths, forward = batch["cu_seq_lens_q"].diff().tolist(), attention.sdpa_attention_forward

    def remember(module, query, *args, **kwargs):
        seen.append(query.shape[2])
        return forward(module, query, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", remember)
    loss, grads = gradients(model, **batch)
    assert [length for length in seen if length in lengths] == lengths * 2  # in each of two layers
    whole_loss, whole_grads = gradients(model, **batch | {"cu_seq_lens_q": None})
    assert batch["input_ids"].shape[1] in seen
    assert abs(loss - whole_loss) <= 1e-6 * whole_loss
    for name, grad in whole_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-10, name


@pytest.fixture
def varlen_kernel():
    """The CUDA kernel behind `varlen_attn`, as a function that computes one conversation after the other."""
    calls = []

    def kernel(q, k, v, starts, _, longest, *args, scale=None, window_size_left=None, **kwargs):
        calls.append((starts.tolist(), longest, window_size_left))
        outputs = []
        for start, stop in pairwise(starts.tolist()):
            parts = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
            mask = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            if window_size_left >= 0:
                mask = mask.triu(-window_size_left)
            output = torch.nn.functional.scaled_dot_product_attention(*parts, mask, scale=scale, enable_gqa=True)
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs), q.new_zeros(q.shape[1], len(q)), torch.zeros(2), torch.zeros(1), torch.zeros(1)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", kernel, "CPU")
    yield calls
    library._destroy()


@pytest.mark.parametrize("window", [None, 4])
def test_a_gpu_computes_a_packed_row_in_one_call_a_layer(llava, mixed, varlen_kernel, window):
    """To the logits of the masked row, with grouped heads and with a window."""
    model, processor = load_checkpoint(str(llava))
    vocabulary = model.config.text_config.vocab_size
    text = MistralConfig(
        **NARROW, num_hidden_layers=2, num_key_value_heads=1, vocab_size=vocabulary, sliding_window=window
    )
    model.model.language_model = AutoModel.from_config(text)
    model.eval()
    dataset = LlavaDataset(str(mixed))
    batch = LlavaCollator(processor, packing=True)([dataset[i] for i in (0, 1, 2, 4)])
    inputs = {name: batch[name] for name in batch if name not in ("labels", "shift_labels", "logits_to_keep")}
    with torch.no_grad():
        masked = model(**inputs | {"cu_seq_lens_q": None}).logits
        with attention.in_one_call(model.model.language_model):
            in_one_call = model(**inputs).logits
    starts = batch["cu_seq_lens_q"].tolist()
    assert varlen_kernel == [(starts, max(np.diff(starts)), -1 if window is None else window - 1)] * 2
    assert (in_one_call - masked).abs().max() <= 1e-5 * masked.abs().max()
    assert model.model.language_model.config._attn_implementation == "sdpa"
    difference, equal = packing_difference(model, Chat(processor), model.model.language_model)
    assert equal
    assert difference <= 1e-5


def test_a_row_may_end_in_padding_of_its_own(llava, mixed, varlen_kernel):
    """On a GPU, T is a multiple of 64. No conversation sees the rest: the loss and all gradients stay."""
    model, processor = load_checkpoint(str(llava))
    dataset = LlavaDataset(str(mixed))
    items = [dataset[i] for i in (0, 1, 2, 4)]
    plain = LlavaCollator(processor, packing=True)(items)
    padded = LlavaCollator(processor, packing=True, multiple=64)(items)
    length = plain["input_ids"].shape[1]
    assert padded["input_ids"].shape[1] == -(-length // 64) * 64 > length
    assert padded["cu_seq_lens_q"].tolist() == [*plain["cu_seq_lens_q"].tolist(), padded["input_ids"].shape[1]]
    assert padded["shift_labels"].equal(plain["shift_labels"])
    (loss, grads), (plain_loss, plain_grads) = gradients(model, **padded), gradients(model, **plain)
    assert abs(loss - plain_loss) <= 1e-6 * plain_loss
    for name, grad in plain_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-10, name
    with torch.no_grad(), attention.in_one_call(model.model.language_model):
        assert abs(model(**padded).loss - plain_loss) <= 1e-6 * plain_loss
    assert varlen_kernel[0][0] == padded["cu_seq_lens_q"].tolist()


def test_a_kernel_that_mixes_conversations_is_found(llava, varlen_kernel, monkeypatch):
    model, processor = load_checkpoint(str(llava))

    def whole_row(query, key, value, starts, *rest, **options):
        return varlen_attn(query, key, value, starts[[0, -1]], *rest, **options)

    monkeypatch.setattr(attention, "varlen_attn", whole_row)
    measured = packing_difference(model, Chat(processor), model.model.language_model)
    with pytest.raises(ValueError, match="--packing: a qwen2 mixes the conversations of a row"):
        refuse_mixing(model, measured)


def test_a_run_resumes_among_the_rows(llava, mixed, tmp_path, monkeypatch):
    arguments = [
        *PACKING,
        "--max_steps",
        "40",
        "--save_steps",
        "15",
        "--max_bad_fraction",
        "0.1",
        "--preflight",
        "false",
    ]
    whole = run_train(monkeypatch, llava, mixed, tmp_path / "run", *arguments)
    shutil.rmtree(tmp_path / "run" / "checkpoint-40")
    again = run_train(monkeypatch, llava, mixed, tmp_path / "run", *arguments, "--resume_from_checkpoint", "true")
    assert len(whole) == 40
    assert again == whole


@pytest.mark.slow
def test_two_ranks_resume_among_the_rows_of_a_later_pass(llava, mixed, tmp_path):
    arguments = [*PACKING, "--max_steps", "20", "--save_steps", "15", "--max_bad_fraction", "0.1"]
    losses = []
    for more in ([], ["--resume_from_checkpoint", "true"]):
        done = run_zero2(llava, mixed, tmp_path / "run", *arguments, *more)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(logged(tmp_path / "run"))
        shutil.rmtree(tmp_path / "run" / "checkpoint-20")
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_two_ranks_train_as_one_with_accumulation(llava, mixed, tmp_path, monkeypatch):
    arguments = [*PACKING, "--max_steps", "5", "--max_bad_fraction", "0.1"]
    one = run_train(monkeypatch, llava, mixed, tmp_path / "one", *arguments, "--gradient_accumulation_steps", "2")
    done = run_zero2(llava, mixed, tmp_path / "two", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(tmp_path / "two") == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--tokens_per_batch fills the rows of --packing true: set it, too"),
        (["--packing", "--streaming", "--max_steps", "1"], "--tokens_per_batch counts all records beforehand"),
        (
            ["--packing", "--train_sampling_strategy", "group_by_length"],
            "not with --train_sampling_strategy group_by_l",
        ),
    ],
)
def test_options_that_exclude_each_other_are_refused(llava, mixed, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_train(monkeypatch, llava, mixed, tmp_path / "run", "--tokens_per_batch", "160", *arguments)
