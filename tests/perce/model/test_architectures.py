"""Every causal language model of transformers, tiny: right to 1e-4, or refused in one paragraph (helpers/sweep.py)."""

import pytest
import transformers

from tests.helpers.architectures import NAMES
from tests.helpers.sweep import TABLE, outcomes, row

A_FEW = ["llama4_text", "xlnet"]


@pytest.mark.parametrize("name", A_FEW)
def test_a_few_are_right_or_refused(name):
    found = outcomes(name)
    assert found["step"] == found["saved"] == "right"
    assert found["shared"].startswith("chains: ")  # their attention is not given every limit of what a token sees


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_is_right_or_refused_as_the_table_says(name):
    found, table = outcomes(name), TABLE.read_text(encoding="utf-8")
    if transformers.__version__ in table:  # another version may have other models
        assert row(name, found) in table
