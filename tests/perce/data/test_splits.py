"""Which examples are held out and drawn."""

import pytest

from perce import DataConfig, UserError
from perce.config.schema import SplitConfig
from perce.data.splits import hold_out, load_split, load_splits
from tests.helpers.tiny import demo_examples, write_jsonl


def test_hold_out_keeps_users_whole():
    examples = demo_examples(60)
    train, validation, note = hold_out(examples, seed=0)
    assert not {x.user_id for x in train} & {x.user_id for x in validation}
    assert len(train) + len(validation) == 60 and validation and "users held out" in note
    assert hold_out(examples, seed=0)[1] == validation and hold_out(examples, seed=1)[1] != validation


def test_hold_out_of_one_user_takes_examples_and_of_one_example_is_an_error():
    train, validation, note = hold_out(demo_examples(6), seed=0)
    assert len(train) == 5 and len(validation) == 1 and "examples" in note
    with pytest.raises(UserError, match="at least two"):
        hold_out(demo_examples(1), seed=0)


def test_eval_examples_draws_the_same_sample_each_time():
    config = DataConfig()
    drawn = [load_splits(config, eval_examples=5, seed=3).validation for _ in range(2)]
    assert len(drawn[0]) == 5 and drawn[0] == drawn[1]
    assert load_splits(config, eval_examples=5, seed=4).validation != drawn[0]
    assert len(load_splits(config, eval_examples=0, seed=3).validation) == 42


@pytest.mark.parametrize("streaming", [True, False])
def test_a_split_that_a_file_does_not_have_is_named(tmp_path, streaming):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"persona": "I bake.", "query": "Hi", "response": "Hello"}])
    with pytest.raises(UserError, match=r"--split test: .*rows\.jsonl has no such split; it has train\."):
        load_split(DataConfig(data=str(path), streaming=streaming), SplitConfig(split="test"), seed=0)
