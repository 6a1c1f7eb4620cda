"""Checkpoints: tensors as safetensors, the rest as json, in a folder that appears whole or not at all.

In: nested dicts, lists and tuples of tensors and plain values. Out: a folder `step-00000100` with `tensors.safetensors`
and `state.json`; and the same values back. Nothing is pickled, so loading runs no code. Deliberately elsewhere: what a
training run needs to store (`loopaware.train.fit`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from loopaware import files

TENSORS, STATE = "tensors.safetensors", "state.json"
KEPT = 2


def save(folder: str | Path, step: int, contents: dict[str, Any]) -> Path:
    """Write a checkpoint and remove all but the newest two.

    The folder is written under a hidden name and renamed when it is whole: a kill or a full disk at any moment leaves
    the checkpoints before it as they were.

    Raises:
        OSError: the disk is full or not writable.
        TypeError: a value is neither a tensor nor plain json.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    state = json.dumps(packed(contents, "", tensors), allow_nan=True)
    whole = folder / f"step-{step:08d}"
    hidden = folder / f".{whole.name}.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        files.write(hidden / TENSORS, safetensors.save(tensors))
        files.write(hidden / STATE, state)
        if whole.exists():
            shutil.rmtree(whole)
        hidden.rename(whole)
        sync(folder)
    except OSError:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    for old in found(folder)[:-KEPT]:
        shutil.rmtree(old)
    return whole


def load(path: str | Path) -> dict[str, Any]:
    """The contents of one checkpoint folder.

    Raises:
        ValueError: the folder is not a whole checkpoint; names the file and an older checkpoint if there is one.
    """
    path = Path(path)
    file = path / STATE
    try:
        state = json.loads(file.read_text())
        file = path / TENSORS
        tensors = safetensors.load(file.read_bytes())
        return unpacked(state, tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        older = [other for other in found(path.parent) if other.name < path.name]
        remedy = f"The one before it is {older[-1]}: remove {path.name}" if older else "Remove it and start anew"
        raise ValueError(f"{file} must be part of a whole checkpoint, got {error!r}. {remedy}.") from error


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint in a folder, or None. Unfinished ones have hidden names and are not seen."""
    checkpoints = found(Path(folder))
    return checkpoints[-1] if checkpoints else None


def found(folder: Path) -> list[Path]:
    """Every checkpoint of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def save_model(model: nn.Module, path: str | Path) -> Path:
    """Write the weights of a model alone to one safetensors file; tensors that are shared are stored once.

    >>> import tempfile
    >>> save_model(nn.Linear(2, 1), Path(tempfile.mkdtemp()) / "model.safetensors").name
    'model.safetensors'
    """
    return files.write(path, safetensors.save(unshared(model.state_dict())))


def load_model(model: nn.Module, path: str | Path) -> None:
    """Fill a model with the weights of a file written by `save_model`, all or nothing.

    Raises:
        ValueError: the file is broken, or its names or shapes are not the model's; the model is untouched.
    """
    path = Path(path)
    try:
        stored = safetensors.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} must be a safetensors file, got {error!r}. Write it with save_model.") from error
    fitted(model.state_dict(), stored, path)
    model.load_state_dict({**model.state_dict(), **stored})


def fitted(own: dict[str, Tensor], stored: dict[str, Tensor], where: Path) -> None:
    """Refuse stored tensors that are not the model's own by name and shape."""
    needed = unshared(own)
    wrong = [f"{name} missing" for name in needed if name not in stored]
    wrong += [f"{name} unexpected" for name in stored if name not in own]
    wrong += [
        f"{name} {tuple(stored[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in needed.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(
            f"{where} must hold the tensors of this model, got {'; '.join(wrong[:8])}. "
            "Build the model with the options it was trained with; nothing was loaded."
        )


def unshared(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Each memory once, contiguous; the first name keeps it."""
    seen: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    kept = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            seen[place] = name
            kept[name] = tensor.detach().contiguous().clone()
    return kept


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as json, its tensors moved to `tensors` under their place in the tree."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[key, packed(part, f"{name}/{key}", tensors)] for key, part in value.items()]
        return {"pairs": pairs}  # keys of any plain type: json's own would turn 0 into "0"
    if isinstance(value, list | tuple):
        return [packed(part, f"{name}/{i}", tensors) for i, part in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{name} must be a tensor or plain value to be saved, got {type(value).__name__}. Convert it first."
    )


def unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: unpacked(part, tensors) for key, part in value["pairs"]}
    return [unpacked(part, tensors) for part in value] if isinstance(value, list) else value


def sync(folder: Path) -> None:
    """Let the rename reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
