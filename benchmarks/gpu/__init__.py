"""The cost of the op on a GPU: predicted, then measured by two commands, `make gpu-a` and `make gpu-b`.

roofline.py   predicted cost of each part, from counted operations and bytes
decide.py     gpu-a: its stages and their time          compare.py   gpu-b
command.py    what both share: options, wheels, tables
supervise.py  stages in processes under time limits     results.py   measured lines, saved one by one
child.py      a measuring process and its messages      clock.py     CUDA events and the allocator's peak
training.py   perce.train itself                        compile.py   all kernels, in parallel processes
parts.py      single products and kernels               tiles.py     named block sizes of a kernel
race.py       whole losses, compared and timed in turn  peers.py     libraries, each composed into PerCE
steps.py      training steps of a large model           suite.py     the GPU tests
wheels.py     packages for a machine without a network  schedule.py  whether all stages fit into the time
tables.py     README's and docs' tables from the lines  sizes.py     N, D, V
"""

import time

STARTED = time.monotonic()
"""When this process began, before it imported torch: the time limits of the commands count from here."""
