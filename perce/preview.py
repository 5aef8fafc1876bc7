"""python -m perce.preview: how training would read a dataset, shown before any training.

rows of all splits → format and counts → a sample of pairs → lengths, what is trimmed, shared, refused → both prompts
"""

import sys

from perce.config.commands import PREVIEW, PreviewOptions


def run(options: PreviewOptions) -> None:
    """Read the rows, make pairs of a sample, and print."""
    from perce.data.preview import print_preview
    from perce.demo import default_model_path
    from perce.hub import base_of_adapter, tokenizer_of

    model = options.preview.model or str(default_model_path())
    print_preview(options, tokenizer_of(model, base_of_adapter(model)))


main = PREVIEW.main(run)

if __name__ == "__main__":
    sys.exit(main())
