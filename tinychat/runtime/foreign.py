"""What a file is that is not a sound checkpoint, in one sentence that a user can act on."""

from pathlib import Path

from tinychat.runtime.errors import CheckpointError


def damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({what}): copy or download it again, or make it anew by training."
    )


def not_safetensors(path: Path, head: bytes, size: int, length: int) -> CheckpointError:
    """What a file is whose first bytes are `head`, and what to do about it.

    `size`: of the file, in bytes. `length`: of the header, had it been one.
    """
    if not size:
        return CheckpointError(f"{path} is empty: copy or download it again.")
    if head.startswith(b"PK\x03\x04"):
        what = "a zip archive (what torch.save writes), which may hold code that runs on loading"
    elif head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head[8:9] != b"{":
        what = "a Python pickle, which may hold code that runs on loading"
    elif head.startswith(b"GGUF"):
        what = "a GGUF file"
    elif head.startswith(b"version https://git-lfs"):
        return CheckpointError(
            f"{path} is only a Git LFS pointer to the real file: run git lfs pull."
        )
    elif _is_text(head):
        what = "a text file"
    elif head[8:9] == b"{" or size <= 8:
        # It begins as it should, so the end is what it lacks.
        return damaged(path, f"truncated: {size:,} bytes, its header alone needs {length + 8:,}")
    else:
        what = "something else"
    return CheckpointError(
        f"{path} is {what}, not a safetensors file: name a .safetensors file that tinychat wrote."
    )


def _is_text(head: bytes) -> bool:
    try:
        text = head[: max(1, len(head) - 3)].decode("utf-8")  # the cut may split a letter
    except UnicodeDecodeError as error:
        if error.start < len(head) - 7:
            return False
        text = head[: error.start].decode("utf-8")
    return all(letter.isprintable() or letter in "\t\r\n\f" for letter in text)
