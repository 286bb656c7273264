"""What makes a forward of a few tokens cheap on a CPU.

model/prepare.py   prepare(), unprepare(), quantized_copy(): swap modules in place
model/layer.py     a decoder layer in two native calls, checked against the original; stack.py: all of them in one
model/linear.py    float32 linears for small batches; quantized_linear.py: exact ones of 8 or 4 bits;
                   gguf_modules.py: of a GGUF file's blocks
model/packing.py   which linears get packed weights, and where from; packed_file.py: those on disk
model/threads.py   calibrate_threads()
trees/             token_source.py: draws from scores; verification.py: trees verified;
                   cache_slots.py: slots of the cache moved; masks.py: what each token sees
native/            the C library, built, loaded and called; torch does the work where there is none
naive.py           what each kernel computes, in plain torch: the oracle of the tests
"""

from specdec.kernels.model.prepare import prepare, prepare_like, quantized_copy, unprepare
from specdec.kernels.model.prepared import prepared
from specdec.kernels.model.threads import calibrate_threads
from specdec.kernels.native import describe

__all__ = ["calibrate_threads", "describe", "prepare", "prepare_like", "prepared", "quantized_copy", "unprepare"]
