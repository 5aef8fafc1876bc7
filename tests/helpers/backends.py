"""Which backend has computed something."""

import pytest

from perce_kernels import backends, chunked, reference
from tests.helpers.training import fails, model_directory, rows_file, training  # noqa: F401  fixtures

TRITON = pytest.mark.skipif(not backends.TRITON_FOUND, reason="Triton is not installed")

EACH = ["torch", "reference", pytest.param("triton", marks=TRITON)]


@pytest.fixture(name="ran")
def backends_that_ran(monkeypatch):
    """The backends that computed something, in order."""
    modules = {"torch": chunked, "reference": reference}
    if backends.TRITON_FOUND:
        from perce_kernels.gpu import driver

        modules["triton"] = driver
    names = []
    for backend, module in modules.items():
        for function in ("perce_loss" if module is reference else "sweep", "logprobs"):
            run = getattr(module, function)

            def spy(*args, run=run, backend=backend, **options):
                names.append(backend)
                return run(*args, **options)

            monkeypatch.setattr(module, function, spy)
    return names
