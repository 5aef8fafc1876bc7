"""Libraries' chatter, turned down for a command line: their warnings stay, their progress bars for loading do not."""


def quiet_libraries() -> None:
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
