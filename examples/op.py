"""The loss alone, with torch and nothing else: `python examples/op.py`.

A toy: random hidden states of tokens, with the persona in the prompt and without it, and a trained output embedding.
"""

import torch

from perce_kernels import fused_perce_loss

torch.manual_seed(0)
N, D, V = 64, 32, 1000  # response tokens, hidden size, vocabulary
hidden, hidden_cf = torch.randn(2, N, D)
target = torch.randint(V, (N,))
lm_head = torch.nn.Parameter(torch.randn(V, D) / D**0.5)
optimizer = torch.optim.SGD([lm_head], lr=5.0)
for step in range(20):
    loss, stats = fused_perce_loss(hidden, lm_head, target, hidden_cf, return_stats=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        low, high = stats.token_weight.aminmax()
        print(f"step {step:2}  loss {loss.item():.3f}  weights {low:.2f} … {high:.2f}")
