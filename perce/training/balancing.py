"""The load-balancing loss of a step, however the step is divided into forward passes and processes.

    E · Σ_e f_e · P_e  =  Σ over passes of  E · Σ_e f_e · (Σ of e's probability in the pass) ÷ (tokens · layers)

The counts behind f_e are constants, and P_e is linear in the tokens. So each forward pass can add its share once the
counts of the whole step are known. If a process has one forward pass per step, the counts come from that pass,
otherwise from a counting pass over all of them beforehand. The counts of all processes are added up. Over a micro-batch
of few sequences the term would push each sequence to use all experts alike (arXiv 2501.11873).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from perce.errors import UserError
from perce.model.auxiliary import OFF, Router, load_balance
from perce.training.arguments import PerceArguments


class StepBalance:
    """Call `begin` for each step, then `share` for each of its forward passes."""

    def __init__(self, router: Router, over_processes: Callable[[Tensor], Tensor]):
        self.router = router
        self._over_processes = over_processes
        self._to_come: list[Tensor] = []  # the step's counts, once per forward pass to come; or empty: see share

    def begin(self, counts: list[Tensor]) -> None:
        """counts: (E,) of each forward pass of this process; empty if there is only one, which counts itself. Forgets a
        step that was given up midway."""
        self._to_come = [self._over_processes(torch.stack(counts).sum(0))] * len(counts) if counts else []

    def share(self, experts: Tensor) -> Tensor:
        """What a forward pass with these (2, E) expert_sums adds to the load-balancing loss of the step, 0-d."""
        counts = self._to_come.pop() if self._to_come else self._over_processes(experts[0].detach())
        return load_balance(experts[1], counts, self.router.top_k)


def check_balancing(args: PerceArguments) -> None:
    """UserError for options under which the gradient of the load-balancing loss would be wrong, or not known."""
    if args.memory.branches_per_forward:
        raise UserError(
            "branches_per_forward: recomputes the forward passes behind a persona after their experts were counted for "
            "the load-balancing loss that the model's config or --router_aux_loss_coef asks for. Leave it out. "
            f"{OFF}"
        )
    if args.loss.normalize == "batch":
        raise UserError(
            "normalize=batch: scales all gradients at the end of a step, also those of the load-balancing loss that "
            f"the model's config or --router_aux_loss_coef asks for. Use --normalize sequence or none. {OFF}"
        )
