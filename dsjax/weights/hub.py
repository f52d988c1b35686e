"""Names on the Hugging Face Hub, where a path may stand too."""

from __future__ import annotations

import re
from pathlib import Path as FilePath

from dsjax.config.model import require_folder

# A repository of the Hub: "deepseek-ai/DeepSeek-V2-Lite".
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(path_or_hub_name: str | FilePath) -> FilePath:
    """Returns a path as it is, and of a Hub name the folder it was downloaded to.

    Raises:
        FileNotFoundError: it is neither, or the Hub does not give it.
        ValueError: it is the address of a bucket.
    """
    require_folder("path", str(path_or_hub_name))
    path = FilePath(path_or_hub_name).expanduser()
    name = str(path_or_hub_name)
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise FileNotFoundError(f"{path}: no such folder, and no name on the Hugging Face Hub")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return FilePath(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name}: no such folder, and not to be had from the Hugging Face Hub: {first_line}"
        ) from None
