"""The weights of a checkpoint, put into the model that is trained."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from perce.errors import UserError, in_one_line
from perce.model.probe import unwrapped
from perce.visible import in_short


def load_weights(model: Any, checkpoint: Path) -> list[str]:
    """Load weights as from_pretrained does, which knows under which names they are saved.

    Returns the names of tensors that are left as they were, because the model's class does not make them. UserError if
    the checkpoint and the model do not have the same weights.
    """
    widest = max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda dtype: dtype.itemsize)
    try:
        saved, found = type(model).from_pretrained(
            checkpoint, config=copy.deepcopy(model.config), dtype=widest, output_loading_info=True
        )
        others = {*found["unexpected_keys"]} - model.state_dict().keys()
        for names, problem in ((found["missing_keys"], "lacks {} of its weights"), (others, "has {} that it lacks")):
            if names:
                raise UserError(_unlike(checkpoint, f"{problem.format(len(names))}: {in_short(sorted(names))}"))
        return model.load_state_dict(saved.state_dict(), strict=False).missing_keys
    except RuntimeError as error:
        raise UserError(_unlike(checkpoint, in_one_line(error))) from error


def _unlike(checkpoint: Path, why: str) -> str:
    return (
        f"{checkpoint}: is not of the model that is trained ({why}). Resume with the model that it was saved from, or "
        "start a new run."
    )


class WeightsOfCheckpoints(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """A base class to put before a transformers.Trainer, which loads only weights that have the same name in the file
    and in the model and leaves the others as they are: the experts of most mixtures, and all weights of some models
    with images (https://github.com/huggingface/transformers/issues/48805)."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_all(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_all(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _load_all(self, checkpoint: str) -> bool:
        """Whether all weights were loaded here. Adapters, and weights that are sharded, have loaders of their own; what
        a user has added to a model has the same name in the file."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or unwrapped(self.model) is not self.model:
            return False
        try:
            return not load_weights(self.model, Path(checkpoint))
        except TypeError:  # a class that from_pretrained cannot make
            return False
