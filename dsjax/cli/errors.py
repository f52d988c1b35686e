"""What a user can mend is one line, not a traceback: of the commands and of the scripts."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with one line where its body fails; DSJAX_TRACEBACK=1 shows all of it."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("DSJAX_TRACEBACK"):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
            text = f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
        first, *rest = text.strip().splitlines() or [type(error).__name__]
        more = " (DSJAX_TRACEBACK=1 shows all of it)" if rest else ""
        print(f"error: {first}{more}", file=sys.stderr)
        sys.exit(2)
