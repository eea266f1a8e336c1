"""The text encoder: CLIP's layout, its import, and contrastive training on instructions."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from svam.contract import ContractError
from svam.files import FileError
from svam.models.published import save_published
from svam.models.text import TextEncoder, attention_mask
from svam.seeds import generator
from svam.training.prepare_backbones.text import (
    BEGIN,
    END,
    Sentences,
    contrastive_loss,
    measure,
    train_tokenizer,
)
from tests.tiny_foresight import reloaded

SENTENCES = ["open the drawer", "pull the drawer open", "close the window", "slide the window shut"]


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, CLIPModel, CLIPTokenizer]:
    """A whole, randomly initialised CLIP with its tokenizer, as openai's repository lays it out."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(SENTENCES, 2048)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**shared, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 12},
            vision_config={**shared, "image_size": 16, "patch_size": 8}, projection_dim=8,
        )
    ).eval()  # fmt: skip
    folder = tmp_path / "clip"
    folder.mkdir()
    save_published(clip, folder)
    tokenizer.save_pretrained(str(folder))
    return folder, clip, tokenizer


def test_the_published_text_model_gives_the_same_features(published: tuple[Path, CLIPModel, CLIPTokenizer]) -> None:
    folder, clip, tokenizer = published
    encoder = TextEncoder.load_published(folder, 10)
    batch = tokenizer(SENTENCES, padding="max_length", max_length=10, return_tensors="pt")
    assert torch.equal(encoder.ids(SENTENCES), batch["input_ids"])
    with torch.no_grad():
        expected = clip.text_model(**batch).last_hidden_state
        unmasked = clip.text_model(input_ids=batch["input_ids"]).last_hidden_state
    assert encoder.embed(SENTENCES).shape == (4, 10, 16) and encoder.width == 16
    assert torch.equal(attention_mask(batch["input_ids"], tokenizer.eos_token_id), batch["attention_mask"])
    assert torch.equal(encoder.embed(SENTENCES), expected)
    padding = batch["attention_mask"] == 0
    assert torch.equal(expected[~padding], unmasked[~padding]) and (expected - unmasked)[padding].abs().max() > 1e-3


def test_a_pooled_sentence_is_clips_text_embedding(published: tuple[Path, CLIPModel, CLIPTokenizer], tmp_path: Path) -> None:
    """Projected where the weights have a projection, also once saved; a text model alone has none."""
    folder, clip, tokenizer = published
    encoder = TextEncoder.load_published(folder, 10)
    with torch.no_grad():
        batch = tokenizer(SENTENCES, padding="max_length", max_length=10, return_tensors="pt")
        state = clip.text_model(**batch).pooler_output
        expected = clip.text_projection(state)
    assert encoder.pooled_width == 8 and encoder.pool(SENTENCES).shape == (4, 1, 8)
    torch.testing.assert_close(encoder.pool(SENTENCES)[:, 0], expected)
    assert torch.equal(reloaded(encoder, tmp_path).pool(SENTENCES), encoder.pool(SENTENCES))
    alone = TextEncoder(encoder.model, tokenizer, 10)
    assert torch.equal(alone.pool(SENTENCES)[:, 0], state) and alone.pooled_width == 16


def test_vocab_and_merges_alone_are_enough(published: tuple[Path, CLIPModel, CLIPTokenizer]) -> None:
    folder, _, tokenizer = published
    tokenizer.backend_tokenizer.model.save(str(folder))
    with_both = TextEncoder.load_published(folder, 10).ids(SENTENCES)
    (folder / "tokenizer.json").unlink()
    assert torch.equal(TextEncoder.load_published(folder, 10).ids(SENTENCES), with_both)
    (folder / "merges.txt").unlink()
    with pytest.raises(FileError, match="no tokenizer"):
        TextEncoder.load_published(folder, 10)


def test_saving_and_loading_is_exact(published: tuple[Path, CLIPModel, CLIPTokenizer], tmp_path: Path) -> None:
    first = TextEncoder.load_published(published[0], 10)
    second = reloaded(first, tmp_path)
    assert torch.equal(first.embed(SENTENCES), second.embed(SENTENCES)) and second.tokens == 10
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert {"config.json", "merges.txt", "model.safetensors", "svam.json", "tokenizer_config.json", "vocab.json"} <= names


def test_too_long_and_too_many_positions(published: tuple[Path, CLIPModel, CLIPTokenizer]) -> None:
    with pytest.raises(ContractError, match="'open the drawer' takes 5 tokens, the text encoder has 4"):
        TextEncoder.load_published(published[0], 4).embed(["open the drawer"])
    with pytest.raises(ContractError, match="tokens is 13, but the text model has 12"):
        TextEncoder.load_published(published[0], 13)


def test_the_trained_tokenizer_knows_its_words_and_spells_others() -> None:
    tokenizer = train_tokenizer(SENTENCES, 2048)
    ids = tokenizer("Open  the window")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [BEGIN, "open</w>", "the</w>", "window</w>", END]
    assert (ids[0], ids[-1]) == (len(tokenizer) - 2, len(tokenizer) - 1)  # CLIP's places
    unknown = tokenizer("qué")["input_ids"]
    assert tokenizer.unk_token_id not in unknown[:-1] and tokenizer.decode(unknown, skip_special_tokens=True) == "qué"
    assert train_tokenizer(SENTENCES[::-1], 2048)("slide")["input_ids"] == tokenizer("slide")["input_ids"]


def test_every_pair_of_one_task_is_a_positive() -> None:
    images = torch.nn.functional.one_hot(torch.tensor([0, 1, 2])).float()
    tasks = torch.tensor([0, 0, 1])
    aligned = torch.stack([images[:2].mean(0), images[:2].mean(0), images[2]])
    # Rows of logits, scale 2: (1, 1, 0), (1, 1, 0), (0, 0, 2); targets (1/2, 1/2, 0) twice and (0, 0, 1).
    e = torch.exp(torch.tensor([1.0, 2.0]))
    by_image = (2 * -(1 - torch.log(2 * e[0] + 1)) + -(2 - torch.log(2 + e[1]))) / 3
    loss = contrastive_loss(images, aligned, torch.tensor(2.0), tasks)
    torch.testing.assert_close(loss, by_image)  # the logits are symmetric
    assert contrastive_loss(images, aligned[[2, 2, 0]], torch.tensor(2.0), tasks) > loss


def test_words_are_left_out_but_never_all(published: tuple[Path, CLIPModel, CLIPTokenizer]) -> None:
    clip = CLIPTextModel(CLIPConfig(text_config={"max_position_embeddings": 64}).text_config)
    encoder = TextEncoder(clip, published[2], 64)
    said = [*SENTENCES, "Don't  open it; push (twice) 12.5 cm!", "ouvre-le où tu veux, \tça va", "x", ""]
    spoken, rng = Sentences(encoder, said), generator(0, "words")
    everyone = np.arange(len(said))
    assert torch.equal(spoken.without_words(everyone, 0.0, rng), encoder.ids(said))
    for number, sentence in enumerate(said):
        words = sentence.split()
        parts = [" ".join(part) for most in range(1, len(words) + 1) for part in combinations(words, most)] or [""]
        found = spoken.without_words(np.full(200, number), 0.5, rng)
        assert {tuple(row) for row in found.tolist()} <= {tuple(row) for row in encoder.ids(parts).tolist()}
    whole = (spoken.without_words(np.zeros(200, np.int64), 0.1, rng) == encoder.ids(said[:1])).all(dim=1)
    assert 100 < int(whole.sum()) < 180  # of "open the drawer"; 0.9 cubed is 0.73
    assert (spoken.without_words(everyone, 1.0, rng) == encoder.ids(said)).all()  # all or none


def test_measure_of_a_random_encoder(published: tuple[Path, CLIPModel, CLIPTokenizer]) -> None:
    encoder = TextEncoder(CLIPTextModel.from_pretrained(published[0]).eval(), published[2], 10)
    sentences = {"drawer": SENTENCES[:2], "window": SENTENCES[2:]}
    values = measure(encoder, sentences, {"drawer": ["open the drawer"], "window": []})
    assert set(values) == {"cosine_within", "cosine_between", "held_out_accuracy", "held_out_cosine"}
    assert values["held_out_accuracy"] == 1.0 and -1 <= values["cosine_between"] <= 1
    assert measure(encoder, {"drawer": SENTENCES[:2]}, {}) == {}
