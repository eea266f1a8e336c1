"""Instructions to tokens: CLIP's text model and tokenizer, published or small and in-domain, behind one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from svam.checkpoint import save_tensors
from svam.contract import ContractError
from svam.files import FileError
from svam.models.layouts import check_tokenizer
from svam.models.published import freeze, load_strict, quiet, read_adapter, save_published, write_adapter

VISION_PARTS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
"""Weights of a published CLIP that its text model does not use."""
PROJECTION = "text_projection.weight"
SENTENCES = 4096
"""Sentences whose token ids are remembered: a robot is told the same one for a whole episode, a data set repeats a few."""


def attention_mask(ids: Tensor, end: int) -> Tensor:
    """The tokenizer's mask of padded token ids (B, L): 1 up to and including the first `end` token, 0 on padding, int64."""
    ended = (ids == end).long()
    return (ended.cumsum(dim=1) - ended < 1).long()


class TextEncoder(nn.Module):
    """A sentence -> the last hidden state of all `tokens` positions, as Stable Diffusion's U-Nets take it. Frozen.

    Or -> one vector, the state at the end token, through CLIP's projection where the weights have one. Sentences are padded
    with CLIP's own padding token, which no position attends to, as in the released code. Published setting (S-VAM's code):
    ViT-B/32, 20 tokens of 512 for the U-Net, one projected vector of 512 for the policy.
    """

    projection: Tensor | None

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer, tokens: int, projection: Tensor | None = None) -> None:
        """`projection`: CLIP's (outputs, width), if any. Raises `ContractError` if `tokens` exceeds the model's positions."""
        super().__init__()
        positions = int(model.config.max_position_embeddings)
        if tokens > positions:
            raise ContractError(f"prepare_backbones.text.tokens is {tokens}, but the text model has {positions} positions")
        self.model = model
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.register_buffer("projection", projection)
        self._ids: dict[str, list[int]] = {}

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def pooled_width(self) -> int:
        """Channels of `pool`."""
        return self.width if self.projection is None else len(self.projection)

    @classmethod
    def load(cls, folder: Path) -> TextEncoder:
        """Read what `save` wrote. Raises `FileError` for missing, broken or unfitting files."""
        return cls._read(Path(folder), int(read_adapter(Path(folder), "text")["tokens"]), ())

    @classmethod
    def load_published(cls, folder: Path, tokens: int) -> TextEncoder:
        """Read a published CLIP (whole or text part) with its tokenizer; the vision tower is left out."""
        return cls._read(Path(folder), tokens, VISION_PARTS)

    @classmethod
    def _read(cls, folder: Path, tokens: int, ignored: tuple[str, ...]) -> TextEncoder:
        check_tokenizer(folder)
        with quiet():
            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        return freeze(cls(load_strict(CLIPTextModel, folder, ignored), tokenizer, tokens, _projection_in(folder)))

    def save(self, folder: Path) -> None:
        """Write model, tokenizer (vocab.json and merges.txt too), `projection.safetensors` where there is a projection, and
        `svam.json` into an existing folder."""
        save_published(self.model, Path(folder))
        self.tokenizer.save_pretrained(str(folder))
        self.tokenizer.backend_tokenizer.model.save(str(folder))
        if self.projection is not None:
            save_tensors(Path(folder) / "projection.safetensors", {PROJECTION: self.projection})
        write_adapter(Path(folder), "text", tokens=self.tokens)

    def ids(self, instructions: list[str]) -> Tensor:
        """Token ids (B, tokens) int64, with begin and end tokens, padded.

        Raises:
            ContractError: an instruction needs more than `tokens` tokens.
        """
        new = [sentence for sentence in dict.fromkeys(instructions) if sentence not in self._ids]
        rows = dict(zip(new, self.tokenizer(new)["input_ids"] if new else [], strict=True))  # one call for all
        for sentence, row in rows.items():
            if len(row) > self.tokens:
                raise ContractError(f"the instruction {sentence!r} takes {len(row)} tokens, the text encoder has {self.tokens}")
            row += [int(self.tokenizer.pad_token_id)] * (self.tokens - len(row))
        ids = torch.tensor([rows.get(sentence) or self._ids[sentence] for sentence in instructions])
        self._ids |= dict(list(rows.items())[: SENTENCES - len(self._ids)])
        return ids

    @torch.no_grad()
    def embed(self, instructions: list[str]) -> Tensor:
        """Last hidden states (B, tokens, width) float32, on the model's device. Raises `ContractError` as `ids`."""
        hidden: Tensor = self._run(instructions).last_hidden_state
        return hidden.float()

    @torch.no_grad()
    def pool(self, instructions: list[str]) -> Tensor:
        """Each sentence as one token (B, 1, pooled_width) float32, on the model's device. Raises `ContractError` as `ids`."""
        pooled: Tensor = self._run(instructions).pooler_output.float()
        return (pooled if self.projection is None else pooled @ self.projection.T)[:, None]

    def _run(self, instructions: list[str]) -> Any:
        device = next(self.model.parameters()).device
        ids = self.ids(instructions).to(device)
        with torch.autocast(device.type, enabled=False):
            return self.model(ids, attention_mask(ids, int(self.tokenizer.eos_token_id)))


def _projection_in(folder: Path) -> Tensor | None:
    """The projection (outputs, width) among the weights of a CLIP, float32; a file without a variant's suffix is preferred."""
    for file in sorted(folder.glob("*.safetensors"), reverse=True):
        try:
            with safe_open(file, "pt") as weights:
                if PROJECTION in weights.keys():  # noqa: SIM118  (no mapping)
                    projection: Tensor = weights.get_tensor(PROJECTION).float()
                    return projection
        except SafetensorError as error:
            raise FileError(f"{file}: not a whole safetensors file ({error})") from None
    return None
