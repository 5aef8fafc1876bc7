"""The loss in a training loop of your own: `python examples/loop.py [MODEL]`.

MODEL is a directory or Hub id; by default a small model that is downloaded once.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import perce
from perce_kernels import fused_perce_loss

path = sys.argv[1] if len(sys.argv) > 1 else str(perce.default_model_path())
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
persona = ["I keep bees on the roof.", "My dog is called Juno."]
talk = [
    ("Coming tonight?", "No, the bees need me on the roof."),
    ("Who chewed my shoe?", "Juno did. She is sorry, and so am I."),
]


def padded(sequences):  # (B, T) token ids, padded on the right
    rows = [torch.tensor(ids) for ids, _ in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)


def is_reply(sequences, ids):  # (B, T), which tokens are the response
    places = torch.arange(ids.shape[1])
    return torch.stack([(places >= len(row) - length) & (places < len(row)) for row, length in sequences])


def prompt(query, system):
    said = [{"role": "system", "content": system}, {"role": "user", "content": query}]
    return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)


with_persona, without = [], []
for query, reply in talk:
    ids = tokenizer(reply, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    # Both prompts have the same system message; in one of them the persona comes before it.
    with_persona.append((prompt(query, perce.prompt_text(persona)) + ids, len(ids)))
    without.append((prompt(query, "Write the next message exactly as this user would.") + ids, len(ids)))
ids_with_persona, ids_without_persona = padded(with_persona), padded(without)
is_response = is_reply(with_persona, ids_with_persona)
is_response_without_persona = is_reply(without, ids_without_persona)


class PerceLoss(torch.nn.Module):
    """Both passes and the loss in one forward: under DistributedDataParallel, wrap this module, not the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def response_states(self, ids, is_response):
        """ids: (B, T), padded on the right; is_response: (B, T), which of them are the response."""
        hidden = self.model.model(ids).last_hidden_state[:, :-1]
        return hidden[is_response[:, 1:]], ids[:, 1:][is_response[:, 1:]]  # (N, D), (N,): row i predicts target[i]

    def forward(self, with_persona, without):
        with torch.no_grad():
            hidden_cf, _ = self.response_states(*without)
        hidden, target = self.response_states(*with_persona)
        loss, stats = fused_perce_loss(hidden, self.model.lm_head.weight, target, hidden_cf, return_stats=True)
        return loss, stats, target  # stats.logp, .logp_cf, .pir, .token_weight: (N,), detached


step_of = PerceLoss(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for step in range(5):
    loss, stats, target = step_of((ids_with_persona, is_response), (ids_without_persona, is_response_without_persona))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.4f}  PIR {stats.pir.mean():.3f}")
personal = stats.token_weight.topk(5).indices.tolist()
print("most personal:", ", ".join(repr(tokenizer.decode([token])) for token in target[personal].tolist()))
