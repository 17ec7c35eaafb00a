"""The head of every file that a result is saved in: JSON that says what it is and of which version."""

import json
from typing import Any

__all__ = ["saved_content"]


def saved_content(text: str, *, what: str, format: str, version: int) -> dict[str, Any]:
    """What a file holds below its head. 读取结果文件的内容。

    Args:
        text: JSON, an object with ``format`` and ``version`` among its fields.
        what: The result in words, for errors, such as ``"a report"``.
        format: The format it must be of.
        version: The version it must be of.

    Returns:
        The other fields.

    Raises:
        ValueError: If the text is no JSON, something else or of another version.

    Examples:
        >>> saved_content('{"format": "mine", "version": 1, "eps": 0.1}', what="a result", format="mine", version=1)
        {'eps': 0.1}
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} must be JSON ({error}); the file is damaged or something else") from error
    if not isinstance(content, dict) or content.pop("format", None) != format:
        raise ValueError(f"not {what}: the text must be an object of format {format!r}")
    found = content.pop("version", None)
    if found != version:
        raise ValueError(f"not {what} of this release: version must be {version}, got {found}; update sj_robust")
    return content
