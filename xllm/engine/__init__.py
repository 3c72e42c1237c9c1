"""The inference engine of a worker: scheduling, the decoder, and its kernels."""
