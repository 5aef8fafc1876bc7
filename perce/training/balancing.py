"""The load-balancing loss of a step, in whatever forward passes and processes it is divided.

    E · Σ_e f_e · P_e  =  Σ over passes of  E · Σ_e f_e · (Σ of e's probability in the pass) ÷ (tokens · layers)

The counts behind f_e are constants, and P_e is linear in the tokens. So each forward adds its share as soon as the
counts of the whole step are known: from the forward itself where a process has one a step, else from a counting pass
over all of them before. All processes add their counts up. Over a micro-batch of few sequences the term would push each
sequence to use all experts alike (arXiv 2501.11873).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from perce.errors import UserError
from perce.model.auxiliary import OFF, Router, load_balance
from perce.training.arguments import PerceArguments


class StepBalance:
    """begin, where the counts of a step are known before it; then share, for each forward of it."""

    def __init__(self, router: Router, over_processes: Callable[[Tensor], Tensor]):
        self.router = router
        self._over_processes = over_processes
        self._to_come: list[Tensor] = []  # of each forward to come the counts of its step; empty: not counted before

    def begin(self, counts: list[Tensor]) -> None:
        """counts: (E,) of each forward of this process; none where there is one, which counts itself. Forgets a step
        that was given up midway."""
        self._to_come = [self._over_processes(torch.stack(counts).sum(0))] * len(counts) if counts else []

    def share(self, experts: Tensor) -> Tensor:
        """Of a forward, by its (2, E) expert_sums: what it adds to the load-balancing loss of the step, 0-d."""
        counts = self._to_come.pop() if self._to_come else self._over_processes(experts[0].detach())
        return load_balance(experts[1], counts, self.router.top_k)


def check_balancing(args: PerceArguments) -> None:
    """UserError for options under which the gradient of the load-balancing loss would be wrong, or not known."""
    if args.memory.branches_per_forward:
        raise UserError(
            "branches_per_forward: recomputes the forwards behind a persona, whose routers have been counted for the "
            f"load-balancing loss, which the model's config or --router_aux_loss_coef asks for. Leave it out. {OFF}"
        )
    if args.loss.normalize == "batch":
        raise UserError(
            "normalize=batch: scales the gradients at the end of a step, and those of the load-balancing loss, which "
            f"the model's config or --router_aux_loss_coef asks for, with them. Use --normalize sequence or none. {OFF}"
        )
