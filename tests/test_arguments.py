"""Each argument of each command has its effect, seen where this package calls a library or writes a file.

A case runs a command as people do, with options and without. Each field that it covers looks at what libraries were
given and what was written. It must find the value of the option, and must not find it where the option is not given.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import random_adapter, turns
from gguf import GGUFReader
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from test_pixel_shuffle import save_siglip
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationMixin,
)
from transformers.integrations import TensorBoardCallback

from train_llava import (
    build_model,
    check_data,
    evaluate,
    explain,
    export_gguf,
    infer,
    merge_lora,
    model_card,
    prepare_picture,
    train,
    trainer,
    web_demo,
)
from train_llava.dataset import replay
from train_llava.dataset.lengths import GroupedByLength
from train_llava.dataset.readers import BadRecordError
from train_llava.model import LoraArguments, load_processor

MODEL = "--model_name_or_path {llava}"


@pytest.fixture(scope="module")
def names(llava, parts, corpus, tmp_path_factory) -> dict[str, Path]:
    """The names in the braces of a case's words."""
    root = tmp_path_factory.mktemp("arguments")
    records = [{"id": str(i), "image": f"{i}.png", "conversations": turns("<image>\nWhat?", "red")} for i in range(8)]
    (root / "data").mkdir()
    (root / "data" / "chat.json").write_text(json.dumps(records))
    broken = [*records[:7], records[7] | {"image": "99.png"}]
    (root / "broken.json").write_text(json.dumps(broken))
    Image.new("RGB", (100, 40), "red").save(root / "wide.png")  # the model sees 30 to 70
    cut = {
        "image": "wide.png",
        "objects": [{"box": [0, 0, 40, 40]}],
        "conversations": turns("<image>\nWhere?", "<box>"),
    }
    (root / "boxes.json").write_text(json.dumps([cut, {"image": "wide.png", "caption": "red"}]))
    questions = [{"id": i, "prompt": f"Which {i}?"} for i in range(3)]
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (root / "text.txt").write_text("What is this? a red square")
    (root / "examples").mkdir()
    Image.new("RGB", (40, 40), "red").save(root / "examples" / "red.png")
    projector = {f"linear_{i}.{kind}": None for i in (1, 2) for kind in ("weight", "bias")}
    weights = load_file(llava / "model.safetensors")
    for name in projector:
        (place,) = [key for key in weights if key.endswith(name)]
        projector[name] = torch.full_like(weights[place], 0.5)
    torch.save(projector, root / "projector.bin")
    for folder in ("card", "metrics"):
        (root / folder).mkdir()
    (root / "card" / "README.md").write_text("---\ntags: [llava]\n---\n\n# card\n")
    scores = {"n": 8, "exact_match": 0.1234, "intervals": {"exact_match": [0.1, 0.2]}}
    (root / "metrics" / "metrics.json").write_text(json.dumps(scores))
    prediction = {"id": "0", "prompt": "?", "reference": "red", "prediction": "red"}
    (root / "metrics" / "predictions.jsonl").write_text(json.dumps(prediction))
    adapter = random_adapter(llava, root / "adapter", 1)
    save_siglip(root / "siglip")
    images = shutil.copytree(corpus / "images_dl", root / "pictures")
    return {"llava": llava, "adapter": adapter, "corpus": corpus, "images": images, "root": root, **parts}


@pytest.fixture
def run(names, tmp_path, monkeypatch, capsys) -> Callable[[Any, str], SimpleNamespace]:
    """Runs a command and returns what it gave to libraries and wrote to files."""

    def run(command: Any, words: str) -> SimpleNamespace:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()
        seen = SimpleNamespace(
            out=out, loaded={}, generated=[], opened=[], asked=[], typed=0, trusted=False, processes=0, **names
        )
        patch_edges(monkeypatch, seen)
        monkeypatch.setattr(sys, "argv", ["command", *words.format(out=out, **names).split(" ")])
        try:
            command.main()
        except (SystemExit, HandedError) as ended:
            seen.ended = ended
        seen.printed = capsys.readouterr().out
        return seen

    return run


class HandedError(Exception):
    """Ends a command once the test has seen enough."""


def patch_edges(monkeypatch, seen: SimpleNamespace) -> None:
    """Records the arguments of library calls; a training ends where it would begin."""
    load, adapt = AutoModelForImageTextToText.from_pretrained, PeftModel.from_pretrained
    generate, open_picture, open_tokenizer = GenerationMixin.generate, Image.open, AutoTokenizer.from_pretrained

    def loading(name, **given):
        seen.loaded |= given | {str(name): True}
        return load(name, **given)

    def adapting(model, name, **given):
        seen.loaded[str(name)] = True
        return adapt(model, name, **given)

    def generating(model, **given):
        tokenizer = AutoTokenizer.from_pretrained(seen.llava)
        seen.asked += tokenizer.batch_decode(given["input_ids"])
        seen.generated.append(given)
        return generate(model, **given)

    def opening(source, *given, **named):
        seen.opened.append(str(source))
        return open_picture(source, *given, **named)

    def training(self, **given):
        seen.trainer, seen.resumed = self, given
        raise HandedError

    def opening_tokenizer(name, **given):
        seen.trusted |= bool(given.get("trust_remote_code"))
        return open_tokenizer(name, **given)

    def loading_data(*args, num_workers, **options):
        seen.processes += num_workers
        if num_workers:
            raise HandedError
        return DataLoader(*args, **options)

    def replaying(model, chat, questions, *_):
        seen.replayed = [question["prompt"] for question in questions]
        return [{"prompt": prompt, "answer": "red", "cut": False} for prompt in seen.replayed], []

    def typing(_):
        seen.typed += 1
        raise EOFError

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", loading)
    monkeypatch.setattr(PeftModel, "from_pretrained", adapting)
    monkeypatch.setattr(GenerationMixin, "generate", generating)
    monkeypatch.setattr(Image, "open", opening)
    monkeypatch.setattr(trainer.LlavaTrainer, "train", training)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", opening_tokenizer)
    monkeypatch.setattr(check_data, "DataLoader", loading_data)
    monkeypatch.setattr("builtins.input", typing)
    monkeypatch.setattr(replay, "answer_questions", replaying)
    if web_demo.find_spec("gradio"):
        monkeypatch.setattr(
            web_demo.gr.Blocks, "launch", lambda page, **given: seen.__dict__.update(page=page, **given)
        )


def shown(seen: SimpleNamespace) -> bool:
    """Whether a picture was opened in the folder of that option."""
    return any("/pictures/" in path for path in seen.opened)


def rows(seen: SimpleNamespace) -> int:
    """The largest batch that was generated."""
    return max(len(given["input_ids"]) for given in seen.generated)


def bits(seen: SimpleNamespace) -> bool:
    return seen.loaded["quantization_config"].load_in_4bit


def metrics(seen: SimpleNamespace) -> dict[str, Any]:
    return json.loads((seen.out / "e" / "metrics.json").read_text())


def config(seen: SimpleNamespace) -> dict[str, Any]:
    return json.loads((seen.out / "m" / "config.json").read_text())


def report(seen: SimpleNamespace) -> dict[str, Any]:
    return json.loads((seen.out / "r.json").read_text())


def lora(seen: SimpleNamespace) -> Any:
    """A layer that LoRA has changed."""
    return seen.trainer.model.base_model.model.model.language_model.layers[0].self_attn.q_proj


def rates(seen: SimpleNamespace) -> set[float]:
    return {group["lr"] for group in seen.trainer.create_optimizer().param_groups}


def schedule(seen: SimpleNamespace) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    return seen.trainer.create_scheduler(100, optimizer).lr_lambdas[0]


def batch(seen: SimpleNamespace) -> dict[str, Any]:
    return next(iter(seen.trainer.get_train_dataloader()))


def callbacks(seen: SimpleNamespace, kind: type) -> list[Any]:
    return [callback for callback in seen.trainer.callback_handler.callbacks if isinstance(callback, kind)]


def refuses(seen: SimpleNamespace, kind: type[Exception] | None) -> bool:
    """Whether the bad record of the training data ends the run by that error, or by none."""
    try:
        for i in range(8):
            seen.trainer.train_dataset[i]
    except ValueError as error:
        return type(error) is kind
    return kind is None


def page_asks(seen: SimpleNamespace) -> int:
    """The most tokens that an answer on the page may have."""
    ask = next(one.fn for one in seen.page.fns.values() if one.api_name == "ask")
    list(ask([], {"text": "What?", "files": []}, 0))
    return seen.generated[-1]["max_new_tokens"]


def projector_of(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "model.safetensors").items()
    return next(tensor for name, tensor in tensors if name.endswith("multi_modal_projector.linear_1.weight"))


def sampler(seen: SimpleNamespace) -> Any:
    return seen.trainer._get_train_sampler()


def positions(seen: SimpleNamespace) -> torch.Tensor:
    """The position embeddings of the tower, `(T, W)`."""
    (tensor,) = [t for n, t in load_file(seen.llava / "model.safetensors").items() if "position_embedding" in n]
    return tensor.float()


def first_position(seen: SimpleNamespace) -> torch.Tensor:
    """The first of them that was exported."""
    tensors = GGUFReader(seen.out / "g" / "mmproj-f16.gguf").tensors
    return torch.tensor(next(tensor for tensor in tensors if "position_embd" in tensor.name).data[0]).float()


class Case(NamedTuple):
    """A command with the words that it always needs, those under test, and what each field of them must do."""

    command: Any
    needed: str
    words: str
    effects: dict[type, dict[str, Callable[[SimpleNamespace], Any]]]


FOLDED = "--vision_model_name_or_path {root}/siglip --language_model_name_or_path {qwen2}"
PARTS = "--vision_model_name_or_path {clip} --language_model_name_or_path {qwen2}"
TRAIN = f"{MODEL} --data_path {{corpus}} --output_dir {{out}}/t --max_steps 2 --preflight false"
CUT = f"{MODEL} --data_path {{root}}/boxes.json --image_dir {{root}} --output_dir {{out}}/e"
CUT_CHECK = f"{CUT.partition(' --output')[0]} --num_proc 1 --report {{out}}/r.json"
BROKEN = f"{MODEL} --data_path {{root}}/broken.json --image_dir {{images}} --output_dir {{out}}/t --preflight false"
CASES = {
    "infer, a prompt": Case(
        infer,
        f"{MODEL} --prompt Hello",
        f"{MODEL} --prompt Paris? --image {{images}}/1.png --adapter_name_or_path {{adapter}} --max_new_tokens 3 "
        "--temperature 0.5 --top_p 0.25 --choices yes,no",
        {
            infer.InferArguments: {
                "choices": lambda s: "%  yes" in s.printed and "%  no" in s.printed,
                "model_name_or_path": lambda s: s.loaded[str(s.llava)],
                "prompt": lambda s: "Paris?" in s.asked[0],
                "image": lambda s: s.opened[-1].endswith("1.png") and "pixel_values" in s.generated[0],
                "adapter_name_or_path": lambda s: s.loaded[str(s.adapter)],
                "max_new_tokens": lambda s: s.generated[0]["max_new_tokens"] == 3,
                "temperature": lambda s: s.generated[0]["temperature"] == 0.5 and s.generated[0]["do_sample"],
                "top_p": lambda s: s.generated[0]["top_p"] == 0.25,
            }
        },
    ),
    "infer, a file": Case(
        infer,
        f"{MODEL} --prompt Hello",
        f"{MODEL} --questions {{root}}/questions.jsonl --answers {{out}}/a.jsonl --batch_size 2 --bits 4 "
        "--max_new_tokens 3 --temperature 0.5 --top_p 0.25",
        {
            infer.InferArguments: {
                "questions": lambda s: "Which 2?" in "".join(s.asked),
                "answers": lambda s: len((s.out / "a.jsonl").read_text().splitlines()) == 3,
                "batch_size": lambda s: rows(s) == 2,
                "bits": bits,
                "max_new_tokens": lambda s: all(given["max_new_tokens"] == 3 for given in s.generated),
                "temperature": lambda s: all(given["temperature"] == 0.5 for given in s.generated),
                "top_p": lambda s: all(given["top_p"] == 0.25 for given in s.generated),
            }
        },
    ),
    "explain": Case(
        explain,
        f"{MODEL} --image {{images}}/0.png --prompt Why? --answer blue --output_dir {{out}}/e",
        f"{MODEL} --image {{images}}/1.png --prompt What? --answer red --output_dir {{out}}/e --data_path {{corpus}} "
        "--adapter_name_or_path {adapter} --bits 4",
        {
            explain.ExplainArguments: {
                "model_name_or_path": lambda s: s.loaded[str(s.llava)],
                "image": lambda s: s.opened[0].endswith("1.png"),
                "prompt": lambda s: metrics(s)["prompt"] == "What?",
                "answer": lambda s: metrics(s)["answer"] == "red",
                "output_dir": lambda s: (s.out / "e" / "explanation.png").exists(),
                "data_path": lambda s: "other pictures" in metrics(s)["log_probability"],
                "adapter_name_or_path": lambda s: s.loaded[str(s.adapter)] and "base_log_probability" in metrics(s),
                "bits": bits,
            }
        },
    ),
    "infer, a chat": Case(
        infer,
        f"{MODEL} --prompt Hello",
        f"{MODEL} --interactive true",
        {infer.InferArguments: {"interactive": lambda s: s.typed == 1}},
    ),
    "evaluate": Case(
        evaluate,
        f"{MODEL} --data_path {{corpus}} --output_dir {{out}}/e",
        f"{MODEL} --data_path {{root}}/data --image_dir {{images}} --output_dir {{out}}/e --batch_size 3 "
        "--adapter_name_or_path {adapter} --max_new_tokens 3 --blank_control true --other_control true "
        "--text_path {root}/text.txt --base {qwen2} --choices red,blue",
        {
            evaluate.EvaluateArguments: {
                "choices": lambda s: metrics(s)["choices"]["n"] == 8,
                "model_name_or_path": lambda s: s.loaded[str(s.llava)],
                "data_path": lambda s: metrics(s)["n"] == 8,
                "image_dir": shown,
                "output_dir": lambda s: (s.out / "e" / "captions.png").exists(),
                "batch_size": lambda s: rows(s) == 3,
                "adapter_name_or_path": lambda s: s.loaded[str(s.adapter)],
                "max_new_tokens": lambda s: all(given["max_new_tokens"] == 3 for given in s.generated),
                "blank_control": lambda s: sum(len(given["input_ids"]) for given in s.generated) == 24,
                "other_control": lambda s: "other_pictures" in metrics(s)["controls"],
                "text_path": lambda s: metrics(s)["text"]["tokens"] > 5,
                "base": lambda s: abs(metrics(s)["text"]["base_loss"] - metrics(s)["text"]["loss"]) > 1e-4,
            }
        },
    ),
    "evaluate in four bits": Case(
        evaluate,
        f"{MODEL} --data_path {{corpus}} --output_dir {{out}}/e --max_new_tokens 1",
        f"{MODEL} --data_path {{corpus}} --output_dir {{out}}/e --max_new_tokens 1 --bits 4",
        {evaluate.EvaluateArguments: {"bits": bits}},
    ),
    "compare": Case(
        evaluate,
        "",
        "--compare {root}/metrics --output_dir {out}/e",
        {evaluate.EvaluateArguments: {"compare": lambda s: "metrics" in (s.out / "e/comparison.md").read_text()}},
    ),
    "model_card": Case(
        model_card,
        "",
        "--model_name_or_path {root}/card --evaluation_dir {root}/metrics",
        {
            model_card.CardArguments: {
                "model_name_or_path": lambda s: "written to" in s.printed,
                "evaluation_dir": lambda s: "12.3%" in (s.root / "card" / "README.md").read_text(),
            }
        },
    ),
    "web_demo": Case(
        web_demo,
        MODEL,
        f"{MODEL} --adapter_name_or_path {{adapter}} --host 127.0.0.2 --port 7899 --max_new_tokens 3 "
        "--examples {root}/examples --bits 4",
        {
            web_demo.WebDemoArguments: {
                "model_name_or_path": lambda s: s.loaded[str(s.llava)],
                "adapter_name_or_path": lambda s: s.loaded[str(s.adapter)],
                "host": lambda s: s.server_name == "127.0.0.2",
                "port": lambda s: s.server_port == 7899,
                "max_new_tokens": lambda s: page_asks(s) == 3,
                "examples": lambda s: s.allowed_paths == [str(s.root / "examples" / "red.png")],
                "bits": bits,
            }
        },
    ),
    "merge_lora": Case(
        merge_lora,
        "",
        f"{MODEL} --adapter_name_or_path {{adapter}} --output_dir {{out}}/m --dtype float16",
        {
            merge_lora.MergeArguments: {
                "model_name_or_path": lambda s: s.loaded[str(s.llava)],
                "adapter_name_or_path": lambda s: s.loaded[str(s.adapter)],
                "output_dir": lambda s: config(s)["model_type"] == "llava",
                "dtype": lambda s: config(s)["dtype"] == "float16",
            }
        },
    ),
    "build_model": Case(
        build_model,
        f"{PARTS} --output_dir {{out}}/m",
        f"{PARTS} --output_dir {{out}}/m --dtype float16 --vision_feature_layer -3 --image_aspect_ratio pad "
        "--vision_feature_select_strategy full --projector {root}/projector.bin --skip_checks true",
        {
            build_model.BuildArguments: {
                "vision_model_name_or_path": lambda s: config(s)["vision_config"]["image_size"] == 28,
                "language_model_name_or_path": lambda s: config(s)["text_config"]["model_type"] == "qwen2",
                "output_dir": lambda s: config(s)["model_type"] == "llava",
                "dtype": lambda s: config(s)["dtype"] == "float16",
                "vision_feature_layer": lambda s: config(s)["vision_feature_layer"] == -3,
                "vision_feature_select_strategy": lambda s: config(s)["vision_feature_select_strategy"] == "full",
                "image_aspect_ratio": lambda s: load_processor(str(s.out / "m"))[1].image_processor.do_pad,
                "projector": lambda s: (projector_of(s.out / "m") == 0.5).all(),
                "skip_checks": lambda s: "verified" not in s.printed and "written to" in s.printed,
            }
        },
    ),
    "build_model, checks": Case(
        build_model,
        f"{PARTS} --output_dir {{out}}/m",
        f"{PARTS} --output_dir {{out}}/m --verbose true",
        {build_model.BuildArguments: {"verbose": lambda s: "equal to the part's own" in s.printed}},
    ),
    "build_model, folded": Case(
        build_model,
        f"{FOLDED} --output_dir {{out}}/m --skip_checks true",
        f"{FOLDED} --output_dir {{out}}/m --skip_checks true --pixel_shuffle 2",
        {build_model.BuildArguments: {"pixel_shuffle": lambda s: config(s)["scale_factor"] == 2}},
    ),
    "build_model, tiles": Case(
        build_model,
        f"{PARTS} --output_dir {{out}}/m --skip_checks true --image_aspect_ratio anyres",
        f"{PARTS} --output_dir {{out}}/m --skip_checks true --image_aspect_ratio anyres --image_grid_pinpoints 1x3 "
        "--trust_remote_code true",
        {
            build_model.BuildArguments: {
                "image_grid_pinpoints": lambda s: config(s)["image_grid_pinpoints"] == [[28, 84]],
                "trust_remote_code": lambda s: s.trusted,
            }
        },
    ),
    "check_data": Case(
        check_data,
        "--data_path {root}/broken.json --report {out}/r.json",
        f"{MODEL} --data_path {{root}}/broken.json {{root}}/data --image_dir {{images}} --report {{out}}/r.json "
        "--num_proc 1 --max_length 30 --eval_fraction 0.5",
        {
            check_data.CheckArguments: {
                "data_path": lambda s: report(s)["records"] == 16,
                "image_dir": shown,
                "model_name_or_path": lambda s: report(s)["bad"] == 16,
                "max_length": lambda s: report(s)["bad"] == 16 and "--max_length" in s.printed,
                "report": lambda s: report(s)["records"],
                "num_proc": lambda s: s.processes == 0,
                "eval_fraction": lambda s: "--eval_fraction 0.5 keeps" in s.printed,
            }
        },
    ),
    "check_data, records alone": Case(
        check_data,
        "--data_path {root}/broken.json --image_dir {images} --num_proc 1 --report {out}/r.json",
        "--data_path {root}/broken.json --image_dir {images} --num_proc 1 --report {out}/r.json "
        "--decode_pictures false",
        {check_data.CheckArguments: {"decode_pictures": lambda s: report(s)["bad"] == 0}},
    ),
    "check_data, held-out data": Case(
        check_data,
        "--data_path {root}/broken.json --image_dir {images} --num_proc 1 --report {out}/r.json",
        "--data_path {root}/broken.json --image_dir {images} --num_proc 1 --report {out}/r.json "
        "--eval_data_path {root}/broken.json --eval_image_dir {images} --global_batch_size 2 --num_train_epochs 5",
        {
            check_data.CheckArguments: {
                "eval_data_path": lambda s: "in_eval_data" in report(s)["findings"],
                "eval_image_dir": lambda s: report(s)["findings"].get("in_eval_data", {}).get("count") == 7,
                "global_batch_size": lambda s: "of 2 records" in s.printed,
                "num_train_epochs": lambda s: "in 5 epochs" in s.printed,
            }
        },
    ),
    "check_data, boxes": Case(
        check_data,
        CUT_CHECK,
        f"{CUT_CHECK} --keep_cut_boxes true",
        {check_data.CheckArguments: {"keep_cut_boxes": lambda s: report(s)["bad"] == 0}},
    ),
    "evaluate, boxes": Case(
        evaluate,
        CUT,
        f"{CUT} --keep_cut_boxes true",
        {evaluate.EvaluateArguments: {"keep_cut_boxes": lambda s: metrics(s)["iou_50"] == 0}},
    ),
    "train, boxes": Case(
        train,
        f"{CUT} --max_bad_fraction 1",
        f"{CUT} --keep_cut_boxes true",
        {train.DataArguments: {"keep_cut_boxes": lambda s: s.trainer.train_dataset[0].messages[1]["places"]}},
    ),
    "export_gguf": Case(
        export_gguf,
        f"{MODEL} --output_dir {{out}}/g",
        f"{MODEL} --output_dir {{out}}/g --class_token first",
        {
            export_gguf.ExportArguments: {
                "model_name_or_path": lambda s: s.loaded[str(s.llava)],
                "output_dir": lambda s: (s.out / "g" / "Modelfile").exists(),
                "class_token": lambda s: torch.equal(first_position(s), positions(s)[0]),
            }
        },
    ),
    "prepare_picture": Case(
        prepare_picture,
        "",
        f"{MODEL} --image {{images}}/1.png {{images}}/2.png --output_dir {{out}}/p",
        {
            prepare_picture.PictureArguments: {
                "model_name_or_path": lambda s: Image.open(s.out / "p" / "1.png").size == (28, 28),
                "image": lambda s: len(list((s.out / "p").iterdir())) == 2,
                "output_dir": lambda s: (s.out / "p").is_dir(),
            }
        },
    ),
    "train, lora": Case(
        train,
        TRAIN,
        f"{MODEL} --data_path {{root}}/broken.json {{root}}/data --data_weights 1 2 --image_dir {{images}} "
        "--output_dir {out}/t --max_steps 2 --max_length 100 --max_bad_fraction 0.5 --attn_implementation eager "
        "--price_per_hour 2.5 "
        "--lora_r 3 --lora_alpha 6 --lora_dropout 0.25 --use_dora true --use_rslora true --learning_rate 1e-3 "
        "--projector_learning_rate 3e-3 --warmup_steps 5 --lr_scheduler_type linear --logging_steps 7 "
        "--report_to none --bf16 true --bits 4 --seed 5 --data_seed 7 --train_sampling_strategy group_by_length",
        {
            train.ModelArguments: {
                "model_name_or_path": lambda s: s.loaded[str(s.llava)],
                "attn_implementation": lambda s: s.loaded["attn_implementation"] == "eager",
                "bits": bits,
            },
            train.DataArguments: {
                "data_path": lambda s: len(s.trainer.train_dataset) == 24,
                "data_weights": lambda s: len(s.trainer.train_dataset) == 24,
                "image_dir": lambda s: s.trainer.train_dataset[0] and shown(s),
                "max_length": lambda s: s.trainer.train_dataset.chat.max_length == 100,
            },
            LoraArguments: {
                "lora_r": lambda s: lora(s).r["default"] == 3,
                "lora_alpha": lambda s: lora(s).scaling["default"] == pytest.approx(6 / 3**0.5),
                "lora_dropout": lambda s: lora(s).lora_dropout["default"].p == 0.25,
                "use_dora": lambda s: lora(s).use_dora["default"],
                "use_rslora": lambda s: lora(s).scaling["default"] == pytest.approx(6 / 3**0.5),
            },
            train.TrainArguments: {
                "learning_rate": lambda s: 1e-3 in rates(s),
                "projector_learning_rate": lambda s: rates(s) == {1e-3, 3e-3},
                "warmup_steps": lambda s: schedule(s).keywords["num_warmup_steps"] == 5,
                "lr_scheduler_type": lambda s: "linear" in schedule(s).func.__name__,
                "logging_steps": lambda s: s.trainer.args.logging_steps == 7,
                "report_to": lambda s: not callbacks(s, TensorBoardCallback),
                "bf16": lambda s: s.loaded["dtype"] == torch.bfloat16,
                "preflight": lambda s: "saved, read back" in s.printed,
                "price_per_hour": lambda s: " at --price_per_hour 2.5" in s.printed,
                "data_seed": lambda s: sampler(s).seed == 7,
                "train_sampling_strategy": lambda s: isinstance(sampler(s), GroupedByLength),
            },
        },
    ),
    "train, full": Case(
        train,
        TRAIN,
        f"{TRAIN} --train_type full --vision_learning_rate 2e-3 --eval_data_path {{root}}/data --eval_answers 3 "
        "--eval_image_dir {images} --packing true --tokens_per_batch 120 --early_stopping_patience 4 "
        "--eval_strategy steps --save_strategy steps --load_best_model_at_end true --save_dtype float16 "
        "--dataloader_num_workers 2",
        {
            train.DataArguments: {
                "eval_data_path": lambda s: len(s.trainer.eval_dataset) == 8,
                "eval_image_dir": lambda s: s.trainer.eval_dataset[0] and shown(s),
                "eval_answers": lambda s: s.trainer.eval_answers == 3,
                "packing": lambda s: "position_ids" in batch(s) and "attention_mask" not in batch(s),
            },
            train.TrainArguments: {
                "train_type": lambda s: not isinstance(s.trainer.model, PeftModel),
                "save_dtype": lambda s: s.trainer.dtype == torch.float16,
                "dataloader_num_workers": lambda s: s.trainer.args.dataloader_num_workers == 2,
                "vision_learning_rate": lambda s: 2e-3 in rates(s),
                "tokens_per_batch": lambda s: (
                    len(batch(s)["input_ids"]) == 1 and batch(s)["input_ids"].shape[1] <= 120
                ),
                "early_stopping_patience": lambda s: s.trainer.args.early_stopping_patience == 4,
            },
        },
    ),
    "train, an adapter": Case(
        train,
        TRAIN,
        f"{TRAIN} --adapter_name_or_path {{adapter}} --per_device_train_batch_size auto --global_batch_size 6 "
        "--eval_fraction 0.5",
        {
            train.DataArguments: {"eval_fraction": lambda s: len(s.trainer.eval_dataset) == 8},
            train.ModelArguments: {
                "adapter_name_or_path": lambda s: s.loaded[str(s.adapter)] and lora(s).r["default"] == 4
            },
            train.TrainArguments: {
                "per_device_train_batch_size": lambda s: "6 x 1 accumulation steps" in s.printed,
                "global_batch_size": lambda s: s.trainer.args.per_device_train_batch_size == 6,
            },
        },
    ),
    "train, with replay": Case(
        train,
        TRAIN,
        f"{TRAIN} --replay 0.5 --replay_questions {{root}}/questions.jsonl",
        {
            train.DataArguments: {
                "replay": lambda s: len(s.trainer.train_dataset) == 32,
                "replay_questions": lambda s: s.replayed == ["Which 0?", "Which 1?", "Which 2?"],
            },
        },
    ),
    "train, a stream": Case(
        train,
        TRAIN,
        f"{TRAIN} --streaming true --gradient_accumulation_steps 3",
        {
            train.DataArguments: {"streaming": lambda s: not hasattr(s.trainer.train_dataset, "__len__")},
            train.TrainArguments: {
                "gradient_accumulation_steps": lambda s: s.trainer.args.gradient_accumulation_steps == 3
            },
        },
    ),
    "train, leniently": Case(
        train,
        BROKEN,
        f"{BROKEN} --max_bad_fraction 0.5",
        {train.DataArguments: {"max_bad_fraction": lambda s: refuses(s, None)}},
    ),
    "train, strictly": Case(
        train,
        f"{BROKEN} --max_bad_fraction 0.5",
        f"{BROKEN} --max_bad_fraction 0.5 --bad_samples error",
        {train.DataArguments: {"bad_samples": lambda s: refuses(s, BadRecordError)}},
    ),
}
FIXED = {"remove_unused_columns", "prediction_loss_only", "logging_nan_inf_filter"}  # which stay as they are


@pytest.mark.parametrize("name", CASES)
def test_each_argument_has_its_effect(run, name):
    case = CASES[name]
    looks = [(field, look) for effects in case.effects.values() for field, look in effects.items()]
    seen = run(case.command, case.words)
    assert [field for field, look in looks if not look(seen)] == []
    if case.needed:
        without = run(case.command, case.needed)
        options = {word for word in case.words.split() if word.startswith("--")} - set(case.needed.split())
        assert [field for field, look in looks if f"--{field}" in options and found(look, without)] == []


def found(look: Callable[[SimpleNamespace], Any], seen: SimpleNamespace) -> bool:
    try:
        return bool(look(seen))
    except (AttributeError, LookupError, OSError, TypeError):
        return False


COMMANDS = [path.stem for path in Path(train.__file__).parent.glob("*.py") if "Arguments" in path.read_text()]
DATACLASSES = {
    value
    for name in COMMANDS
    for value in vars(import_module(f"train_llava.{name}")).values()
    if is_dataclass(value)
    and isinstance(value, type)
    and value.__module__.startswith("train_llava")
    and value.__name__.endswith("Arguments")
}


@pytest.mark.parametrize("dataclass", sorted(DATACLASSES, key=lambda one: one.__name__))
def test_every_argument_is_covered(dataclass):
    """This includes the arguments that a command adds to `TrainingArguments`, or gives another default."""
    own = {field.name for field in fields(dataclass)} & set(dataclass.__annotations__)
    looked_at = {field for case in CASES.values() for field in case.effects.get(dataclass, {})}
    assert own - looked_at <= FIXED
