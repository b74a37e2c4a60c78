"""The folder of a Hugging Face checkpoint, and its text files."""

import json
from pathlib import Path
from typing import Any

FILES = ["*.json", "model*.safetensors", "*.model", "merges.txt", "*.jinja"]
"""The files that are read from the hub: weights, configs, and the tokenizer's files."""


def checkpoint_folder(path_or_name: str | Path) -> Path:
    """The folder of a checkpoint; a name on the hub is fetched. Raises FileNotFoundError or ValueError."""
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; a checkpoint is a folder with config.json and model.safetensors")
    name = str(path_or_name)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise FileNotFoundError(f"there is no folder {folder} (and names on the hub are owner/model)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{name} is no folder here, and could not be had from the hub: {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A file's object. Raises FileNotFoundError or ValueError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
