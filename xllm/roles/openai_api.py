"""The public HTTP API: how a role serves it.

    runner = make_runner(build_app(backend, config, metrics))
    await runner.setup()
    await web.TCPSite(runner, host, port).start()

`make_runner` matters: with it a client that goes away cancels its generation at once.
What is inside is told by `xllm/roles/api/__init__.py`.
"""

from __future__ import annotations

from xllm.roles.api.app import build_app, make_runner

__all__ = ["build_app", "make_runner"]
