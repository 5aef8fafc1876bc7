"""python -m perce.compare: two methods, each by the results of one or several trained models.

results of perce.evaluate → means over the results of a side → differences over users, and their spread over results
"""

import sys

from perce.config.commands import COMPARE, CompareOptions
from perce.files.outputs import check_writable, write_json
from perce.visible import say


def run(options: CompareOptions) -> None:
    """Read, compare, write and print. Neither torch nor transformers is loaded."""
    from perce.measuring.comparison import check_sides, compare, print_comparison, print_means, read_result

    output = options.compare.output
    check_writable(output)
    sides = {
        option: {path: read_result(option, path) for path in paths} for option, paths in options.compare.sides.items()
    }
    check_sides(sides)
    comparison = compare(*sides.values())
    if output:
        write_json(output, {"kind": "perce.compare", **comparison})
    print_means(comparison)
    print_comparison(comparison)
    if output:
        say(f"written  {output}")


main = COMPARE.main(run)

if __name__ == "__main__":
    sys.exit(main())
