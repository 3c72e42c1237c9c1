"""The decoder in our own C++: `src/` built on first use, called through ctypes.

build.py     sources -> a shared library in the cache folder, for this machine's instruction set
native.py    the library's C ABI (src/api.h): structures, functions, memory
decoder.py   a whole model on top of it: `Decoder` of kernels/interface.py
"""
