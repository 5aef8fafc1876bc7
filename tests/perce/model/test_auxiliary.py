"""Losses that a model's own forward has besides cross-entropy: the router's sums, and models that are refused."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.mixtral import modeling_mixtral

from perce import UserError
from perce.data.batch import collate
from perce.model.auxiliary import check_own_loss, expert_sums, load_balance, router_of
from perce.model.patch import prepare_model
from perce.objectives import RouterCall
from tests.helpers.architectures import CANNOT_BUILD, CONFIGS, NAMES, tiny
from tests.helpers.models import PAIRS
from tests.helpers.tiny import MIXTURES, SIZES, save_tiny_model, tiny_model
from tests.helpers.trainers import arguments, trainer_for
from tests.helpers.training import fails


@pytest.mark.parametrize("tile", [9, 4, 3, 1])
def test_sums_of_tiles_leave_out_the_padding_of_each(tile):
    """Three layers, two sequences of 9 and 5 tokens."""
    torch.manual_seed(0)
    layers = [torch.randn(2, 9, 4) for _ in range(3)]
    real = torch.arange(9) < torch.tensor([9, 5])[:, None]
    tiles = [part.reshape(-1, 4) for layer in layers for part in layer.split(tile, dim=1)]
    counts, probabilities = expert_sums(tiles, RouterCall(top_k=2, real=real))
    assert counts.sum() == 3 * 14 * 2
    expected = modeling_mixtral.load_balancing_loss_func(
        tuple(layer.reshape(-1, 4) for layer in layers), num_experts=4, top_k=2, attention_mask=real.long()
    )  # fmt: skip
    torch.testing.assert_close(load_balance(probabilities, counts, top_k=2), expected)


@pytest.mark.parametrize("how", [{}, {"packing": True}, {"sharing": "chains"}, {"sharing": "branches"}])
def test_each_token_counts_as_often_as_a_sequence_has_it(how):
    uses = collate(PAIRS, **how)["uses"]
    assert uses.sum() == sum(len(pair["input_ids"]) - 1 for pair in PAIRS)
    assert (uses == 0).any() == ("packing" not in how), "these examples share nothing"


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize(("asks", "given", "coefficient"), [(True, None, 0.3), (True, 0.5, 0.5), (False, 0.5, 0.5)])
def test_a_router_is_read_from_the_model(architecture, asks, given, coefficient):
    model = prepare_model(tiny_model(architecture, output_router_logits=asks))
    assert vars(router_of(model, given)) == {"top_k": 2, "coefficient": coefficient}


@pytest.mark.parametrize(("asks", "given"), [(False, None), (True, 0.0), (False, 0.0)])
def test_no_term_where_nobody_asks(asks, given):
    assert router_of(prepare_model(tiny_model("mixtral", output_router_logits=asks)), given) is None


def test_a_model_without_a_router_has_none_by_its_config_and_is_refused_by_number():
    for changes in ({}, {"output_router_logits": True}):  # a stray entry, which its own forward does not read
        model = prepare_model(tiny_model(**changes))
        assert router_of(model, None) is None and router_of(model, 0.0) is None
        with pytest.raises(UserError, match=r"router_aux_loss_coef: LlamaForCausalLM \(llama\).*no router"):
            router_of(model, 0.1)


def test_a_class_of_ones_own_is_asked_as_its_parent():
    class Own(modeling_mixtral.MixtralForCausalLM):
        pass

    model = tiny_model("mixtral")
    model.__class__ = Own
    assert router_of(prepare_model(model), None).coefficient == 0.3


def asking(model):
    """The model with a config that asks for the loss."""
    for config in (model.config, model.config.get_text_config()):
        config.output_router_logits = True
    return model


def has_load_balancing(name):
    """Told by the text of its files: importing all architectures takes 5 s of every process that collects the tests."""
    files = Path(sys.modules[CONFIGS[name].__module__].__file__).parent.glob("modeling_*.py")
    return any("load_balancing_loss_func" in file.read_text(encoding="utf-8") for file in files)


# Doge is dense by default; its mixture has product keys, and another formula.
BALANCED = [name for name in NAMES if has_load_balancing(name) and name != "doge"]
if transformers.__version__.startswith(("5.16.", "5.17.")):  # a fault of theirs: their own forward has no such loss
    BALANCED = [name for name in BALANCED if not name.startswith(("dbrx", "granitemoe"))]


@pytest.mark.parametrize("name", BALANCED)
def test_every_mixture_of_transformers_is_known(name):
    model = asking(prepare_model(tiny(name).eval()))
    router = router_of(model, None)
    assert router.top_k == 2 and router.coefficient > 0
    check_own_loss(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in CANNOT_BUILD])
def test_no_other_architecture_of_transformers_adds_to_its_loss(name):
    try:
        model = prepare_model(tiny(name).eval())
    except UserError:  # refused for another reason: test_patch.py
        return
    if name == "git":  # its own loss needs an image
        with pytest.raises(UserError, match=r"GitForCausalLM \(git\): its own loss on a few tokens, .*, fails: "):
            check_own_loss(model)
    else:
        check_own_loss(model)


def test_a_load_balancing_loss_of_another_formula_is_refused(monkeypatch):
    own = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *args: 2 * own(*args))
    model = prepare_model(tiny_model("mixtral"))
    with pytest.raises(UserError, match=r"MixtralForCausalLM \(mixtral\).*another formula.*--router_aux_loss_coef 0"):
        router_of(model, None)
    assert router_of(model, 0.0) is None


def test_a_loss_that_is_not_that_of_the_logits_is_refused():
    model = tiny_model()
    own = model.loss_function
    model.loss_function = lambda *args, **kwargs: own(*args, **kwargs) + 1e-3
    with pytest.raises(UserError, match=r"LlamaForCausalLM \(llama\).*a term that perce does not know"):
        check_own_loss(model)


def bamba(**changes):
    torch.manual_seed(0)
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "attn_layer_indices": [1]}
    config = transformers.BambaConfig(**(SIZES | sizes | changes))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("coefficient", [1e-2, 1e-4, 1e-9])
def test_a_z_loss_is_refused_by_name_where_it_would_be_trained(tmp_path, coefficient):
    model = prepare_model(bamba(z_loss_coefficient=coefficient))  # like perce.score, which leaves nothing out
    with pytest.raises(
        UserError, match=rf"BambaForCausalLM \(bamba\).*z_loss_coefficient={coefficient:g}\. Set .* to 0"
    ):
        trainer_for(model, arguments(tmp_path))


def test_a_z_loss_of_zero_and_one_that_the_own_forward_does_not_add_are_fine():
    for model in (bamba(z_loss_coefficient=0.0), tiny_model(router_z_loss_coef=0.1), tiny_model("mixtral")):
        check_own_loss(model)


@pytest.mark.parametrize(  # transformers' experts take no fp64
    ("architecture", "dtype"),
    [("llama", torch.bfloat16), ("llama", torch.float64), ("mixtral", torch.bfloat16), ("mixtral", torch.float32)],
)
def test_a_plain_loss_is_known_in_every_precision(architecture, dtype):
    model = prepare_model(tiny_model(architecture).to(dtype))
    check_own_loss(model)
    assert (router_of(model, None) is None) == (architecture == "llama")


def test_the_command_tells_of_the_term_and_refuses_it_for_a_dense_model(train, tmp_path):
    fails(train("--router_aux_loss_coef", "0.1"), "router_aux_loss_coef", "no router", "LlamaForCausalLM")
    fails(train("--router_aux_loss_coef=-1"), "router_aux_loss_coef", ">= 0")
    model = str(save_tiny_model(tmp_path / "model", "mixtral"))
    code, out, _ = train(model=model, lora_r=0, output_dir=tmp_path / "mixture")
    assert code == 0 and "+ 0.3 × the router's load-balancing loss" in out and "  router 2." in out
