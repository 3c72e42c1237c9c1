"""What a process keeps to its end is left out of garbage collection.

Modules, models and compiled validators are hundreds of thousands of objects. A full collection
looks at each of them, for tens of milliseconds in which no token gets out.
"""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """To be called once, when start-up is over."""
    gc.collect()
    gc.freeze()
