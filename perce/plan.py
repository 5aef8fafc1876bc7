"""python -m perce.plan: the memory and time of a training step, before a GPU is spent on it.

config.json → the model without data → a rehearsed step (memory by phase) and its operations (time) → what fits, and
what each option saves or costs. No weights are read.
"""

import sys

from perce.config.commands import PLAN, PlanOptions
from perce.files.outputs import check_writable, write_json
from perce.visible import say


def run(options: PlanOptions) -> None:
    """Plan, print, and write the JSON."""
    check_writable(options.step.json)
    from perce.planning.plans import make_plan
    from perce.planning.tables import print_plan, to_json

    plan = make_plan(options)
    print_plan(plan)
    if options.step.json:
        write_json(options.step.json, to_json(plan))
        say(f"written  {options.step.json}")


main = PLAN.main(run)

if __name__ == "__main__":
    sys.exit(main())
