"""Shared by the tests of pairs."""

from perce.data.pairs import PairBuilder
from perce.data.rows import Example
from perce.reading.fields import Turn
from tests.helpers.tiny import TEMPLATES, tiny_tokenizer

TOKENIZERS = {name: tiny_tokenizer(template) for name, template in TEMPLATES.items()}

EXAMPLE = Example(
    persona=("I keep bees.", "My dog is called Juno.", "I live in Oslo."),
    turns=(Turn("user", "Coming tonight?"),),
    response="No, Juno and I are with the bees.",
    user_id="u1",
    personal_spans=None,
    source="train.jsonl:3",
)


def example(**changes):
    return Example(**{field: changes.get(field, getattr(EXAMPLE, field)) for field in Example.__slots__})


def builder(template="chatml", **options):
    return PairBuilder(TOKENIZERS[template], **({"max_length": 2000} | options))
