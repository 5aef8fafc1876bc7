"""What the op costs on a GPU: predicted, then measured by two commands, `make gpu-a` and `make gpu-b`.

roofline.py   what each part should cost, from counted operations and bytes
decide.py     gpu-a: its stages and their time          compare.py   gpu-b
command.py    what both share: options, wheels, tables
supervise.py  stages in processes under time limits     results.py   their lines, in a file after each
child.py      what a process is asked and says          clock.py     CUDA events and the allocator's peak
training.py   perce.train itself                        compile.py   all kernels, in parallel processes
parts.py      products and kernels by themselves        tiles.py     named block sizes of a kernel
race.py       whole losses, compared and timed in turn  peers.py     libraries, each composed into PerCE
steps.py      training steps of a large model           suite.py     the GPU tests
wheels.py     what a machine without a network lacks    schedule.py  whether it all fits the time
tables.py     README's and docs' tables from the lines  sizes.py     N, D, V
"""

import time

STARTED = time.monotonic()
"""When this process began, before it imported torch: the commands' time counts from here."""
