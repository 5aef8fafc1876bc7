"""The documentation: its links and names exist, and its commands and code run, offline and on tiny models."""

import re
import time

import pytest

from tests.helpers import ROOT
from tests.helpers.markdown import (
    HISTORY,
    PAGES,
    PROGRAMS,
    SHELL,
    Block,
    anchors_of,
    blocks_of,
    canonical,
    header_blocks,
    program_of,
    prose_of,
    read,
    spans_of,
)
from tests.helpers.markdown_flaws import broken_links, flaw_of, flaw_of_option, missing_files

# Commands that contain one of these texts are not run. "perce NAME" also stands for `python -m perce.NAME`.
NOT_RUN = {
    "pip install": "needs a network; tests/test_distribution.py installs the package",
    ".ci/run": "it is make check and make test",
    "benchmarks.study --config": "takes hours; tests/benchmarks/test_study.py runs it small",
    "benchmarks.study_report": "writes docs/RESULTS.md; tests/benchmarks/test_study.py runs it in another directory",
    "vllm serve": "vLLM is not installed",
    "swift sft": "ms-swift is not installed",
    "recipes/several_gpus_fsdp2.yaml": "FSDP needs GPUs",
}
# What cannot be had here, in commands and in Python, and its substitute with the reason. Besides, directories with the
# names of Hub ids hold tiny models, as does $PERCE_CACHE in place of the default model; see tests/helpers/workplace.py.
SUBSTITUTES = {
    "make ": ("make -n ", "only what make would run: the tests, or a training of minutes"),
    "--nproc_per_node 8": ("--nproc_per_node 2", "there are two cores"),
    "[MODEL]": ("", "an optional argument"),
    'PerceSFTConfig("runs/trl"': ('PerceSFTConfig("runs/trl", use_cpu=True, bf16=False', "TRL's defaults need a GPU"),
}
HUB_ID = re.compile(r"\b(?:Qwen|HuggingFaceTB)/[\w.-]*\w")
# Blocks of Python that another test runs: their page, a part of their text ("": all blocks of the page), how many there
# are, and the test. If there is one more, see that the test runs it too.
OF_CARDS = "tests/perce/training/test_card.py"
RUN_ELSEWHERE = {
    ("README.md", "fused_perce_loss("): (1, "tests/test_examples.py::test_the_loop_in_readme_is_the_one_that_runs"),
    ("docs/EXTENDING.md", ""): (7, "tests/test_extending.py::test_every_example_is_run_here"),
    ("docs/SERVING.md", ""): (2, f"{OF_CARDS}::test_the_code_of_the_documentation_asks_as_in_training"),
}
# Code that runs before and after a block, in its language: what the block presupposes, and what it must have done.
# Other blocks run as they stand.
AROUND = {
    ("docs/COMMANDS.md", "--model runs/ce"): (
        "perce train --objective ce --model Qwen/Qwen3-0.6B --data my_rows.jsonl --output_dir runs/ce\n",
        "",
    ),
    ("README.md", "PerceSFTConfig("): (
        'rows = [{"persona": "I keep bees.", "prompt": "Coming tonight?", "completion": " No."}]\n'
        "from datasets import Dataset\nrows = Dataset.from_list(rows)\n",
        "",
    ),
    ("docs/TRAINERS.md", 'data_files="rows.jsonl"'): (
        "import json\n"
        'row = json.dumps({"persona": "I keep bees.", "prompt": "Tonight?", "completion": " No."})\n'
        'open("rows.jsonl", "w").write(f"{row}\\n" * 4)\n',
        "",
    ),
    ("docs/TRAINERS.md", "PerceMixin"): (
        "from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments\n"
        'model, tokenizer = (x.from_pretrained("Qwen/Qwen3-0.6B") for x in (AutoModelForCausalLM, AutoTokenizer))\n'
        'args = TrainingArguments("runs/own", report_to="none", max_steps=2)\n'
        'raw_rows = [{"persona": ["I keep bees."], "query": "Tonight?", "response": "No."}] * 8\n',
        "",
    ),
    ("docs/DATA.md", "mails.jsonl"): (
        "",
        'from perce import load_examples\nassert load_examples("rows.jsonl", "train").format == "lamp"\n',
    ),
    ("docs/DATA.md", "export.csv"): (
        "",
        "from perce import load_examples\n"
        'assert load_examples("rows.csv", "train").all[0].turns[0].content == "Café?"\n',
    ),
}
# Options in backticks that belong to other programs.
OTHERS_OPTIONS = {
    "chat-template": "vLLM",
    "is_binary_loss_scale": "ms-swift",
    "only": "benchmarks.gpu",
    "seconds": "benchmarks.gpu",
    "shutdown-timeout": "torchrun",
}
LANGUAGES = {"python", "json", "yaml", "toml", "text", "html", "mermaid", "diff", "indented", *SHELL}
# Files in backticks that need not exist, and why.
NOT_THERE = {
    "perce_kernels/exact.py": "the example of docs/EXTENDING.md",
    "perce/x/y.py": "any module",
    "tests/perce/x/test_y.py": "its test",
}

LIVING = [page for page in PAGES if page not in HISTORY]
HEADERS = sorted(
    str(path.relative_to(ROOT)) for folder in ("recipes", "examples") for path in (ROOT / folder).glob("*.*")
)


def shown(page: str) -> list[Block]:
    return blocks_of(page) if page.endswith(".md") else header_blocks(page)


def elsewhere(block: Block) -> bool:
    return any(page == block.page and part in block.text for page, part in RUN_ELSEWHERE)


def left_out(command: str) -> bool:
    return any(words in canonical(command) for words in NOT_RUN)


def to_run(page: str) -> list[Block]:
    return [
        block
        for block in shown(page)
        if (block.language == "python" and not elsewhere(block)) or not all(map(left_out, block.commands))
    ]


RUNNING = [page for page in (*LIVING, *HEADERS) if to_run(page)]

# ---- links and names


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    flaws = broken_links(page, prose_of(page))
    assert not flaws, "\n".join(flaws)


@pytest.mark.parametrize("page", LIVING)
def test_files_in_backticks_are_there(page):
    missing = [path for path in missing_files(prose_of(page)) if path not in NOT_THERE]
    assert not missing, "\n".join(missing)


def test_a_broken_link_or_name_is_found():
    text = "[a](docs/DATA.md#formats) [b](docs/DATA.md#no) ![c](docs/no.png) [d](no.md) [e](https:/x)"
    found = [flaw.partition(":")[0] for flaw in broken_links("README.md", text)]
    assert found == ["docs/DATA.md#no", "docs/no.png", "no.md", "https"]
    assert missing_files("`perce/no.py` `perce/*.py` `perce/data/rows.py`") == ["perce/no.py"]
    assert broken_links("README.md", '<img src="no.png"> <source srcset="a.png 1x, b.png 2x"> `[x](y)`')[2:] == [
        "b.png: no such file"
    ]


def test_a_heading_is_called_as_on_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# `a_b` & [C](d.md), e!\n\n    # code\n\n## a_b\n## A_b\n<a id='own'></a>\n", encoding="utf-8")
    assert anchors_of(page) == {"a_b--c-e", "a_b", "a_b-1", "own"}


# ---- commands and options


def substituted(text: str) -> str:
    for old, (new, _) in SUBSTITUTES.items():
        text = text.replace(old, new)
    return text.strip()


def in_prose(page: str) -> list[str]:
    """Commands in backticks, `perce.train --x` as `perce train --x`."""
    spans = [re.sub(r"^perce\.(\w+) --", r"perce \1 --", span) for span in spans_of(prose_of(page))]
    return [span for span in spans if program_of(span) in PROGRAMS and " " in span]


@pytest.mark.parametrize("page", [*LIVING, *HEADERS])
def test_commands_are_real(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [command for block in shown(page) for command in block.commands]
    found = {command: flaw_of(substituted(command)) for command in commands}
    if page.endswith(".md"):
        found |= {command: flaw_of(command, whole=False) for command in in_prose(page)}
    flaws = [f"{command}: {flaw}" for command, flaw in found.items() if flaw]
    assert not flaws, "\n".join(flaws)


@pytest.mark.parametrize("page", LIVING)
def test_options_in_backticks_are_real(page):
    found = {span: flaw_of_option(span, OTHERS_OPTIONS) for span in spans_of(prose_of(page)) if re.match(r"--\w", span)}
    flaws = [f"{span}: {flaw}" for span, flaw in found.items() if flaw]
    assert not flaws, "\n".join(flaws)


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m perce.train --data x.jsonl --lora_rr 8", "perce train --objective perse", "perce evaluate --jsonl x",
        "torchrun --nproc_per_node 2 -m perce.train --no_such true", "perce retrain", "python -m benchmarks.tabel x",
        "python -m benchmarks.study --confg x", "python examples/no.py", "pytest benches/", "make tests",
        'make test ARG="-x"', "pip install -e '.[trains]'", "prece train",
    ],
)  # fmt: skip
def test_a_command_that_is_wrong_is_found(wrong):
    assert flaw_of(wrong)
    assert flaw_of_option("--objective ce|lossce") is None and flaw_of_option("--objective ce|lossces")


def test_commands_are_told_from_other_blocks():
    text = (
        "Text\n\n    pip install x  # why\n    X=1 make a \\\n      b\n\n- item\n  make c\n\n    PIR = a − b\n\n"
        "```console\n$ perce train\nloss 1\n```\n```bash\n# why\nperce plan\n```\n"
    )
    found = [block.commands for block in blocks_of("page", text)]
    assert found == [["pip install x", "X=1 make a b"], [], ["perce train"], ["perce plan"]]
    with pytest.raises(AssertionError, match="page:1: expected a program, got 'maek x'"):
        _ = blocks_of("page", "    make x\n    maek x\n")[0].commands


@pytest.mark.parametrize("page", LIVING)
def test_blocks_say_what_they_are(page):
    """So that no command is overlooked: fences have a known language, and indented blocks with options are commands."""
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: expected a fence of {', '.join(sorted(LANGUAGES))}"
        if block.language == "indented" and not block.commands:
            assert not re.search(r"^\S+ .*\s--\w", block.text, re.MULTILINE), (
                f"{page}:{block.line}: if these are commands, add their program to PROGRAMS"
            )


def test_no_table_is_out_of_date():
    blocks = [block for page in (*LIVING, *HEADERS) for block in shown(page)]
    commands = [command for block in blocks for command in block.commands]
    python = [block for block in blocks if block.language == "python"]
    prose = "\n".join(prose_of(page) for page in LIVING)
    for words in NOT_RUN:
        assert any(words in canonical(command) for command in commands), f"NOT_RUN: {words!r} occurs nowhere"
    for old in SUBSTITUTES:
        assert any(old in text for text in (*commands, *(block.text for block in python))), (
            f"SUBSTITUTES: {old!r} occurs nowhere"
        )
    for page, part in AROUND:
        assert any(part in block.text for block in shown(page)), f"{page} has no block with {part!r}"
    for name in (*OTHERS_OPTIONS, *NOT_THERE):
        assert name in prose, f"{name} occurs nowhere"


def test_every_block_of_python_that_is_not_run_here_is_run_elsewhere():
    for (page, part), (count, test) in RUN_ELSEWHERE.items():
        found = [block for block in shown(page) if block.language == "python" and part in block.text]
        assert len(found) == count, f"{page}: expected {count} blocks of Python with {part!r}, got {len(found)}"
        path, _, name = test.partition("::")
        text = read(path)
        assert f"def {name}(" in text and page in text, f"RUN_ELSEWHERE: {test} is not there, or does not read {page}"


# ---- runs

WRITTEN = re.compile(r"--(?:output|json|jsonl|summary|output_dir)[ =](\S+)")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    from tests.helpers.workplace import save_models

    shelf = tmp_path_factory.mktemp("shelf")
    texts = "".join(read(page) for page in (*LIVING, *HEADERS))
    save_models(shelf, set(HUB_ID.findall(texts)))
    return shelf


def script_of(block: Block) -> str:
    """A directory is removed before another run is begun in it: a reader takes one of the ways that the page shows."""
    lines = []
    for command in map(substituted, (x for x in block.commands if not left_out(x))):
        directory = re.search(r"--output_dir[ =](\S+)", command)
        if directory and not re.search(r"--resume\b", command):
            lines.append(f"rm -rf {directory[1]}")
        lines.append(command)
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", RUNNING)
def test_what_a_page_shows_runs(page, shelf, tmp_path):
    """In the order of the page and in one directory: later commands find what earlier ones have written."""
    from tests.helpers.workplace import environment, furnish, run_commands, run_python

    furnish(tmp_path, shelf)
    env = environment(tmp_path, shelf)
    for block in to_run(page):
        began = time.monotonic()
        around = [code for (of, part), code in AROUND.items() if of == page and part in block.text]
        before, after = around[0] if around else ("", "")
        if block.language == "python":
            run_python(f"{before}{substituted(block.text)}\n{after}", tmp_path, env)
        else:
            script = f"{before}{script_of(block)}\n{after}"
            run_commands(script, tmp_path, env)
            for name in WRITTEN.findall(script):
                assert (tmp_path / name).exists(), f"{name} was not written by\n{script}"
        print(f"{page}:{block.line}  {time.monotonic() - began:.0f} s")
