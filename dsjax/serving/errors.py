"""What a client is told where something is wrong, in the form of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FIELD = re.compile(r"([a-z_]\w*(?:\.\w+|\[\d+\])*)(?:=| must|: )", re.IGNORECASE)


class RequestError(Exception):
    """A request that is refused or has failed.

    Attributes:
        status: of HTTP.
        message: one line for the client.
        kind: OpenAI's `type`.
        param: the field that is to blame.
        code: OpenAI's `code`.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or _KINDS.get(status) or _kind_of(status)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """Returns the body of the answer."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def _kind_of(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


def bad_field(param: str, reason: str, code: str | None = None) -> RequestError:
    """Returns the refusal of one field of a request."""
    return RequestError(400, f"{param}: {reason}", param=param, code=code)


def refused(error: ValueError) -> RequestError:
    """Returns the refusal that a ValueError means; the field that its line begins with is named."""
    text = " ".join(str(error).split())
    found = _FIELD.match(text)
    return RequestError(400, text, param=found.group(1) if found else None)
