"""What must not be: code made of data, files named by strangers, requests that harm others."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import xllm
from xllm.chat_template import ChatTemplate
from xllm.engine.limits import check_request
from xllm.errors import ConfigError, InvalidRequest
from xllm.protocol import GenerateRequest, SamplingParams

ROOT = Path(xllm.__file__).parent
MESSAGES = [{"role": "user", "content": "hi"}]

CODE_FROM_DATA = {
    *("eval", "exec", "compile", "pickle", "marshal", "shelve", "dill", "yaml", "__import__"),
    *("torch.load", "numpy.load", "np.load", "os.system", "os.popen"),
}


def names_in(tree: ast.AST) -> Iterator[str]:
    """Called or imported, with one module before it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Name):
                yield f"{node.func.value.id}.{node.func.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            yield "shell="


def test_no_module_makes_code_of_data() -> None:
    assert {"eval", "np.load"} <= set(names_in(ast.parse("eval(x); np.load(y)")))
    for path in ROOT.rglob("*.py"):
        found = set(names_in(ast.parse(path.read_text())))
        assert not found & (CODE_FROM_DATA | {"shell="}), path


def test_nothing_that_answers_requests_opens_files() -> None:
    """So no request can name one: only flags do."""
    opens = {"open", "Path", "os.open", "os.path", "shutil", "tempfile", "pathlib"}
    folders = [*(ROOT / "roles" / "api").glob("*.py"), ROOT / "roles" / "frames.py"]
    ports = [ROOT / "roles" / f"{name}_port.py" for name in ("cache", "route", "cluster")]
    for path in (*folders, *ports, ROOT / "cache" / "peer_wire.py", ROOT / "protocol.py"):
        assert not set(names_in(ast.parse(path.read_text()))) & opens, path


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ().__class__.__base__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ '%s'.__mod__ }}{{ ''.__class__.__name__.upper() }}",
        "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
        "{% set _ = messages[0].update({'content': 'changed'}) %}",
        "{% set _ = messages.clear() %}",
        "{{ range(10**9)|list|length }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ lipsum.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
    ],
)
def test_no_template_gets_out_of_its_sandbox(source: str) -> None:
    messages = [dict(message) for message in MESSAGES]
    try:
        rendered = ChatTemplate(source).render(messages, {})
    except (InvalidRequest, ConfigError):
        rendered = ""
    # What is forbidden is undefined, which is empty, or an error.
    assert "class" not in rendered
    assert "function" not in rendered
    assert "root:" not in rendered
    assert messages == MESSAGES


def test_variables_of_a_request_are_only_data() -> None:
    source = "{{ x.__class__ }}{{ x.y }}{{ x }}"
    assert ChatTemplate(source).render(MESSAGES, {"x": {"y": "{{ 7*7 }}"}}).startswith("{{ 7*7 }}")


def changed(**fields: object) -> GenerateRequest:
    request = GenerateRequest(
        request_id="r", model_id="m", prompt_ids=[1, 2], sampling=SamplingParams()
    )
    return msgspec.structs.replace(request, **fields)


def sampled(**fields: object) -> GenerateRequest:
    return changed(sampling=msgspec.structs.replace(SamplingParams(), **fields))


@pytest.mark.parametrize(
    "make",
    [
        lambda: changed(prompt_ids=[]),
        lambda: changed(prompt_ids=[100]),
        lambda: changed(prompt_ids=[-1]),
        lambda: changed(output_ids=[100]),
        lambda: changed(output_ids=[-1]),
        lambda: changed(output_ids=[1] * 17),
        lambda: changed(n=0),
        lambda: changed(n=2**31),
        lambda: changed(index=-1),
        lambda: changed(index=2**40),
        lambda: sampled(max_tokens=2**40),
        lambda: sampled(temperature=float("nan")),
        lambda: sampled(temperature=-1.0),
        lambda: sampled(top_p=float("inf")),
        lambda: sampled(repetition_penalty=0.0),
        lambda: sampled(logit_bias={100: 1.0}),
        lambda: sampled(logit_bias={1: float("nan")}),
        lambda: sampled(logprobs=10**6),
        lambda: sampled(prompt_logprobs=-1),
    ],
)
def test_a_worker_takes_nothing_that_would_harm_its_other_requests(
    make: Callable[[], GenerateRequest],
) -> None:
    check_request(changed(), 64, 100)
    with pytest.raises(InvalidRequest):
        check_request(make(), 64, 100)
