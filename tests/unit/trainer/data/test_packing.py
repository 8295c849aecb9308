"""Packing: which sequences stand together, and that standing together changes no loss and no gradient."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.dataset import Dataset
from trimtab_trainer.data import packing
from trimtab_trainer.data.packing import Piece, best_fit_decreasing, wrapped
from trimtab_trainer.endings import Fault

IGNORED = -100


def _dataset(**asked: Any) -> Dataset:
    return Dataset.model_validate({"train": [{"from": {"inline": "{}"}}], "maxLength": 8, "packing": asked})


def _written(path: Path, rows: list[dict[str, Any]], batch: int = 2) -> Path:
    kinds = {"input_ids": pyarrow.int32(), "labels": pyarrow.int32(), "weights": pyarrow.float32()}
    schema = pyarrow.schema([(name, pyarrow.list_(kind)) for name, kind in kinds.items()])
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(rows), batch):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows[start : start + batch], schema=schema))
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    with pyarrow.memory_map(str(path)) as source:
        found: list[dict[str, Any]] = pyarrow.ipc.open_stream(source).read_all().to_pylist()
    return found


def _row(size: int, first: int = 1, weights: list[float] | None = None) -> dict[str, Any]:
    ids = list(range(first, first + size))
    return {"input_ids": ids, "labels": ids, "weights": weights or []}


def test_each_sequence_is_packed_once_and_no_pack_overflows() -> None:
    sizes = [random.Random(3).randint(1, 64) for _ in range(500)]
    packs = best_fit_decreasing([Piece(number, 0, size) for number, size in enumerate(sizes)], 64)
    assert sorted(piece.sequence for pack in packs for piece in pack) == list(range(500))
    assert max(sum(piece.length for piece in pack) for pack in packs) <= 64
    assert len(packs) <= 1.03 * sum(sizes) / 64 + 1


def test_packs_are_the_same_as_trls(tmp_path: Path) -> None:
    """The published algorithm of the same name fills no fewer packs."""
    import datasets
    from trl.data_utils import pack_dataset

    sizes = [random.Random(5).randint(1, 30) for _ in range(200)]
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * size for size in sizes]})
    theirs = pack_dataset(rows, 32, "bfd", {"keep_in_memory": True})
    ours = best_fit_decreasing([Piece(number, 0, size) for number, size in enumerate(sizes)], 32)
    assert sorted(map(sorted, theirs["seq_lengths"])) == sorted(sorted(p.length for p in pack) for pack in ours)


def test_wrapped_packs_are_full() -> None:
    packs = wrapped([5, 3, 9, 1], 4)
    assert [sum(piece.length for piece in pack) for pack in packs] == [4, 4, 4, 4, 2]
    assert packs[1] == [Piece(0, 4, 5), Piece(1, 0, 3)]


@pytest.mark.parametrize(
    ("asked", "lengths"),
    [
        ({"length": 16}, [[9, 5], [3]]),
        ({"length": 17}, [[9, 5, 3]]),
        ({"strategy": "bfdSplit", "length": 8}, [[8], [5, 3], [1]]),
        ({"strategy": "wrapped", "length": 10}, [[3, 5, 2], [7]]),
    ],
)
def test_packs_hold_the_rows(tmp_path: Path, asked: dict[str, Any], lengths: list[list[int]]) -> None:
    rows = [_row(3, 10), _row(5, 20), _row(9, 30)]
    packing.pack(_written(tmp_path / "rows", rows), _dataset(**asked), tmp_path / "packs")
    packs = _read(tmp_path / "packs")
    assert sorted(pack["lengths"] for pack in packs) == sorted(lengths)
    assert sorted(token for pack in packs for token in pack["input_ids"]) == sorted(
        token for row in rows for token in row["input_ids"]
    )
    for pack in packs:
        starts = {sum(pack["lengths"][:number]) for number in range(len(pack["lengths"]))}
        expected = [IGNORED if at in starts else token for at, token in enumerate(pack["input_ids"])]
        assert pack["labels"] == expected
        assert pack["weights"] == []


def test_weights_are_packed_with_their_tokens(tmp_path: Path) -> None:
    rows = [_row(3, 10), _row(5, 20, [0.5] * 5)]
    packing.pack(_written(tmp_path / "rows", rows), _dataset(), tmp_path / "packs")
    assert [pack["weights"] for pack in _read(tmp_path / "packs")] == [[0.5] * 5 + [1.0] * 3]


def _model(kind: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "sliding_window": 4,
    }  # fmt: skip
    if kind == "gpt2":
        sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    add_fused_lm_head(model)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_packed_batch_has_the_loss_and_the_gradient_of_its_rows(tmp_path: Path, kind: str, joined: bool) -> None:
    import torch

    from trimtab_trainer.methods.causal import CausalTrainer, Collator
    from trimtab_trainer.methods.documents import Documents

    draw = random.Random(1)
    rows = []
    for size in (3, 5, 7, 2, 8, 4):
        row = _row(size, draw.randint(1, 20))
        row["labels"] = [IGNORED if draw.random() < 0.3 else token for token in row["input_ids"]]
        rows.append(row)
    rows[2]["weights"] = [2.0] * 7
    packing.pack(_written(tmp_path / "rows", rows), _dataset(length=16), tmp_path / "packs")
    packs = _read(tmp_path / "packs")
    assert len(packs) == 2
    model = _model(kind)
    alone: Any = SimpleNamespace(aux_loss_enabled=False, args=SimpleNamespace(average_tokens_across_devices=False))

    def learnt(batch: dict[str, Any]) -> tuple[float, Any]:
        tokens = batch["labels"][:, 1:].ne(IGNORED).sum()
        model.zero_grad()
        loss = CausalTrainer.compute_loss(alone, model, dict(batch), num_items_in_batch=tokens)
        loss.backward()
        return float(loss.detach()), torch.cat([each.grad.flatten() for each in model.parameters()])

    plain_loss, plain = learnt(Collator(0)(rows))
    packed_loss, packed = learnt(Documents(0, joined)(packs))
    assert packed_loss == pytest.approx(plain_loss, abs=1e-5)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-4)
    free_loss, free = learnt(Documents(0, joined=True)(rows))
    assert free_loss == pytest.approx(plain_loss, abs=1e-5)
    torch.testing.assert_close(free, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "apart"), [("llama", True), ("gpt2", True), ("mamba", False)])
def test_a_model_whose_documents_see_each_other_is_found_out(kind: str, apart: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from trimtab_trainer.methods.documents import see_apart

    if apart:
        see_apart(_model(kind))
        return
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    model.forward = _without_positions(model.forward)
    with pytest.raises(Fault, match="see each other") as caught:
        see_apart(model)
    assert caught.value.reason is Reason.SPEC_INVALID


def _without_positions(forward: Any) -> Any:
    def passed_on(position_ids: Any = None, **given: Any) -> Any:
        return forward(**given)

    return passed_on
