"""Text encoders in JAX: packed, sharded, resumable, small enough to read.

`__init__.pyi` lists the public names. Each is imported when it is first used, so that a process that only makes batches
or tokenizes text starts without JAX.
"""

import lazy_loader

from flax_encoder.moved import find_moved

find_moved()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
