"""Choosing a checkpoint, checking it, and loading it while the user is still typing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tinychat.data.records import Message
from tinychat.runtime.checkpoint import CheckpointInfo, find, read_info
from tinychat.runtime.errors import CheckpointError
from tinychat.runtime.search import find_first

if TYPE_CHECKING:
    from tinychat.cli.session import ChatSession

PREFERRED = ("rlhf", "sft", "base")


def choose(name: str | None) -> CheckpointInfo:
    """The named checkpoint, or (for none) the best that is there. Reads its header only; no torch.

    Raises CheckpointError when there is none, or when it cannot hold a conversation.
    """
    info = read_info(find(name)) if name else _best()
    if info.stage == "reward":
        raise CheckpointError(
            f"{info.path.name} is a reward model: it scores replies and cannot chat; "
            f"use {_instead(info)} instead."
        )
    return info


def _best() -> CheckpointInfo:
    if path := find_first(*PREFERRED):
        return read_info(path)
    raise CheckpointError(
        "No checkpoint to chat with was found (rlhf, sft or base): "
        "name one with --ckpt FILE, or make one with `tinychat train`."
    )


def _instead(info: CheckpointInfo) -> str:
    for name in PREFERRED:
        beside = info.path.with_name(f"{name}.safetensors")
        if beside.exists():
            return str(beside)
    try:
        return str(_best().path)
    except CheckpointError:
        return "an rlhf or sft checkpoint"


class Loading:
    """A chat session that is being made in the background.

    torch takes over a second to import; a person takes longer to type a question. `start` begins
    the work, `session` waits for it and raises what it raised.
    """

    def __init__(
        self, info: CheckpointInfo, settings: Mapping[str, Any], system: str | None = None
    ) -> None:
        self.info = info
        self.settings = dict(settings)
        self.system = system
        self.messages: list[Message] = []
        "what the conversation begins with"
        self.on_end: Callable[[], None] = lambda: None
        self.error: BaseException | None = None
        self._session: ChatSession | None = None
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """True while the thread works; a process must not end in the middle of that."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._load, daemon=True, name="loading")
            self._thread.start()

    def session(self) -> ChatSession:
        """The session, waited for. Raises whatever stopped it from loading."""
        self.start()
        assert self._thread is not None
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self._session is not None
        return self._session

    def _load(self) -> None:
        try:
            session = open_session(self.info, self.settings, self.system)
            session.messages = list(self.messages)
            self._session = session
        except BaseException as error:  # raised again by session(), in the main thread
            self.error = error
        self.on_end()


def open_session(
    info: CheckpointInfo, settings: Mapping[str, Any], system: str | None = None
) -> ChatSession:
    """Load the weights and begin a conversation. Imports torch."""
    from tinychat.cli.session import ChatSession
    from tinychat.generation import Sampling
    from tinychat.gpt import load_model
    from tinychat.runtime.device import pick_device, set_threads

    set_threads()
    sampling = Sampling(**settings)
    model, tokenizer, _ = load_model(info.path)
    model = model.to(pick_device())
    return ChatSession(model, tokenizer, sampling, model.config.context, system)
