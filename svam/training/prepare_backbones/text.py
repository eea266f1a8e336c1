"""Text encoder: a small CLIP trained on instructions and frames, whose text half is kept and frozen; or CLIP's own imported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from svam import params
from svam.episodes.store import EpisodeStore
from svam.models.layouts import TEXT
from svam.models.published import freeze, resolve_weights
from svam.models.text import TextEncoder, attention_mask
from svam.resume import NO_RESUME, Resume
from svam.seeds import generator
from svam.training.batch_order import EndlessOrder
from svam.training.loop import fit
from svam.training.prepare_backbones.frames import frames_that_fit, load_frames

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
FRAME_MEAN, FRAME_STD = 0.45, 0.27
"""CLIP's normalisation of pixels, averaged over channels; only the vision half, which is thrown away, sees it."""


def published(section: params.Text, key: str) -> TextEncoder:
    """The published weights that the params name. `key` is the section's, for messages."""
    return TextEncoder.load_published(resolve_weights(str(section.path), section.revision, TEXT, f"{key}.path"), section.tokens)


def train_tokenizer(sentences: list[str], vocabulary_size: int) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE with `</w>` word ends) whose merges are learnt from `sentences`
    (lower-cased); at most `vocabulary_size` tokens."""
    tokenizer = CLIPTokenizer()
    trainer = BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=1,
        show_progress=False,
        # Named, so that they are numbered in this order: the trainer would number letters that end a word in the order of its
        # hash table, another in every process, and merges of equal counts go by these numbers.
        special_tokens=[f"{letter}</w>" for letter in sorted(ByteLevel.alphabet())],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
    )
    learner = tokenizer.backend_tokenizer
    learner.model = BPE(end_of_word_suffix="</w>")
    learner.train_from_iterator(sorted(set(sentences)), trainer=trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, then the two special tokens with the highest numbers.
    letters = sorted(ByteLevel.alphabet())
    words = letters + [f"{letter}</w>" for letter in letters] + [a + b for a, b in merges]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*words, BEGIN, END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def build(section: params.Text, tokenizer: CLIPTokenizer, image_size: tuple[int, int]) -> CLIPModel:
    """An untrained CLIP: text model as the params say, vision model of the same width on square frames."""
    shared = {
        "hidden_size": section.width,
        "intermediate_size": 4 * section.width,
        "num_attention_heads": section.heads,
        "projection_dim": section.width,
    }
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    side = max(image_size)
    return CLIPModel(
        CLIPConfig(
            text_config={
                **shared, **special, "num_hidden_layers": section.layers, "vocab_size": len(tokenizer),
                "max_position_embeddings": section.tokens,
            },
            vision_config={**shared, "num_hidden_layers": 2, "image_size": side, "patch_size": max(8, side // 8)},
            projection_dim=section.width,
        )
    )  # fmt: skip


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, tasks: Tensor) -> Tensor:
    """CLIP's symmetric loss where every pair of the same task is a positive: cross-entropy to a uniform spread over them.

    images, texts: (B, D), of unit length. scale: scalar, the inverse temperature. tasks: (B,) int64.
    """
    logits = scale * images @ texts.T
    same = (tasks[:, None] == tasks[None, :]).float()
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Contrast(nn.Module):
    """CLIP, and a second projection of the mean over all text tokens, so that every position learns and not the last alone:
    policy and U-Net attend to all of them, padding included."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.mean_projection = nn.Linear(clip.config.text_config.hidden_size, clip.config.projection_dim, bias=False)

    def loss(self, frames: Tensor, ids: Tensor, tasks: Tensor) -> Tensor:
        """frames (B, H, W, 3) uint8, ids (B, tokens), tasks (B,) -> scalar."""
        clip = self.clip
        pixels = (frames.permute(0, 3, 1, 2).float() / 255.0 - FRAME_MEAN) / FRAME_STD
        side = clip.config.vision_config.image_size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)
        images = F.normalize(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output), dim=-1)
        text = clip.text_model(ids, attention_mask(ids, clip.config.text_config.eos_token_id))
        last = F.normalize(clip.text_projection(text.pooler_output), dim=-1)
        mean = F.normalize(self.mean_projection(text.last_hidden_state.mean(dim=1)), dim=-1)
        scale = clip.logit_scale.exp().clamp(max=100.0)
        return contrastive_loss(images, last, scale, tasks) + contrastive_loss(images, mean, scale, tasks)


class Sentences:
    """Sentences as tokens, from which words can be left out: the ids of a word do not depend on its neighbours, as CLIP splits
    at spaces first.

    ids: (sentences, tokens) int64, as `TextEncoder.ids` gives them. word: the same shape, the number of the word that a token
    belongs to, from 1 on; 0 for begin, end and padding. pad: the id of padding.
    """

    def __init__(self, encoder: TextEncoder, sentences: list[str]) -> None:
        """Raises `ContractError` for a sentence that is too long."""
        self.ids, self.pad = encoder.ids(sentences).numpy(), int(encoder.tokenizer.pad_token_id)
        self.word = np.zeros_like(self.ids)
        for row, words in zip(self.word, (said.split() for said in sentences), strict=True):
            lengths = [len(encoder.tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words]
            row[1 : 1 + sum(lengths)] = np.repeat(np.arange(1, 1 + len(words)), lengths)

    def without_words(self, chosen: NDArray[np.int64], share: float, rng: np.random.Generator) -> Tensor:
        """Ids (B, tokens) of the sentences `chosen` (B,), without about `share` of their words, but never without all."""
        ids, word = self.ids[chosen], self.word[chosen]
        drawn = rng.random((len(chosen), self.word.max() + 1))
        left_out = (np.take_along_axis(drawn, word, axis=1) < share) & (word > 0)
        left_out &= ((word > 0) & ~left_out).any(axis=1, keepdims=True)
        # What stays keeps its order and moves to the front.
        places = np.argsort(left_out, axis=1, kind="stable")
        return torch.from_numpy(np.take_along_axis(np.where(left_out, self.pad, ids), places, axis=1))


def training_sentences(store: EpisodeStore, task: str) -> list[str]:
    """The training paraphrases of a task; without a list of them, the instructions of its training episodes."""
    listed = store.instructions.get(task, {}).get("train", [])
    own = {store.episode_instructions[int(e)] for e in store.episodes("train") if store.task_of(int(e)) == task}
    return list(listed) or sorted(own)


def train(
    section: params.Text, store: EpisodeStore, seed: int, device: torch.device, live: Path | None,
    resume: Resume = NO_RESUME,
) -> tuple[TextEncoder, dict[str, float]]:  # fmt: skip
    """Train on the training episodes' frames and the training paraphrases of their tasks; held-out paraphrases only measure."""
    sentences = {task: training_sentences(store, task) for task in store.tasks}
    tokenizer = train_tokenizer([s for group in sentences.values() for s in group], section.vocabulary)
    contrast = Contrast(build(section, tokenizer, store.image_size)).to(device)
    encoder = TextEncoder(CLIPTextModel(contrast.clip.config.text_config), tokenizer, section.tokens)
    encoder.model = contrast.clip.text_model  # the half that is kept

    spoken = Sentences(encoder, [said for group in sentences.values() for said in group])
    count = np.array([len(group) for group in sentences.values()])
    first = count.cumsum() - count  # of each task's sentences
    rows = frames_that_fit(store, store.drawn(store.rows("train")))
    frames = load_frames(store, rows).numpy()
    task_of = store.episode_task[store.episode_of(rows)]

    order = EndlessOrder(len(rows), section.training.batch, seed, "text batches")

    def batch_of(number: int) -> tuple[Tensor, Tensor, Tensor]:
        rng, chosen = generator(seed, "text words", number), order.batch(number)
        tasks = task_of[chosen]
        ids = spoken.without_words(first[tasks] + rng.integers(count[tasks]), section.word_dropout, rng)
        seen = torch.from_numpy(frames[chosen])  # as bytes: a quarter of what a device would be sent as floats
        return seen.to(device), ids.to(device), torch.from_numpy(tasks).to(device)

    fit(contrast, lambda batch: contrast.loss(*batch), batch_of, section.training, device, "text", live, resume=resume)
    held_out = {task: store.instructions.get(task, {}).get("held_out", []) for task in store.tasks}
    return freeze(encoder), measure(encoder, sentences, held_out)


def measure(encoder: TextEncoder, sentences: dict[str, list[str]], held_out: dict[str, list[str]]) -> dict[str, float]:
    """How far tasks lie apart and paraphrases together, in the mean over all tokens of `embed`, centred on the training mean.

    Returns:
        `cosine_within`, `cosine_between`: mean over pairs of training paraphrases of one task, of different tasks;
        `held_out_accuracy`: share of held-out paraphrases whose nearest task mean (of training paraphrases) is their own;
        `held_out_cosine`: their mean cosine to it. What cannot be computed (one task, nothing held out) is absent.
    """
    tasks = [task for task, spoken in sentences.items() if spoken]
    vectors = {task: encoder.embed(sentences[task]).mean(dim=1) for task in tasks}
    centre = torch.cat(list(vectors.values())).mean(dim=0)
    unit = {task: F.normalize(v - centre, dim=-1) for task, v in vectors.items()}
    result: dict[str, float] = {}
    if len(tasks) < 2:
        return result
    within = [_pairs(v @ v.T) for v in unit.values() if len(v) > 1]
    if within:
        result["cosine_within"] = float(torch.cat(within).mean())
    between = [(unit[a] @ unit[b].T).flatten() for k, a in enumerate(tasks) for b in tasks[k + 1 :]]
    result["cosine_between"] = float(torch.cat(between).mean())
    means = F.normalize(torch.stack([v.mean(dim=0) for v in unit.values()]), dim=-1)
    hits: list[tuple[bool, float]] = []  # and the cosine to its own mean
    for number, task in enumerate(tasks):
        for sentence in held_out.get(task, []):
            similar = means @ F.normalize(encoder.embed([sentence]).mean(dim=1)[0] - centre, dim=-1)
            hits.append((int(similar.argmax()) == number, float(similar[number])))
    if hits:
        result["held_out_accuracy"], result["held_out_cosine"] = np.mean(hits, axis=0).tolist()
    return result


def _pairs(similarities: Tensor) -> Tensor:
    """Entries above the diagonal of a square matrix."""
    return similarities[torch.triu(torch.ones_like(similarities, dtype=torch.bool), diagonal=1)]
