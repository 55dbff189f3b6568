"""`tinychat chat` and `tinychat ask`: settings in, a conversation out."""

from __future__ import annotations

import sys
from dataclasses import asdict

from tinychat.cli.config import Settings
from tinychat.cli.console import Screen, is_terminal, print_json
from tinychat.cli.loading import Loading, choose
from tinychat.runtime.errors import ConfigError


def talk(now: Settings, *, newest: bool = False, load: str | None = None) -> None:
    """Hold a conversation at the terminal, or with the lines of a pipe."""
    from tinychat.cli.commands import completions
    from tinychat.cli.filing import Keeper, welcome_back
    from tinychat.cli.keys import keys_here
    from tinychat.cli.loop import Chat
    from tinychat.cli.progress import millions
    from tinychat.cli.reading import PipeReader, Reader, TerminalReader, quiet_keyboard
    from tinychat.cli.saved import Journal, SavedChat, chats_folder, find_chat, saved_chats

    saved: SavedChat | None = None
    if newest and load:
        raise ConfigError("--continue and --load name two chats; give one of them.")
    if load:
        saved = find_chat(load)
    elif newest:
        chats = saved_chats()
        if not chats:
            raise ConfigError("There is no saved chat to continue yet; start one: tinychat chat.")
        saved = chats[0]
    info = choose(now["ckpt"])
    system = now["system"] or None
    if saved is not None and now.values["system"].source != "--system":
        system = saved.system
    loading = Loading(info, now.sampling, system)
    interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    screen = Screen(interactive, render=now["render"])
    # A pipe's chat is kept when that was asked for.
    asked = saved is not None or now.values["save"].source == "--save"
    journal = Journal(chats_folder()) if now["save"] and (interactive or asked) else None
    if saved is not None:
        loading.messages = saved.messages
        if journal is not None:
            journal.take_up(saved)
    screen.note(f"{info.path.name}: {info.stage}, {millions(info.parameters)}")
    if info.stage == "base":
        screen.note("a base model goes on with text; it was not taught to answer")
    if interactive:
        history = chats_folder().parent / "history" if now["save"] else None
        reader: Reader = TerminalReader(loading, completions, history)
    else:
        reader = PipeReader()
    chat = Chat(loading, reader, screen)
    chat.journal = journal
    chat.on_turn = Keeper(chat)
    if saved is not None:
        welcome_back(chat, saved)
    try:
        if not interactive:
            chat.run()
            return
        chat.keys = keys_here(screen.out)
        screen.note("/help lists the commands, Ctrl-D leaves")
        screen.space()
        with quiet_keyboard():
            chat.run()
    finally:
        if chat.journal is not None:
            chat.journal.leave()


def ask_once(question: str, now: Settings, as_json: bool) -> None:
    """Print one reply."""
    from tinychat.cli import loading

    info = choose(now["ckpt"])
    session = loading.open_session(info, now.sampling, now["system"] or None)
    pieces = session.reply(question)
    if not as_json:
        Screen(interactive=is_terminal(sys.stdout), render=now["render"]).reply(pieces)
        return
    for _ in pieces:
        pass
    assert session.last is not None
    answer = {
        "reply": session.last.text.strip(),
        "tokens": session.last.written,
        "seconds": round(session.last.seconds, 3),
        "ended": session.last.ended,
        "checkpoint": str(info.path),
        "sampling": asdict(session.sampling),
    }
    print_json(answer)
