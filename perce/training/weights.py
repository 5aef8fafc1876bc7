"""The weights of a checkpoint, put into the model that is trained."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from perce.errors import UserError, first_line
from perce.model.probe import unwrapped


def load_weights(model: Any, checkpoint: Path) -> None:
    """Load all weights as from_pretrained does, which knows under which names they are saved; UserError if one is
    missing."""
    widest = max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda dtype: dtype.itemsize)
    try:
        saved, found = type(model).from_pretrained(
            checkpoint, config=copy.deepcopy(model.config), dtype=widest, output_loading_info=True
        )
        if lacking := sorted(found["missing_keys"]):
            raise UserError(
                f"{checkpoint}: lacks {len(lacking)} weights of the model that is trained, such as {lacking[0]}. "
                "Resume with the model that it was saved from."
            )
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint}: its weights do not fit the model that is trained ({first_line(error)}). Resume with the "
            "model that it was saved from."
        ) from error


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
        """Whether the weights were loaded here: adapters, and weights that are sharded, have loaders of their own."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or unwrapped(self.model) is not self.model:
            return False
        load_weights(self.model, Path(checkpoint))
        return True
