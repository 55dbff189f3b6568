"""Settings and where each comes from: default, file, TINYCHAT_ variables, flags. No torch."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from tinychat.cli.errors import nearest
from tinychat.runtime.errors import ConfigError

RANDOM = "random"
"the seed that is another one each time"
_SWITCH = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


@dataclass(frozen=True)
class Option:
    """One setting: its name, what it may be, and how it is read from text."""

    name: str
    kind: type
    default: Any
    wanted: str
    "what it must be, to end the sentence `temperature is hot; it must be ...`"
    holds: Callable[[Any], bool]
    help: str
    live: bool = True
    "whether /set changes it in a running chat"

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "TINYCHAT_" + self.name.upper()

    def parse(self, text: str, label: str) -> Any:
        """The value that a text means. Raises ConfigError that begins with `label`."""
        value: Any = text
        try:
            if self.kind is bool:
                value = _SWITCH[text.lower()]
            elif not (self.name == "seed" and text == RANDOM):
                value = self.kind(text)
        except (ValueError, KeyError):
            raise self._refuse(label, text) from None
        return self.check(value, label, shown=text)

    def check(self, value: Any, label: str, shown: Any = None) -> Any:
        """A value that has a type already, as TOML's have; a float setting takes an int."""
        kinds = (float, int) if self.kind is float else (self.kind,)
        random = self.name == "seed" and value == RANDOM
        fits = isinstance(value, kinds) and (isinstance(value, bool) == (self.kind is bool))
        if not random and not (fits and self.holds(value)):
            raise self._refuse(label, shown if shown is not None else repr(value))
        return float(value) if self.kind is float else value

    def _refuse(self, label: str, shown: Any) -> ConfigError:
        return ConfigError(f"{label} is {shown}; it must be {self.wanted}.")


OPTIONS = {
    option.name: option
    for option in (
        Option(
            "ckpt", str, "", "the name or file of a checkpoint", bool,
            "Which checkpoint: rlhf, sft, base, a run's name or a .safetensors file.", live=False,
        ),
        Option(
            "temperature", float, 0.5, "a number from 0 up", lambda n: 0 <= n < inf,
            "Below 1 surer, above 1 wilder; 0 always takes the likeliest token.",
        ),
        Option(
            "top_k", int, 0, "a whole number from 0 up", lambda n: n >= 0,
            "Choose among the N likeliest tokens; 0 is off.",
        ),
        Option(
            "top_p", float, 0.95, "a number above 0 and at most 1", lambda n: 0 < n <= 1,
            "Choose among the likeliest tokens that together have this probability; 1 is off.",
        ),
        Option(
            "min_p", float, 0.0, "a number from 0 to 1", lambda n: 0 <= n <= 1,
            "Drop tokens below this share of the likeliest one's probability; 0 is off.",
        ),
        Option(
            "repetition_penalty", float, 1.0, "a number above 0", lambda n: 0 < n < inf,
            "Above 1, tokens of this reply come again less often; 1 is off.",
        ),
        Option(
            "seed", int, RANDOM, "a whole number from 0 up, or random", lambda n: 0 <= n < 2**63,
            "The same seed gives the same conversation.",
        ),
        Option(
            "drafts", int, 8, "a whole number from 1 to 64", lambda n: 1 <= n <= 64,
            "Write each sentence N times side by side and say the one that the model is surest "
            "of; with 1, words appear as they are chosen.",
        ),
        Option(
            "max_tokens", int, 200, "a whole number from 1 up", lambda n: n >= 1,
            "The longest reply, in tokens.",
        ),
        Option(
            "system", str, "", "a text", lambda _: True,
            "A system message: who the model should be.", live=False,
        ),
        Option(
            "render", str, "auto", "auto, markdown or plain",
            lambda text: text in ("auto", "markdown", "plain"),
            "How replies are drawn; auto draws Markdown on a terminal.",
        ),
        Option(
            "save", bool, True, "true or false", lambda _: True,
            "Keep each chat in the user's data folder.", live=False,
        ),
    )
}  # fmt: skip
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "drafts", "max_tokens", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    value: Any
    source: str
    "default, the file's path, the variable's name, or the flag"


class Settings:
    """All settings with their sources. `settings["top_k"]` is a value."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self.values[name].value

    @property
    def sampling(self) -> dict[str, Any]:
        """What generation.Sampling takes."""
        return {name: None if self[name] == RANDOM else self[name] for name in SAMPLING}


def config_path() -> Path:
    """The file that settings are read from; it need not exist."""
    from platformdirs import user_config_dir

    named = os.environ.get("TINYCHAT_CONFIG")
    return (
        Path(os.path.expanduser(named))
        if named
        else Path(user_config_dir("tinychat")) / "config.toml"
    )


def flags_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a command was given for the settings, out of all its parameters by name."""
    return {name: parameters[name] for name in OPTIONS if name in parameters}


def settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Every setting by rising priority: default, file, variable, flag (None: not given).

    Raises ConfigError, in one sentence, for a key, a value or a file that cannot be used.
    """
    values = {name: Value(option.default, "default") for name, option in OPTIONS.items()}
    values |= _from_file(config_path())
    for name, option in OPTIONS.items():
        if text := os.environ.get(option.variable):
            values[name] = Value(option.parse(text, option.variable), option.variable)
    for name, value in (flags or {}).items():
        if value is not None:
            values[name] = Value(value, OPTIONS[name].flag)
    return Settings(values)


def _from_file(path: Path) -> dict[str, Value]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        entries = tomllib.loads(text)
    except FileNotFoundError:
        if os.environ.get("TINYCHAT_CONFIG"):
            raise ConfigError(
                f"TINYCHAT_CONFIG is {path}, which does not exist; create it or unset the variable."
            ) from None
        return {}
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; make it a file that you may read, or name another with "
            "TINYCHAT_CONFIG."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 (byte {error.start + 1}); save it as UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        reason = str(error)
        raise ConfigError(
            f"{path} is not TOML: {reason[:1].lower()}{reason[1:]}; a line looks like "
            'temperature = 0.5 or render = "plain".'
        ) from None
    found = {}
    for key, value in entries.items():
        if key not in OPTIONS:
            hint = nearest(key, OPTIONS)
            raise ConfigError(
                f"{path}: there is no setting {key!r} (it is set to {value!r});"
                f"{hint.lower().rstrip('?') + '?' if hint else ''} known are {', '.join(OPTIONS)}."
            )
        found[key] = Value(OPTIONS[key].check(value, f"{path}: {key}"), str(path))
    return found


def shown(value: Any) -> str:
    """A value as a person would write it in the file."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_settings(as_json: bool) -> None:
    """Print every setting, its value and where the value comes from."""
    now, path = settings(), config_path()
    if as_json:
        import json

        rows = {name: {"value": v.value, "from": v.source} for name, v in now.values.items()}
        print(json.dumps({"file": str(path), "exists": path.exists(), "settings": rows}))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("setting", Column("value", overflow="fold"), Column("from", overflow="fold"))
    for name, entry in now.values.items():
        unset = "the best that is there" if name == "ckpt" else "none"
        value = Text(shown(entry.value)) if entry.value != "" else Text(unset, style="dim")
        source = Text(entry.source, style="dim" if entry.source == "default" else "")
        table.add_row(name, value, source)
    console = Console()
    console.print(table)
    state = "" if path.exists() else " (not there yet)"
    console.print(Text(f"file: {path}{state}"), soft_wrap=True)
