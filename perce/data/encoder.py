"""Embeddings of texts by a BERT-like encoder, for dense retrieval.

    e(text) = mean of the last hidden states over the text's own tokens      (D,)
    score   = e(query) · e(passage)

The score is the dot product, with which Contriever is trained, or the cosine if the model was trained with that. The
sentence-transformers files in the model's directory say so (a Normalize module in modules.json).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from perce.errors import UserError
from perce.hub import from_pretrained, with_weights
from perce.process import is_first_process
from perce.visible import say

MAX_TOKENS = 512  # of a text are read, or fewer if the model says so; the rest is ignored
MODULES = "modules.json"
BATCH = 32
CACHED_TEXTS = 100_000  # embeddings kept, 300 MB at D = 768; the rows of one user share most of their passages


class Encoder:
    """Embeds each distinct text once. Runs in fp32, on the GPU if there is one.

    Args:
        path: a directory or Hub id of a mean-pooled encoder, such as facebook/contriever.

    Raises UserError if the model cannot be loaded, or is not such an encoder.
    """

    def __init__(self, path: str):
        from transformers import AutoModel, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            load: dict[str, Any] = {"option": "--retriever_model", "kind": "an encoder"}
            self.tokenizer = from_pretrained(AutoTokenizer, path, **load)
            # transformers draws weights that the checkpoint lacks (BERT's pooler, which is not used) at random.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = with_weights(AutoModel, path, unused="pooler", dtype=torch.float32, **load)
        except UserError as error:
            raise UserError(f"{error} --retriever bm25 needs no model.") from error
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.cosine, max_tokens, missing = _conventions(path)
        assumed = ", assumed" if MODULES in missing else ""
        if missing and is_first_process():
            say(
                f"--retriever_model {path}: the cache of this machine lacks {', '.join(missing)}, and the Hub cannot "
                f"be asked; assumed: at most {MAX_TOKENS} tokens{', their mean, the dot product' if assumed else ''}",
                error=True,
            )
        self.max_tokens = min(MAX_TOKENS, max_tokens, self.tokenizer.model_max_length)
        self._check(path)
        self.name = f"{path} ({'cosine' if self.cosine else 'dot product'}{assumed})"
        self.identity = self._identity()
        self._cache: dict[str, Tensor] = {}

    def _check(self, path: str) -> None:
        expected = "expected a BERT-like encoder, such as facebook/contriever"
        if self.model.config.is_encoder_decoder:
            raise UserError(f"--retriever_model {path}: {expected}, got an encoder-decoder model.")
        if self.tokenizer.pad_token is None or not self.tokenizer.is_fast:
            raise UserError(f"--retriever_model {path}: {expected}, whose fast tokenizer has a padding token.")

    def _identity(self) -> str:
        """Digest of the weights, the tokenizer and the conventions, on which the embeddings depend."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(repr((self.model.config.to_json_string(), self.cosine, self.max_tokens)).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """(n,) similarity of each of n passages to the query."""
        asked, *found = self.encode([query, *passages]).double()
        return (torch.stack(found) @ asked).numpy()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """(n, D) fp32 embeddings on the CPU, of unit length if the model compares by cosine."""
        new = list(dict.fromkeys(text for text in texts if text not in self._cache))
        ids = self.tokenizer(new, truncation=True, max_length=self.max_tokens)["input_ids"] if new else []
        by_length = sorted(range(len(new)), key=lambda i: len(ids[i]))
        for start in range(0, len(new), BATCH):
            chosen = by_length[start : start + BATCH]
            for i, embedding in zip(chosen, self._embed([ids[i] for i in chosen]), strict=True):
                self._cache[new[i]] = embedding
        embeddings = torch.stack([self._cache[text] for text in texts])
        for text in list(self._cache)[: max(len(self._cache) - CACHED_TEXTS, 0)]:
            del self._cache[text]
        return embeddings

    @torch.no_grad()
    def _embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """(B, D) embeddings of B token sequences: the mean over each sequence's own tokens, without padding."""
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(self.device)
        hidden = self.model(**batch)[0]  # (B, T, D)
        mask = batch["attention_mask"][..., None]  # (B, T, 1)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return (torch.nn.functional.normalize(mean, dim=-1) if self.cosine else mean).cpu()


def _conventions(path: str) -> tuple[bool, int, list[str]]:
    """(cosine, longest text in tokens) by the sentence-transformers files in the model's directory, and which of these
    the cache lacks while the Hub cannot be asked. UserError for any pooling except the mean."""
    missing: list[str] = []
    modules = _lookup(path, MODULES, missing) or []
    for module in modules:
        if module["type"].endswith("Pooling"):
            pooling = _lookup(path, f"{module['path']}/config.json", missing) or {}
            modes = {name for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True}
            modes |= {f"pooling_mode_{pooling['pooling_mode']}_tokens"} if "pooling_mode" in pooling else set()
            if modes != {"pooling_mode_mean_tokens"}:
                raise UserError(
                    f"--retriever_model {path}: expected a model that averages its tokens, got one that pools them by "
                    f"{', '.join(sorted(modes)) or 'an unknown mode'}. Choose another, such as facebook/contriever."
                )
    settings = _lookup(path, "sentence_bert_config.json", missing) or {}
    cosine = any(module["type"].endswith("Normalize") for module in modules)
    return cosine, settings.get("max_seq_length") or MAX_TOKENS, missing


def _lookup(path: str, name: str, missing: list[str]) -> Any:
    """The content of the JSON file `name` of a local or Hub model; None if there is no such file. A name of which that
    cannot be known is added to `missing`."""
    local = Path(path).expanduser()
    try:
        file = local / name if local.exists() else Path(hf_hub_download(path, name))
        return json.loads(file.read_text(encoding="utf-8"))
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(path, name) is not _CACHED_NO_EXIST:
            missing.append(name)
        return None
    except (FileNotFoundError, EntryNotFoundError):
        return None
    except ValueError as error:
        raise UserError(f"--retriever_model {path}: its {name} is not valid JSON ({error}).") from error
