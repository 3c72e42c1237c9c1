"""The block cache: what a block is, where blocks live, and who may move them."""
