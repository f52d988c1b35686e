"""`GET /`: the chat page, one file that takes nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

_FOLDER = Path(__file__).with_name("chat_page")
_SCRIPTS = ("words.js", "markdown.js", "view.js", "chat.js")


def add_page(app: FastAPI) -> None:
    """Adds the route of the page; it is no part of the API's document."""
    content, headers = chat_page()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(content, headers=headers)


def chat_page() -> tuple[bytes, dict[str, str]]:
    """Returns the page, and headers that let a browser run its own script and no other."""
    script = "\n".join(_read(name) for name in _SCRIPTS)
    style = _read("style.css")
    html = _read("index.html").replace("{style}", style).replace("{script}", script)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return html.encode(), {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
