"""The oracle's outputs, how they are made, and how the engine is held against them."""
