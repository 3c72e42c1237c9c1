"""`python -m xllm` is the `xllm` command."""

from xllm.main import main

main()
