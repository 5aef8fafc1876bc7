"""Fine-tuning: a transformers.Trainer whose step is two forward passes and one fused loss.

trainer        the step, the E-step, evaluation          arguments      PerceArguments, and how options become it
loader         batches under a token budget, streams     sampler        which sequences make a batch
checks         refusals before the first step            fits           whether the largest batch fits the device
parallel       several devices                           normalizer     token weights of mean 1 over a step
estimates      token weights of an E-step, kept          meters         seconds, token statistics, peak memory
checkpoints    writes and finds whole checkpoints        interruption   signals: the step is finished and saved
run_directory  claims and resumes a directory            summary        a run's output: lines, report, table
serving        template and end of turn that are saved   card           the model card
diagnosis      what the numbers of a run mean, in words
"""
