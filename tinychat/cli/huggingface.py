"""`tinychat export`: a checkpoint as a folder that transformers, vLLM and llama.cpp can read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinychat.cli.card import all_texts, figures, sources
from tinychat.cli.errors import nearest
from tinychat.cli.flags import checkpoint_names
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from tinychat.gpt import GPTConfig
    from tinychat.runtime.checkpoint import CheckpointInfo
    from tinychat.tokenizer import Tokenizer

FORMATS = ("hf",)
# The names of our weights, and those that Qwen3 has in transformers.
NAMES = {
    "embed.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    "attention_norm.": "input_layernorm.",
    "feed_forward_norm.": "post_attention_layernorm.",
    "attention.q.": "self_attn.q_proj.",
    "attention.k.": "self_attn.k_proj.",
    "attention.v.": "self_attn.v_proj.",
    "attention.out.": "self_attn.o_proj.",
    "attention.q_norm.": "self_attn.q_norm.",
    "attention.k_norm.": "self_attn.k_norm.",
    "feed_forward.gate.": "mlp.gate_proj.",
    "feed_forward.up.": "mlp.up_proj.",
    "feed_forward.down.": "mlp.down_proj.",
}
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Roles are system, user and assistant.') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def export_model(
    ckpt: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="A base, sft or rlhf checkpoint.",
            autocompletion=checkpoint_names,
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    kind: Annotated[
        str,
        typer.Option("--format", metavar="NAME", help="hf: a Hugging Face folder (float32)."),
    ] = "hf",
) -> None:
    """Write a checkpoint in a form that other programs read.

    The folder loads as Qwen3 in transformers and vLLM; llama.cpp's converter makes GGUF of it.
    """
    from tinychat.gpt import load_model
    from tinychat.runtime.checkpoint import find

    if kind not in FORMATS:
        hint = nearest(kind, FORMATS)
        raise ConfigError(f"There is no format {kind!r}.{hint} Known: {', '.join(FORMATS)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already and is not empty; name a new folder.")
    model, pieces, info = load_model(find(ckpt))
    write_folder(folder, model.config, model.state_dict(), pieces, info)
    size = sum(file.stat().st_size for file in folder.iterdir())
    typer.echo(f"{folder}: {size / 1e6:.1f} MB. Read it with transformers:")
    typer.echo(f'  AutoModelForCausalLM.from_pretrained("{folder.as_posix()}")')


def write_folder(
    folder: Path,
    config: GPTConfig,
    state: dict[str, Tensor],
    pieces: Tokenizer,
    info: CheckpointInfo,
) -> None:
    """Write all files beside `folder` first, so that a folder of that name is a whole one."""
    from tinychat.runtime import tensorfile

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        weights = {theirs(name): weight for name, weight in state.items()}
        tensorfile.write(beside / "model.safetensors", weights, {"format": "pt"})
        chats = info.stage != "base"
        for name, content in (
            ("config.json", model_config(config, pieces)),
            ("generation_config.json", generation_config(pieces)),
            ("tokenizer.json", fast_tokenizer(pieces)),
            ("tokenizer_config.json", tokenizer_config(config, chats)),
        ):
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (beside / name).write_text(text, encoding="utf-8")
        (beside / "tokenizer.model").write_bytes(pieces.model)  # for llama.cpp's converter
        (beside / "README.md").write_text(readme(info, folder.name), encoding="utf-8")
        beside.chmod(0o755)  # mkdtemp lets nobody else in
        if folder.exists():
            folder.rmdir()
        os.replace(beside, folder)
    except BaseException:  # a full disk, Ctrl-C
        shutil.rmtree(beside, ignore_errors=True)
        raise


def theirs(name: str) -> str:
    """Translate the name of one of our weights."""
    for ours, new in NAMES.items():
        name = name.replace(ours, new)
    return f"model.{name}" if name.startswith("norm.") else name


def model_config(config: GPTConfig, pieces: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        # transformers 4 and vLLM read the first, transformers 5 the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": pieces.bos_id,
        "eos_token_id": pieces.end_id,
        "pad_token_id": pieces.pad_id,
    }


def generation_config(pieces: Tokenizer) -> dict[str, Any]:
    """What `tinychat chat` does by default."""
    from tinychat.generation import Sampling, stop_ids

    usual = Sampling()
    return {
        "do_sample": True,
        "temperature": usual.temperature,
        "top_p": usual.top_p,
        "max_new_tokens": usual.max_tokens,
        "bos_token_id": pieces.bos_id,
        "eos_token_id": sorted(stop_ids(pieces) - {pieces.pad_id}),
        "pad_token_id": pieces.pad_id,
    }


def tokenizer_config(config: GPTConfig, chats: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "additional_special_tokens": [f"<|{role}|>" for role in ROLES],
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }
    return record | ({"chat_template": CHAT_TEMPLATE} if chats else {})


def fast_tokenizer(pieces: Tokenizer) -> dict[str, Any]:
    """The `tokenizer.json` that encodes as our tokenizer does.

    SentencePiece writes a space as ▁. Here it stays a space, so that a text's own ▁ is what it is
    for us: three byte pieces. SentencePiece merges two neighbours whenever the whole is a piece,
    the best first; so every way to cut a piece in two is a merge, in the order of the scores.
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(pieces.model)
    names = [model.IdToPiece(id) for id in range(pieces.vocab_size)]
    breaks = sorted((name for name in names if "\n" in name), key=len, reverse=True)
    plain = {
        name: model.GetScore(id)
        for id, name in enumerate(names)
        if not (model.IsControl(id) or model.IsUnknown(id) or model.IsByte(id))
        and name not in breaks
    }
    merges = [
        (-score, cut, name)
        for name, score in plain.items()
        for cut in range(1, len(name))
        if name[:cut] in plain and name[cut:] in plain
    ]
    # A run of line breaks is cut off before the merging, and put together again by its own merges.
    pairs = [
        (name[:cut], name[cut:])
        for name in sorted(breaks, key=len)
        for cut in range(1, len(name))
        if name[:cut] in breaks and name[cut:] in breaks
    ]
    pairs += [(spaced(name[:cut]), spaced(name[cut:])) for _, cut, name in sorted(merges)]
    special = [id for id in sorted(pieces.control_ids)]
    bos = {"id": "<|bos|>", "ids": [pieces.bos_id], "tokens": ["<|bos|>"]}
    begin = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": names[id], "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for id in special
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "|".join(breaks)},
            "behavior": "Isolated",
            "invert": False,
        }
        if breaks
        else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, sequences[0]],
            "pair": [begin, *sequences],
            "special_tokens": {"<|bos|>": bos},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<|unk|>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {spaced(name): id for id, name in enumerate(names)},
            "merges": [list(pair) for pair in pairs],
        },
    }


def spaced(name: str) -> str:
    from tinychat.tokenizer import SPACE

    return name.replace(SPACE, " ")


def readme(info: CheckpointInfo, name: str) -> str:
    """A model card for the folder: what the checkpoint says of itself, and how to load it."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "language: en",
        "---",
        "",
        f"# {name}",
        "",
        f"A very small language model ({info.parameters:,} parameters) of tinychat, stage "
        f"`{info.stage}`, in the shape of Qwen3, float32. It makes things up and is often wrong.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
    ]
    if info.stage == "base":
        lines += [
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        ]
    else:
        lines += [
            'chat = [{"role": "user", "content": "why is the sky blue?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    lines += [
        "reply = model.generate(**inputs)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(reply, skip_special_tokens=True))",
        "```",
        "",
        "Control pieces such as `<|end|>` in a text count as such here. For texts of strangers, "
        "encode with `split_special_tokens=True`, as tinychat itself does.",
        "",
        *figures(info),
        "",
        *sources({"data": all_texts(info.lineage)}),
    ]
    return "\n".join(lines) + "\n"
