"""The structure of the packages: imports go only to lower floors, every module has tests, `import perce` is light."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import perce
from tests.helpers import ROOT

# From the lowest up. A room imports only rooms on lower floors, and others in its own folder without a circle.
COMMANDS = ("train", "score", "evaluate", "compare", "plan", "preview", "doctor")
FLOORS = (
    ("perce_kernels.product", "perce_kernels.reference", "perce_kernels.vocab_parallel"),
    ("perce_kernels.contract",),
    ("perce_kernels.row_pass",),
    ("perce_kernels.chunked",),
    ("perce_kernels.gpu",),
    ("perce_kernels.backends",),
    ("perce_kernels.ops",),
    ("perce_kernels.checks",),
    ("perce_kernels.loss",),
    ("perce_kernels",),
    ("perce.visible",),
    ("perce.errors", "perce.objectives"),
    ("perce.files", "perce.process"),
    ("perce.reading",),
    ("perce.config",),
    ("perce.hub", "perce.demo", "perce.report"),
    ("perce.data",),
    ("perce.model",),
    ("perce.planning", "perce.measuring"),
    ("perce.training",),
    ("perce.integrations", "perce.running"),
    tuple(f"perce.{name}" for name in COMMANDS),
    ("perce.__main__",),
    ("perce",),
)
OURS = ("perce", "perce_kernels", "tests", "benchmarks")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("perce", "perce_kernels")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(module: str) -> set[str]:
    """Our modules that a module imports anywhere in its text, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("folder", OURS)
def test_what_is_imported_is_there(folder):
    """Imports inside functions too, those whose failure is suppressed, and modules that a process is started with."""
    line = re.compile(rf"^ *(?:from|import) ((?:{'|'.join(OURS)})(?:\.\w+)*)", re.MULTILINE)
    started = re.compile(r'"(tests(?:\.\w+)+)"')
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in {*line.findall(text), *started.findall(text)} - {"tests.no_such_stage"}:
            assert importlib.util.find_spec(name), f"{path.relative_to(ROOT)}: there is no {name}"


def floor_of(module: str) -> tuple[int, str]:
    """(floor, room) of a module."""
    for number, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or (module.startswith(f"{room}.") and room not in ("perce", "perce_kernels")):
                return number, room
    raise AssertionError(f"{module} is on no floor: give it one in FLOORS")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    mine, room = floor_of(module)
    for other in imported(module):
        theirs, their_room = floor_of(other)
        assert theirs < mine or room == their_room, f"{module} imports {other}, which is not below it"


def test_there_is_no_circle():
    left = {module: imported(module) - {module} for module in MODULES}
    while ground := [module for module, needs in left.items() if not needs]:
        for module in ground:
            del left[module]
        left = {module: needs - set(ground) for module, needs in left.items()}
    assert not left, f"these import each other: {', '.join(left)}"


# A test file is named after a module, or after a module and a part of it; these test several modules.
ABOUT_SEVERAL = {
    "test_house.py": "all modules",
    "test_distribution.py": "what is installed, and what is not",
    "test_docs.py": "the documentation: its links, and what it shows",
    "test_extending.py": "the examples of docs/EXTENDING.md",
    "test_examples.py": "examples/",
    "perce/data/test_fuzz.py": "files of every kind, mutated",
    "perce/data/test_long_names.py": "every message that quotes a row",
    "perce/demo/test_demo.py": "the built-in examples and their model",
    "perce/test_backend_option.py": "--backend of every command",
    "perce/test_longce.py": "documents, from rows to a run",
    "perce/model/test_architectures.py": "every model of transformers",
    "perce/running/test_kills.py": "runs that are killed",
    "perce/training/test_ranks.py": "several processes",
    "perce_kernels/gpu/test_aot.py": "all kernels, compiled without a GPU",
    "perce_kernels/gpu/test_device.py": "all kernels on a GPU, at real sizes",
    "perce_kernels/gpu/test_memory.py": "all kernels in the interpreter: bounds and races",
    "perce_kernels/gpu/test_promises.py": "all kernels on a GPU: memory, syncs, graphs",
    "benchmarks/gpu/test_stages.py": "parts, the suite and the order of the stages",
}
# Modules that are tested only through others: in runs of the commands and of the op.
SEEN_THROUGH_OTHERS = {
    "reading.fields",
    "errors", "process", "config.commands", "config.questions",
    "config.schema", "config.step", "model.head", "model.passes",
    "planning.live", "measuring.records", "measuring.scores", "measuring.score_report",
    "measuring.identification", "report.terminal", "training.normalizer",
    "running.run", "running.summary", "contract", "reference", "row_pass", "gpu.blocked", "gpu.row_halves",
}  # fmt: skip


def files_for(module: str) -> list[Path]:
    path = MODULES[module].relative_to(ROOT).with_suffix("")
    folder = ROOT / "tests" / path.parent
    return [folder / f"test_{path.name}.py", *folder.glob(f"test_{path.name}_*.py")]


def test_every_module_has_its_tests_and_every_test_file_its_module():
    modules = [name for name, path in MODULES.items() if path.name != "__init__.py"]
    for module in modules:
        has = any(path.is_file() for path in files_for(module))
        assert has != (module.partition(".")[2] in SEEN_THROUGH_OTHERS), (
            f"{module}: expected a test file of its name, or the name in SEEN_THROUGH_OTHERS"
        )
    expected = {path for module in modules for path in files_for(module)}
    expected |= {ROOT / "tests" / name for name in ABOUT_SEVERAL}
    for path in (ROOT / "tests").rglob("test_*.py"):
        name = path.relative_to(ROOT / "tests")
        if name.parts[0] == "benchmarks":
            module = ROOT / name.parent / f"{path.stem.removeprefix('test_')}.py"
            assert module.is_file() or str(name) in ABOUT_SEVERAL, f"{name} is called after no module"
        else:
            assert path in expected, f"{name} is called after no module"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("perce.")])
def test_one_place_prints(module):
    """perce.visible escapes control characters; a name or a row printed in another way could control the terminal."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    written = {id(node.func): bool(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    printed = [x for x in ast.walk(tree) if isinstance(x, ast.Name) and x.id == "print" and written.get(id(x), True)]
    consoles = re.findall(r"rich\.console|from rich import|\bConsole\.print", ast.unparse(tree))
    assert not printed or module == "perce.visible", f"{module}: print is say, of perce.visible"
    assert not consoles or module == "perce.report.terminal", f"{module}: rich is perce.report.terminal's"


def test_few_rooms_stand_at_the_front():
    assert len(list((ROOT / "perce").glob("*.py"))) <= 14


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import perce", ("torch", "transformers", "datasets", "numpy", "yaml")),
        ("import perce.data.rows", ("torch", "transformers", "datasets", "pyarrow")),
        ("import perce.report.heatmap", ("torch", "matplotlib", "rich")),
        *[
            (
                f"from perce.__main__ import main; main(['{name}', '--help'])",
                ("torch", "transformers", "datasets", "pyarrow", "rich"),
            )
            for name in COMMANDS
        ],
    ],
)
def test_what_answers_at_once_imports_nothing_heavy(code, heavy):
    code = f"import atexit, sys; atexit.register(lambda: print('imported', set({heavy}) & set(sys.modules))); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "imported set()"


def test_the_front_door_opens_to_everything_it_names():
    for name in perce.__all__:
        assert getattr(perce, name) is not None and name in dir(perce)
    with pytest.raises(AttributeError, match="no attribute 'PerceModel'"):
        _ = perce.PerceModel


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(str(x.relative_to(ROOT)) for x in (ROOT / "docs").rglob("*.md"))]
)
def test_pages_import_from_the_front_door(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = ", ".join(re.findall(r"^from perce import (.*)$", text, re.MULTILINE)).split(", ")
    behind = re.search(r"^(from|import) perce\.(?!integrations\.)", text, re.MULTILINE)
    assert {*named} <= {"", *perce.__all__} and not behind
