"""The numbers that a run logs about its tokens."""

import copy

import pytest
import torch

from perce import LossConfig
from perce.model.passes import token_statistics
from perce.objectives import Measured
from perce.training.meters import Window
from tests.helpers.trainers import LOSS, PAIRS, arguments, logged, model_for, trainer_for


def test_statistics_are_logged_and_right(tmp_path):
    model = model_for("full")
    trainer = trainer_for(model, arguments(tmp_path, max_steps=1, per_device_train_batch_size=20))
    before = copy.deepcopy(model)
    trainer.train()
    entry = trainer.state.log_history[0]
    trainer.model = trainer.model_wrapped = before
    stats = token_statistics(before.eval(), trainer.data_collator(PAIRS), LOSS.weighting)
    pir = torch.cat([x.logp - x.logp_cf for x in stats])
    expected = {
        "ce": -torch.cat([x.logp for x in stats]).mean(), "pir_mean": pir.mean(),
        "weight_mean": pir.clamp(LOSS.clip_min, LOSS.clip_max).mean(),
        "frac_at_floor": (pir <= LOSS.clip_min).float().mean(),
        "frac_at_ceiling": (pir >= LOSS.clip_max).float().mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert entry[name] == pytest.approx(value.item(), abs=1e-5), name
    assert entry["tokens_per_second"] > 0 and entry["peak_memory_mib"] > 0
    assert trainer.tokens_seen == sum(len(pair["input_ids"]) for pair in PAIRS)
    assert 0 < trainer.estimation_clock.seconds() < trainer.training_seconds


def test_a_window_is_on_its_device_from_the_start():
    """Or the first batch after each log would wait for a copy. Data on "meta" cannot be added to data on the host."""
    column = torch.ones(5, device="meta")
    window = Window(column.device)
    window.add(LOSS, Measured(*[column] * 4), pir=column, tokens=column.sum())
    assert window.total.device == column.device


def test_shares_at_the_clip_are_counted_at_its_own_bounds_under_a_schedule(tmp_path):
    shares = []
    for schedule in ("constant", "rising"):  # at its first step both bounds are 1
        loss = LossConfig(clip_min=0.05, clip_schedule=schedule)
        trainer = trainer_for(model_for("full"), arguments(tmp_path, loss=loss, logging_steps=1))
        trainer.train()
        shares.append(logged(trainer, "frac_at_floor", "frac_at_ceiling", "weight_mean")[0])
    assert shares[0][:2] == shares[1][:2] and shares[0][0] < 1 and shares[1][2] == 1 != shares[0][2]
