"""embedding: held-out texts find their own, losses are the published formulas, and sentence-transformers opens it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.processors
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from tests.matrix import proves
from tests.unit.trainer.heads.conftest import FILLERS, FULL, NOUNS, Rows, Tune, said
from trimtab_api.v1alpha1.heads import Embedding
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.methods.relating import relation_loss
from trimtab_trainer.model.vector import embed_ids

THINGS = NOUNS[:12]


def related(count: int, seed: int, negatives: int = 0) -> Rows:
    """Texts belong together when they speak of the same thing."""
    draw, rows = random.Random(seed), []
    for index in range(count):
        thing = THINGS[index % len(THINGS)]
        row: dict[str, Any] = {"anchor": said(draw, thing, length=3), "positive": said(draw, thing, length=3)}
        others = [draw.choice([each for each in THINGS if each != thing]) for _ in range(negatives)]
        rows.append({**row, "negatives": [said(draw, each, length=3) for each in others]} if negatives else row)
    return rows


def scored(count: int, seed: int) -> Rows:
    """1 when both texts speak of one thing, else 0."""
    draw, rows = random.Random(seed), []
    for index in range(count):
        same = (index // 4) % 2
        one = THINGS[index % 4]
        other = one if same else draw.choice([each for each in THINGS[:4] if each != one])
        rows.append({"sentence1": said(draw, one, length=3), "sentence2": said(draw, other, length=3), "score": same})
    return rows


LORA = {"tuner": {"lora": {"rank": 32, "dropout": 0}}}


@proves("embedding", "full", "lora")
@pytest.mark.parametrize(("tuner", "rate"), [(FULL, 2e-3), (LORA, 3e-3)], ids=["full", "lora"])
def test_texts_find_their_own(tune: Tune, tuner: dict[str, Any], rate: float) -> None:
    held_out = related(len(THINGS), 5)
    done = tune(
        "embedding",
        related(640, 1),
        held_out,
        embedding={"instruction": "saw "},
        training={"maxSteps": 80, "learningRate": rate},
        **tuner,
    )
    assert done.held_out["recall@1"] > 0.7
    assert done.held_out["mrr"] > 0.8
    assert done.artifact.task_type == "FEATURE_EXTRACTION"
    if tuner is LORA:
        return
    opened = SentenceTransformer(str(done.folder), device="cpu")
    assert opened.max_seq_length == 64
    anchors = opened.encode([row["anchor"] for row in held_out], prompt_name="query", convert_to_tensor=True)
    others = opened.encode([row["positive"] for row in held_out], convert_to_tensor=True)
    torch.testing.assert_close(anchors.norm(dim=-1), torch.ones(len(anchors)))
    right = (anchors @ others.T).argmax(-1) == torch.arange(len(held_out))
    assert float(right.float().mean()) == pytest.approx(done.held_out["recall@1"], abs=0.03)


def test_an_adapter_opens_in_plain_peft(tune: Tune, local: LocalModel) -> None:
    done = tune("embedding", related(32, 1), training={"maxSteps": 4, "learningRate": 1e-2}, **LORA)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(local.path), str(done.folder)).eval()
    text = AutoTokenizer.from_pretrained(done.folder)
    batch = text(["we saw the ship", "fog"], padding=True, return_tensors="pt")
    vectors = embed_ids(model, Embedding(), batch["input_ids"], batch["attention_mask"])
    with model.disable_adapter():
        before = embed_ids(model, Embedding(), batch["input_ids"], batch["attention_mask"])
    assert vectors.shape == (2, 48)
    assert not torch.allclose(vectors, before)


def test_an_encoder_reads_what_sentence_transformers_will_give_it(tune: Tune, tmp_path: Path) -> None:
    """With marks of its own around texts, and texts that are cut: the published vectors are those that were learnt."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({*FILLERS, *NOUNS})]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bert")
    rows = related(32, 1)
    held_out = [{"anchor": row["anchor"] * 9, "positive": row["positive"]} for row in related(12, 2)]
    done = tune(
        "embedding",
        rows,
        held_out,
        base=tmp_path / "bert",
        embedding={"pooling": "cls", "temperature": 0.2},
        dataset={"maxLength": 8},
        training={"maxSteps": 2, "learningRate": 1e-2},
        **FULL,
    )
    opened = SentenceTransformer(str(done.folder), device="cpu")
    sides = [opened.encode([row[name] for row in held_out], convert_to_tensor=True) for name in ("anchor", "positive")]
    loss = relation_loss([*sides, sides[0][:0]], torch.ones(12), Embedding(temperature=0.2))
    assert float(loss) == pytest.approx(done.held_out["loss"], abs=1e-4)


@pytest.mark.parametrize("loss", ["cosineSimilarity", "contrastive", "onlineContrastive"])
def test_scores_are_learnt(tune: Tune, loss: str) -> None:
    done = tune(
        "embedding",
        scored(512, 1),
        scored(64, 2),
        embedding={"loss": loss},
        training={"maxSteps": 40, "learningRate": 3e-3},
        **FULL,
    )
    # With two values the largest possible rank correlation is √3/2.
    assert done.held_out["spearman"] > 0.7


def test_hard_negatives_and_sizes(tune: Tune) -> None:
    done = tune(
        "embedding",
        related(320, 1, negatives=2),
        related(len(THINGS), 5, negatives=3),
        embedding={"matryoshkaDims": [12, 24], "hardNegatives": 1},
        training={"maxSteps": 60, "learningRate": 2e-3},
        **FULL,
    )
    assert done.held_out["recall@1"] > 0.7


def _sides(rows: int = 5, negatives: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 8, generator=generator) for count in (rows, rows, negatives)]


def test_infonce_is_the_published_formula() -> None:
    """-log exp(cos(a, p)/τ) / Σ exp(cos(a, d)/τ) over all positives and negatives of the batch."""
    anchors, positives, negatives = _sides(negatives=3)
    found = relation_loss([anchors, positives, negatives], torch.ones(5), Embedding(temperature=0.2))
    documents = torch.cat([positives, negatives])
    cosines = torch.nn.functional.cosine_similarity(anchors[:, None], documents[None], dim=-1) / 0.2
    wanted = -(cosines.diagonal() - cosines.exp().sum(-1).log()).mean()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_contrastive_is_the_published_formula() -> None:
    """½·(y·d² + (1-y)·max(0, m-d)²) with the cosine distance d (Hadsell et al. 2006)."""
    one, other, none = _sides()
    labels = torch.tensor([1.0, 0, 1, 0, 0])
    found = relation_loss([one, other, none], labels, Embedding(loss="contrastive", margin=0.8))
    distance = 1 - torch.nn.functional.cosine_similarity(one, other)
    wanted = 0.5 * (labels * distance**2 + (1 - labels) * (0.8 - distance).clamp(min=0) ** 2)
    torch.testing.assert_close(found, wanted.mean(), rtol=0, atol=1e-5)


class _Fixed(torch.nn.Module):
    """A model that answers with the vectors that it is given."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return 8


def test_sizes_are_summed_as_matryoshka_loss_has_it() -> None:
    anchors, positives, _ = _sides()
    model: Any = _Fixed()
    inner = losses.MultipleNegativesRankingLoss(model, scale=10)
    library = losses.MatryoshkaLoss(model, inner, [8, 4, 2])
    wanted = library([{"vectors": anchors}, {"vectors": positives}], torch.ones(5))
    found = relation_loss([anchors, positives, anchors[:0]], torch.ones(5), Embedding(matryoshka_dims=[2, 4]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
