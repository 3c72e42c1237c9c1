"""Every error that xllm raises on purpose.

    XllmError
    ├── ConfigError              exit code 2: a flag, a file or a model that cannot work
    ├── EtcdUnavailable          exit code 3: no etcd endpoint answered in time
    ├── RequestError             reaches the client as OpenAI's error object
    │   ├── InvalidRequest       400   names the parameter
    │   ├── Unauthorized         401   no API key, or one that is none
    │   ├── UnknownModel         404
    │   ├── BodyTooLarge         413
    │   ├── Overloaded           429   with Retry-After
    │   ├── RateLimited          429   likewise: the API key's own limit
    │   ├── EngineFault          500
    │   ├── NoWorker             503
    │   ├── WorkerLost           503
    │   └── DeadlineExceeded     504
    └── CacheMiss                never reaches a client: whoever catches it recomputes
        ├── CorruptBlock
        ├── PeerUnavailable
        ├── StoreUnavailable
        └── TierIOError

`label` is the value of the `label` dimension in metrics, so it comes from this closed set.
`retryable` means that the same request may succeed elsewhere or later.
Foreign exceptions (grpc, OSError, aiohttp) are mapped at the border of the module that
meets them and do not travel further.
"""

from __future__ import annotations

from typing import ClassVar


class XllmError(Exception):
    """Base of all errors raised on purpose."""

    label: ClassVar[str] = "internal"


class ConfigError(XllmError):
    """What the operator asked for cannot work; the message says what to change."""

    label = "config"


class EtcdUnavailable(XllmError):
    """No etcd endpoint answered in time."""

    label = "etcd_unavailable"


class RequestError(XllmError):
    """A request failed; `http_status` and the message are shown to the client."""

    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(RequestError):
    """The request can never work as it is; `param` names the field."""

    label = "invalid_request"
    http_status = 400


class Unauthorized(RequestError):
    """The request has no API key, or one that this server does not know."""

    label = "unauthorized"
    http_status = 401

    def __init__(self, message: str, *, code: str | None = None) -> None:
        """`code`: OpenAI's, of the error object."""
        super().__init__(message)
        self.code = code


class UnknownModel(RequestError):
    """No worker serves the model that was asked for."""

    label = "unknown_model"
    http_status = 404


class BodyTooLarge(RequestError):
    """The request body is over `--max_body_size`."""

    label = "body_too_large"
    http_status = 413


class Overloaded(RequestError):
    """Too much is running already; try again after `retry_after_s`."""

    label = "overloaded"
    http_status = 429
    retryable = True


class RateLimited(RequestError):
    """The API key has used up its share of requests or tokens."""

    label = "rate_limited"
    http_status = 429
    retryable = True

    def __init__(self, message: str, *, kind: str, retry_after_s: int) -> None:
        """`kind`: of which there were too many: requests or tokens."""
        super().__init__(message, retry_after_s=retry_after_s)
        self.kind = kind


class EngineFault(RequestError):
    """The engine failed while it ran this request: our defect."""

    label = "engine_fault"
    http_status = 500


class NoWorker(RequestError):
    """No worker can serve this model at the moment."""

    label = "no_worker"
    http_status = 503
    retryable = True


class WorkerLost(RequestError):
    """The worker died while it ran this request, and no other could take it over."""

    label = "worker_lost"
    http_status = 503
    retryable = True


class DeadlineExceeded(RequestError):
    """The request ran out of time."""

    label = "deadline_exceeded"
    http_status = 504
    retryable = True


class CacheMiss(XllmError):
    """A cached block could not be had: the tokens are computed instead."""

    label = "cache_miss"


class CorruptBlock(CacheMiss):
    """A block's bytes do not match its checksum."""

    label = "corrupt_block"


class PeerUnavailable(CacheMiss):
    """A peer did not deliver a block in time."""

    label = "peer_unavailable"


class StoreUnavailable(CacheMiss):
    """The shared store did not answer, or its client has failed."""

    label = "store_unavailable"


class TierIOError(CacheMiss):
    """A tier's medium failed."""

    label = "tier_io"


REQUEST_ERRORS: dict[str, type[RequestError]] = {
    error.label: error
    for error in (
        InvalidRequest,
        UnknownModel,
        BodyTooLarge,
        Overloaded,
        EngineFault,
        NoWorker,
        WorkerLost,
        DeadlineExceeded,
    )
}
"""By label: how an error that crossed a process border is raised again."""
