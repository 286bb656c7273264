"""What makes a forward of a few tokens cheap on a CPU.

prepare.py      prepare(), unprepare(), quantized_copy(): swap modules in place
layer.py        a decoder layer in two native calls, checked against the original
linear.py       the two linears: exact int8, and float32 for small batches
weight_readers.py   the linears that have to stay float
persistence.py  what an int8 model refuses, and how it is pickled
changes.py      whether a model has changed since something was made of it
naive.py        what each kernel computes, in plain torch: the oracle of the tests
draws.py        draws from scores; growth.py: trees grown; verification.py: trees verified; slots.py: cache slots moved
native.py       loads and calls the C library in native/, which build.py builds; torch does the work where there is none
threads.py      calibrate_threads()
"""

from specdec.kernels.native import describe
from specdec.kernels.prepare import prepare, prepare_like, prepared, quantized_copy, unprepare
from specdec.kernels.threads import calibrate_threads

__all__ = ["calibrate_threads", "describe", "prepare", "prepare_like", "prepared", "quantized_copy", "unprepare"]
