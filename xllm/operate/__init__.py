"""Commands for operators: `xllm top`, `xllm cluster`, `xllm cache …`, `xllm drain`.

They talk to the operator port of any master over HTTP, and know nothing of roles:

    command_line.py    arguments to calls, answers to text or JSON, the exit code
    operator_client.py HTTP, TLS and the key
    tables.py          answers as tables for people
    top.py             the cluster in a terminal, again and again
"""
