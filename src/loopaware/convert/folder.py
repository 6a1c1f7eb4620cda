"""Folders in transformers' format: a dense model read whole, a looped one written whole, the tokenizer carried along.

In: a folder, or a GGUF file. Out: a model; a folder that the Auto classes load. Deliberately elsewhere: what happens in
between (`loopaware.convert.dense`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loopaware.lm.layers import anatomy
from loopaware.lm.loading import wrong

CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model")
CARRIED = (*CARRIED, "sentencepiece*", "*.tiktoken", "chat_template*", "LICENSE*")
"""Files that belong to the tokenizer, and the terms of the weights."""


def read(source: str | Path) -> PreTrainedModel:
    """The dense model of a folder, all of it, in evaluation mode and in the precision it was stored in.

    Raises:
        ValueError: there is none, it is of a kind that cannot be looped, or something is missing or damaged.
    """
    source = Path(source)
    folder, extra = (source.parent, {"gguf_file": source.name}) if source.suffix == ".gguf" else (source, {})
    if not source.exists() or not (extra or (folder / "config.json").exists()):
        raise ValueError(
            f"{source} must be a folder with config.json and weights, or a .gguf file, got "
            f"{'a folder without config.json' if source.exists() else 'nothing there'}. Save the model with "
            "save_pretrained, or download its folder."
        )
    try:
        config: Any = AutoConfig.from_pretrained(folder, **extra)
        if config.model_type != "bert":
            anatomy(config.model_type)
        model, info = reader(config).from_pretrained(folder, dtype="auto", output_loading_info=True, **extra)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{source} must hold a dense model that can be looped, got: {error}") from error
    found = wrong(model, {**info, "unexpected_keys": []}, lenient=False)
    if found:
        raise ValueError(f"{source} must hold a whole model, got {'; '.join(found)}. Fetch or save it again.")
    return model.eval()


def reader(config: Any) -> Any:
    """The Auto class that reads a dense model with the head it was saved with."""
    if config.model_type != "bert":
        return AutoModelForCausalLM
    headed = {"BertForMaskedLM", "BertForPreTraining"} & set(config.architectures or ())
    return AutoModelForMaskedLM if headed else AutoModel


def tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a GGUF file.

    Raises:
        ValueError: there is none.
    """
    source = Path(source)
    folder, extra = (source.parent, {"gguf_file": source.name}) if source.suffix == ".gguf" else (source, {})
    if not extra and not any(file for pattern in CARRIED[:-1] for file in source.glob(pattern)):
        raise ValueError(f"{source} must hold a tokenizer to read text, got none. Save one there with save_pretrained.")
    return AutoTokenizer.from_pretrained(folder, **extra)


def free(target: str | Path) -> Path:
    """A folder that holds no model yet.

    Raises:
        ValueError: it does.
    """
    target = Path(target)
    there = target.is_file() or (target.is_dir() and [path.name for path in target.iterdir() if path.is_file()])
    if there:
        raise ValueError(
            f"{target} must be a new folder, got {'a file' if target.is_file() else 'one with files'}. Choose another."
        )
    return target


def write(model: PreTrainedModel, target: str | Path, source: str | Path | None = None) -> Path:
    """Write a model, and the tokenizer's files of `source`, to a folder that holds none yet.

    Everything is written under a hidden name beside it first; config.json, without which nothing loads, comes last.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
        ValueError: the target holds files.
    """
    target = free(target)
    hidden = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        model.save_pretrained(hidden)
        if source is not None:
            carry(Path(source), hidden)
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(hidden.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(target / file.name)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return target


def carry(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, or make them from those inside a GGUF file."""
    if source.suffix == ".gguf":
        tokenizer(source).save_pretrained(target)
        return
    for pattern in CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
