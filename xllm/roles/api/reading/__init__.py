"""How a model's text is read: what of it are thoughts, what calls of tools, and what the answer.

    Sample ──text──> ChatReader ──> ThoughtSplitter ──> ToolReader of the model's notation ──> Part

One module per notation; each can also write the grammar that forces it. Which one a model uses is
chosen by its chat template (`notations.py`).
"""
