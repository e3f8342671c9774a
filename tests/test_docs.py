"""The READMEs and docs give the same commands in both languages, which parse, and the figures that commands wrote."""

import json
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser

import train_llava
from examples.openmoji import compare_modes as openmoji_modes
from examples.openmoji.wordings import WORDINGS
from examples.smollm2 import compare_modes as smollm2_modes
from train_llava.build_model import BuildArguments
from train_llava.check_data import CheckArguments
from train_llava.cli import given_arguments
from train_llava.evaluate import EvaluateArguments
from train_llava.explain import ExplainArguments
from train_llava.export_gguf import ExportArguments
from train_llava.infer import InferArguments
from train_llava.merge_lora import MergeArguments
from train_llava.model import LoraArguments
from train_llava.model_card import CardArguments
from train_llava.prepare_picture import PictureArguments
from train_llava.train import DataArguments, ModelArguments, TrainArguments
from train_llava.web_demo import WebDemoArguments

ROOT = Path(__file__).parent.parent
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
ENGLISH = ["README.md", *(name for name in DOCS if not name.endswith("_zh.md"))]
CHINESE = [name.replace(".md", "_zh.md") for name in ENGLISH]
PAGES = [*ENGLISH, *CHINESE, "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/openmoji/README.md"]
PAGES += ["examples/openmoji/README_zh.md", "examples/smollm2/README.md", "examples/smollm2/README_zh.md"]
RESULTS = ("answers.md", "data.md", "llamacpp.md", "memory.md", "packing.md", "run_time.md", "speed.md")
ARGUMENTS = {
    "build_model": (BuildArguments,),
    "check_data": (CheckArguments,),
    "evaluate": (EvaluateArguments,),
    "explain": (ExplainArguments,),
    "export_gguf": (ExportArguments,),
    "prepare_picture": (PictureArguments,),
    "infer": (InferArguments,),
    "merge_lora": (MergeArguments,),
    "model_card": (CardArguments,),
    "train": (ModelArguments, LoraArguments, DataArguments, TrainArguments),
    "web_demo": (WebDemoArguments,),
}


def commands(name: str) -> list[str]:
    """The shell commands of a README, each on one line, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition(" # ")[0].rstrip() for line in lines if line and not line.startswith("#")]


def test_every_page_is_there_in_both_languages():
    assert {*ENGLISH, *CHINESE} == {"README.md", "README_zh.md", *DOCS}


@pytest.mark.parametrize("name", ENGLISH)
def test_both_languages_give_the_same_commands(name):
    pages = []
    for page in (name, name.replace(".md", "_zh.md")):
        # a question may be in the page's language
        pages.append([re.sub(r'--prompt "[^"]*"', "--prompt", " ".join(words.split())) for words in commands(page)])
    assert pages[0] == pages[1]


@pytest.mark.parametrize("name", ENGLISH)
def test_both_languages_name_the_same_arguments_and_files(name):
    ours, theirs = ((ROOT / page).read_text(encoding="utf-8") for page in (name, name.replace(".md", "_zh.md")))
    for kind in (r"--\w+", r"`[\w/.-]+\.\w+`"):
        assert set(re.findall(kind, ours)) == set(re.findall(kind, theirs))


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_a_readme_is_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize(
    "command",
    [
        c
        for name in ENGLISH
        for c in commands(name)
        if re.match(r"(\w+=\S+ )*((python|accelerate launch) -m train_llava|bash run_z|sbatch)", c)
    ],
)
def test_a_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    if words[0] in ("bash", "sbatch"):
        script = next(i for i, word in enumerate(words) if word.endswith((".sh", ".sbatch")))
        module, arguments = "train", words[script + 1 :]
    else:
        place = words.index("-m") + 1
        module, arguments = words[place].split(".")[1], words[place + 1 :]
    if arguments:
        parse(module, arguments)


def parse(module: str, words: list[str]) -> tuple[Any, ...]:
    """As `parse_arguments`, which would also look for models and data."""
    given = given_arguments(ARGUMENTS[module], words)
    return HfArgumentParser(ARGUMENTS[module]).parse_dict(given)


def test_every_recipe_parses_and_the_batch_is_that_of_the_readme():
    batches = {}
    for file in (ROOT / "recipes").glob("*.yaml"):
        *_, args = parse("train", [str(file)])
        batches[file.stem] = args.per_device_train_batch_size * args.gradient_accumulation_steps, args.train_type
        if args.batches is not None:
            total = args.global_batch_size
            assert batches[file.stem][0] == total
            assert args.batches[0] == (total, False)  # all at once, without recomputation, is tried first
            assert all(total % gpus == 0 for gpus in (1, 2, 4, 8, 16))
        example = f"examples/{file.stem.partition('-')[0]}/run.sh"
        where = [example] if (ROOT / example).exists() else ENGLISH
        assert any(f" recipes/{file.name}" in (ROOT / name).read_text(encoding="utf-8") for name in where)
    assert batches == {
        "one-gpu-stage1": (256, "projector"),
        "one-gpu-stage2": (128, "lora"),
        "finetune-llava-1.5-7b": (16, "lora"),
        "eight-gpus-stage1": (256, "projector"),
        "eight-gpus-stage2": (128, "freeze_vision"),
        "two-nodes-stage2": (128, "freeze_vision"),
        "openmoji-stage1": (32 // 2, "projector"),
        "openmoji-stage2": (32 // 2, "freeze_vision"),
        "smollm2": (4 // 2, "lora"),
    }


def anchors(page: Path) -> set[str]:
    """The names by which GitHub lets one link to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        target, _, heading = link.partition("#")
        assert (page.parent / target).exists() or not target, link
        assert not heading or heading in anchors(page.parent / target if target else page), link


@pytest.mark.parametrize("name", CHINESE)
def test_a_chinese_reader_is_told_what_is_in_english(name):
    """Links to pages with no Chinese beside them; the one on top leads to the same page in English."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("[English](", "")
    links = re.findall(r"\]\((?!http)([^)#\s]+\.md)(?:#[^)]*)?\)(.{0,4})", text)
    assert not [link for link, behind in links if not link.endswith("_zh.md") and not behind.startswith("（英文")]


@pytest.mark.parametrize("name", [*CHINESE, "examples/openmoji/README_zh.md", "examples/smollm2/README_zh.md"])
def test_a_chinese_sentence_stands_on_one_line(name):
    """A line break inside a sentence is shown as a gap."""
    text = re.sub(r"^```.*?^```", "```", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    other = r"\s*([-*#|!`<>]|\d+\. |$)"  # headings, tables, lists, pictures, code, empty lines
    for line, following in pairwise(text.splitlines()):
        ends = line.rstrip()[-1:] in "。！？*" or re.match(other, line)
        assert ends or re.match(r"\s*([-#|!<>]|```|\d+\. |$)", following), f"{line}\n{following}"


def rows(text: str) -> list[list[str]]:
    """The numbers of each table row behind its first cell, where it has any."""
    found = [re.findall(r"\d[\d.,]*", line.split("|", 2)[2]) for line in text.splitlines() if line.startswith("| ")]
    return [row for row in found if row]


@pytest.mark.parametrize("names", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_figures_come_from_files(names):
    page = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    for example, run in (("openmoji", "docs/run.txt"), ("smollm2", "examples/smollm2/run.txt")):
        assert (ROOT / run).read_text() in (ROOT / f"examples/{example}/README.md").read_text()
    measured = {"openmoji/modes": openmoji_modes, "smollm2/modes": smollm2_modes}
    tables = [
        script.table(json.loads((ROOT / f"examples/{name}.json").read_text())) for name, script in measured.items()
    ]
    tables += [(ROOT / "benchmarks/results" / name).read_text() for name in RESULTS]
    tables.append((ROOT / "benchmarks/results/pairs.md").read_text().partition("| refused | why")[0])
    for written in tables:
        for row in rows(written):
            assert row in rows(page), row


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_first_sentence_is_true_of_the_run(name):
    run = (ROOT / "docs/run.txt").read_text()
    share = re.search(r"this model .* ([\d.]+)%", run)[1]
    minutes, seconds = re.search(r"done \((\d+):(\d+)\)", run).groups()
    wanted = {minutes, seconds, f"{float(share):.0f}", run.split("questions")[1].split()[2]}
    first = (ROOT / name).read_text(encoding="utf-8").split("**")[1]
    assert wanted <= set(re.findall(r"[\d,.]*\d", first))


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_scores_by_kind_are_those_of_the_run(name):
    """The table has a column for each kind, and rows for the model and its controls."""
    lines = (ROOT / "docs/run.txt").read_text().partition("by kind")[2].splitlines()
    wanted = {}
    for kind in WORDINGS:
        (scores,) = (re.findall(r"[\d.]+(?=%)", line) for line in lines if line.startswith(f"  {kind} "))
        wanted[kind] = [scores[0], *scores[3:]]  # without the interval
    page = (ROOT / name).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(page) if line.endswith("| more | describe |"))
    header, _, *table = ([cell.strip() for cell in line.strip("|").split("|")] for line in page[start : start + 6])
    for kind, scores in wanted.items():
        assert [row[header.index(kind)] for row in table] == scores


def test_one_version_everywhere_and_every_file_in_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = project["project"]["version"]
    assert train_llava.__version__ == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    settings = project["tool"]["setuptools"]
    assert settings["packages"]["find"]["include"] == ["train_llava*"]
    files = set()
    for folder in {path.parent for path in (ROOT / "train_llava").rglob("__init__.py")}:
        package = ".".join(folder.relative_to(ROOT).parts)
        for pattern in ["*.py", *settings["package-data"].get(package, [])]:
            files |= set(folder.glob(pattern))
    assert files == {path for path in (ROOT / "train_llava").rglob("*") if path.is_file() and path.suffix != ".pyc"}
