"""The documentation: its links and names exist, and its commands and code run, offline and on tiny models."""

import importlib.util
import inspect
import re
import textwrap
import time
from pathlib import Path

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
from tests.helpers.markdown_flaws import broken_links, flaw_of, flaw_of_option, hidden_command, missing_files

# Commands that contain one of these texts are not run. "perce NAME" also stands for `python -m perce.NAME`.
NOT_RUN = {
    "pip install": "needs a network; tests/test_distribution.py installs the package",
    ".ci/run": "it is make check and make test",
    "benchmarks.study --config": "takes hours; tests/benchmarks/test_study.py runs it small",
    "benchmarks.study_report": "writes docs/RESULTS.md; tests/benchmarks/test_study.py runs it in another directory",
    "transformers serve": "what it imports besides transformers is not installed",
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
# Blocks of Python that another test runs: their page, a part of their text ("": all blocks of the page), and the test.
OF_CARDS = "tests/perce/running/test_card.py"
RUN_ELSEWHERE = {
    ("README.md", "fused_perce_loss("): "tests/test_examples.py::test_the_loop_in_readme_is_the_one_that_runs",
    ("docs/EXTENDING.md", "Objective("): "tests/test_extending.py::test_an_objective",
    ("docs/EXTENDING.md", '"surprise": lambda'): "tests/test_extending.py::test_an_objective",
    ("docs/EXTENDING.md", "def parse_forum("): "tests/test_extending.py::test_a_format",
    ("docs/EXTENDING.md", 'FORMATS["forum"]'): "tests/test_extending.py::test_a_format",
    ("docs/EXTENDING.md", "def sweep("): "tests/test_extending.py::test_a_backend",
    ("docs/EXTENDING.md", '"exact": Backend('): "tests/test_extending.py::test_a_backend",
    ("docs/EXTENDING.md", "ReplyMetric("): "tests/test_extending.py::test_a_metric",
    ("docs/SERVING.md", ""): f"{OF_CARDS}::test_the_code_of_the_documentation_asks_as_in_training",
}
# Code that runs before and after a block, in its language: what the block presupposes, and what it must have done.
# Other blocks run as they stand.
AROUND = {
    ("docs/COMMANDS.md", "--model runs/ce"): (
        "perce train --objective ce --model Qwen/Qwen3-0.6B --data my_rows.jsonl --output_dir runs/ce\n",
        "",
    ),
    ("docs/COMMANDS.md", "--results mine-s0.json"): (  # another seed's weights are another number
        "for name in mine ce; do for seed in 0 1; do\n"
        'sed "s/\\"weights\\": \\"/&$seed/" $name.json > $name-s$seed.json\n'
        "done; done\n",
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
    "dtype": "vLLM",
    "is_binary_loss_scale": "ms-swift",
    "max-lora-rank": "vLLM",
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


def elsewhere(block: Block) -> str | None:
    """The other test that runs a block of Python."""
    tests = (test for (page, part), test in RUN_ELSEWHERE.items() if page == block.page and part in block.text)
    return next(tests, None)


def left_out(command: str) -> bool:
    return any(words in canonical(command) for words in NOT_RUN)


def to_run(page: str) -> list[Block]:
    return [
        block
        for block in shown(page)
        if (block.language == "python" and not elsewhere(block)) or not all(map(left_out, block.commands))
    ]


RUNNING = [page for page in (*LIVING, *HEADERS) if to_run(page)]
PYTHON = [block for page in (*LIVING, *HEADERS) for block in shown(page) if block.language == "python"]

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
        'make test ARG="-x"', "pip install -e '.[trains]'", "prece train", "perce doctor --no_such", "perce doctor x",
        "python -m perce.doctor --no_such", "perce --no_such", "perce model --x", "python -m perce.hub",
        "python -m perce model", "pytest tests/no", "pytest -k a tests/no.py::test_b", "python -m pytest tests/no",
        "python scripts/no", "python -m pip install '.[trains]'", "python -m benchmarks.pages --pa x",
        "python -m benchmarks.study_report --conf x", "python -m benchmarks.study_report --config x",
        "python -m benchmarks.gpu.decide --second 1",
    ],
)  # fmt: skip
def test_a_command_that_is_wrong_is_found(wrong):
    assert flaw_of(wrong)
    assert flaw_of_option("--objective ce|lossce") is None and flaw_of_option("--objective ce|lossces")


@pytest.mark.parametrize(
    "right",
    [
        "perce --version", "perce --help", "perce NAME --help", "perce doctor", "perce doctor --help",
        "python -m perce train --lora_r 8", "pytest -m slow -k a benchmarks/ --benchmark-only", "python examples/op.py",
        "pytest tests/test_docs.py::test_a_broken_link_or_name_is_found", "python -m benchmarks.pages --page x",
        "python -m benchmarks.gpu.decide --seconds 1",
    ],
)  # fmt: skip
def test_a_command_that_is_right_has_no_flaw(right):
    assert flaw_of(right) is None


@pytest.mark.parametrize("language", ["text", "html", "indented", "console"])
@pytest.mark.parametrize(
    "wrong",
    [
        "perce train", "$ X=1 perce plan --no_such", "python -m benchmarks.table", "torchrun -m perce.train",
        "make test", "pip install perce", "pytest",
    ],
)  # fmt: skip
def test_a_command_that_nothing_checks_is_found(wrong, language):
    block = Block("page", 1, language, f"loss 1\n  {wrong}\n")
    assert hidden_command(block) == wrong
    assert hidden_command(Block("page", 1, "bash", f"{wrong}\n")) is None
    assert hidden_command(Block("page", 1, "text", "perce 1.2.0, Python 3.12\nmakes, perce: a word\n")) is None


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
    """So that no command is overlooked: fences have a known language, and commands are in blocks that are run."""
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: expected a fence of {', '.join(sorted(LANGUAGES))}"
        command = hidden_command(block)
        assert command is None, (
            f"{page}:{block.line}: {command}: use an indented or bash block for commands alone, of programs in PROGRAMS"
        )


def test_no_table_is_out_of_date():
    blocks = [block for page in (*LIVING, *HEADERS) for block in shown(page)]
    commands = [command for block in blocks for command in block.commands]
    prose = "\n".join(prose_of(page) for page in LIVING)
    for words in NOT_RUN:
        assert any(words in canonical(command) for command in commands), f"NOT_RUN: {words!r} occurs nowhere"
    for old in SUBSTITUTES:
        assert any(old in text for text in (*commands, *(block.text for block in PYTHON))), (
            f"SUBSTITUTES: {old!r} occurs nowhere"
        )
    for page, part in (*AROUND, *RUN_ELSEWHERE):
        assert any(part in block.text for block in shown(page)), f"{page} has no block with {part!r}"
    for name in (*OTHERS_OPTIONS, *NOT_THERE):
        assert name in prose, f"{name} occurs nowhere"


def notices(test: str, block: Block, request: pytest.FixtureRequest) -> bool:
    """Whether a test fails if the page that it reads holds broken code in place of the block."""
    path, _, name = test.partition("::")
    text, true_read = read(block.page), Path.read_text
    broken = text.replace(block.text, "1/0\n" + textwrap.indent(block.text, "# "))
    assert broken != text

    def read_text(self: Path, *args: str, **named: str) -> str:
        return broken if self == ROOT / block.page else true_read(self, *args, **named)

    spec = importlib.util.spec_from_file_location("fresh", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        spec.loader.exec_module(module)
        function = getattr(module, name)
        fixtures = {fixture: request.getfixturevalue(fixture) for fixture in inspect.signature(function).parameters}
        try:
            function(**fixtures)
        except (AssertionError, ZeroDivisionError):
            return True
    return False


@pytest.mark.parametrize(
    "block", [block for block in PYTHON if elsewhere(block)], ids=lambda block: f"{block.page}:{block.line}"
)
def test_a_block_that_is_not_run_here_is_run_elsewhere(block, request):
    assert notices(elsewhere(block), block, request)


def test_a_block_that_no_test_reads_is_found(request):
    other = next(block for block in PYTHON if block.page == "README.md" and not elsewhere(block))
    assert not notices(RUN_ELSEWHERE["README.md", "fused_perce_loss("], other, request)


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
