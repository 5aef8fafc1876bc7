"""Models without data; test_memory.py compares them with real ones."""

from transformers import LlamaConfig

from perce.planning.building import cut


def test_per_layer_lists_are_cut():
    config = cut(LlamaConfig(num_hidden_layers=4, no_rope_layers=list("abcd")), [0, 2, 3])
    assert config.num_hidden_layers == 3 and config.no_rope_layers == list("acd")
