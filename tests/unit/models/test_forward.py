"""Rows, tower and forward against the stock models: the same losses, gradients and features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medforge.models.encode import Encoder
from medforge.models.families import FAMILIES
from medforge.models.load import load_model
from medforge.models.rows import PADDING, Batch, Item, collate_rows, make_row
from tests.unit.models.passes import (
    MERGE,
    PICTURES,
    PIXELS,
    Case,
    about,
    adapted,
    batches,
    case,
    distance,
    gradients,
    pixels,
    row_losses,
    seen,
    some_cases,
    stock,
    stock_loss,
)

ROUNDING = 1e-5  # of float32, relative
ALONE, SHARED, PACKED = {"share": False}, {"share": True}, {"share": True, "packed": True}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def encoder(family: str, tiny_models: dict[str, Path]) -> Encoder:
    return Encoder(tiny_models[family], *PIXELS)


@pytest.fixture(scope="module")
def model(family: str, tiny_models: dict[str, Path]) -> Any:
    """A tiny model with random adapters in the merger and in the language model's attention."""
    return adapted(load_model(tiny_models[family], "float32").cpu(), family)


@pytest.fixture(scope="module")
def cases(encoder: Encoder) -> list[Case]:
    return some_cases(encoder)


@pytest.fixture(scope="module")
def expected(model: Any, encoder: Encoder, cases: list[Case]) -> tuple[float, dict[str, Any]]:
    """The loss and the gradients of all samples, by the stock model: each sample by itself."""
    total = 0.0
    for one in cases:
        loss = stock_loss(stock(model), encoder, [one.whole])
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


# --- losses and gradients


@pytest.mark.parametrize(
    "how",
    [
        ALONE,
        SHARED,
        PACKED,
        {"share": True, "buckets": False},
        {"share": True, "tokens": 150},  # several micro-batches, rows of a part of an image's questions
        {"share": True, "tokens": 150, "packed": True},
        {"share": False, "packed": True},
    ],
    ids=str,
)
def test_rows_have_the_stock_models_loss_and_gradients(
    model: Any, encoder: Encoder, cases: list[Case], expected: tuple[float, dict[str, Any]], how: dict[str, Any]
) -> None:
    found = 0.0
    cut = batches(encoder, [one.item for one in cases], **how)
    for batch in cut:
        loss = row_losses(stock(model), encoder, batch).sum()
        loss.backward()
        found += float(loss.detach())
    assert sum(len(batch.targets) for batch in cut) == sum(one.whole.answer_tokens for one in cases)
    assert found == pytest.approx(expected[0], rel=ROUNDING)
    assert distance(gradients(model), expected[1]) < ROUNDING
    if "tokens" in how:
        assert len(cut) > 1
    if how["share"] and "tokens" not in how:
        assert sum(batch.real_tokens for batch in cut) < 0.75 * sum(one.whole.length for one in cases)


def test_logits_at_answers_only_change_nothing(model: Any, encoder: Encoder, cases: list[Case]) -> None:
    (batch,) = batches(encoder, [one.item for one in cases])
    losses, found = [], []
    for answer_logits in (True, False):
        loss = row_losses(stock(model), encoder, batch, answer_logits)
        loss.sum().backward()
        losses.append(loss.detach().numpy())
        found.append(gradients(model))
    np.testing.assert_allclose(losses[0], losses[1], rtol=ROUNDING)
    assert distance(found[0], found[1]) < ROUNDING


def test_logits_are_made_at_answers_only(model: Any, encoder: Encoder, cases: list[Case]) -> None:
    (batch,) = batches(encoder, [one.item for one in cases])
    shapes: list[tuple[int, ...]] = []
    hook = stock(model).lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    try:
        row_losses(stock(model), encoder, batch)
        row_losses(stock(model), encoder, batch, answer_logits=False)
    finally:
        hook.remove()
    words = stock(model).lm_head.out_features
    assert shapes == [(len(batch.targets), words), (*batch.input_ids.shape, words)]


def test_losses_are_in_the_order_of_the_targets(model: Any, encoder: Encoder, cases: list[Case]) -> None:
    """Each item's share of a row's losses is its loss alone."""
    import torch

    (batch,) = batches(encoder, [one.item for one in cases])
    with torch.no_grad():
        losses = row_losses(stock(model), encoder, batch)
        wholes = {id(one.item): one.whole for one in cases}
        parts = losses.split([one.encoded.answer_tokens for one in batch.items])
        for one, part in zip(batch.items, parts, strict=True):
            assert float(part.sum()) == pytest.approx(
                float(stock_loss(stock(model), encoder, [wholes[id(one)]])), rel=ROUNDING
            )


def test_a_claim_reads_the_state_of_its_prompt_alone(model: Any, encoder: Encoder) -> None:
    """A claim has no labels: it adds no loss, and is pooled at its prompt's last token, as in generation."""
    import torch

    from medforge.models.forward import hidden_states
    from medforge.models.generate import pooled

    sample = about(("a",), "Is there a nodule?", "no")
    plain = case(encoder, ("a",), "Is there a nodule?", "no").item
    seen_only = encoder.measure(sample.images)
    claims = [Item(encoder.encode_claim(sample, seen_only, answer), ("a",)) for answer in ("yes", "perhaps")]
    (batch,) = batches(encoder, [claims[0], plain, claims[1]])
    assert len(batch.targets) == plain.encoded.answer_tokens
    core = stock(model)
    with torch.no_grad():
        hidden = hidden_states(core, batch, seen(core, encoder, batch)).flatten(0, 1)[batch.taps]
    prompts = [
        encoder.encode_claim(sample, [PICTURES["a"]], "yes"),
        encoder.encode_prompt(sample, [PICTURES["a"]]),
        encoder.encode_claim(sample, [PICTURES["a"]], "perhaps"),
    ]
    np.testing.assert_allclose(hidden.numpy(), pooled(core, encoder, prompts).numpy(), atol=2e-5)


# --- who reads whom


@pytest.fixture(scope="module")
def branches(encoder: Encoder) -> list[Item]:
    """Three questions about one image, of which the second has two turns, and one about another image."""
    return [
        case(encoder, ("a",), "Is there a nodule?", "no").item,
        case(encoder, ("a",), "What is shown?", "a lung", "Is it the left one?", "yes, the left lung").item,
        case(encoder, ("a",), "Where is the lesion?", "upper left lobe").item,
        case(encoder, ("b",), "Which organ is this?", "the liver").item,
    ]


def states(model: Any, encoder: Encoder, batch: Batch) -> Any:
    """The hidden states, [batch x longest, width]."""
    import torch

    from medforge.models.forward import hidden_states

    with torch.no_grad():
        return hidden_states(model, batch, seen(model, encoder, batch)).flatten(0, 1)


def changed(batch: Batch, places: Any) -> Batch:
    """The batch with other tokens at the places that a mask of the flat batch names (never an image's)."""
    ids = batch.input_ids.flatten().clone()
    assert not batch.image_mask.flatten()[places].any()
    ids[places] = ids[places].sub(300).abs()  # another token of the tiny vocabulary, none of the special ones
    assert (ids[places] != batch.input_ids.flatten()[places]).all()
    return replace(batch, input_ids=ids.view_as(batch.input_ids))


@pytest.mark.parametrize("packed", [False, True])
def test_a_branch_is_read_by_none_but_itself(model: Any, encoder: Encoder, branches: list[Item], packed: bool) -> None:
    core = stock(model)
    (batch,) = batches(encoder, branches, packed=packed)
    before = states(core, encoder, batch)
    rows, segments = batch.rows.flatten(), batch.segments.flatten()
    real = segments != PADDING
    names = {(int(row), int(segment)) for row, segment in zip(rows[real], segments[real], strict=True)}
    assert len([name for name in names if name[1] > 0]) == 4
    for row, segment in names:
        own = (rows == row) & (segments == segment)
        moved = (states(core, encoder, changed(batch, own & ~batch.image_mask.flatten())) - before).abs().amax(-1)
        readers = (rows == row) & real if segment == 0 else own
        assert float(moved[real & ~readers].max()) <= 1e-6
        assert float(moved[own][-1]) > 1e-3
        if segment == 0:  # and the prefix is read by all of its branches
            assert all(float(moved[(rows == row) & (segments == n)].max()) > 1e-3 for r, n in names if r == row)


@pytest.mark.parametrize("packed", [False, True])
def test_the_taps_do_not_see_the_answer(model: Any, encoder: Encoder, branches: list[Item], packed: bool) -> None:
    """The last answer's tokens may be anything: what the heads read stays."""
    import torch

    core = stock(model)
    (batch,) = batches(encoder, branches, packed=packed)
    after = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    rows, segments = batch.rows.flatten(), batch.segments.flatten()
    for tap in batch.taps.tolist():
        later = (rows == rows[tap]) & (segments == segments[tap])
        later[: tap + 1] = False
        assert later.any()
        after |= later
    before, found = states(core, encoder, batch), states(core, encoder, changed(batch, after))
    assert float((found - before)[batch.taps].abs().max()) <= 1e-6
    assert float((found - before)[after].abs().max()) > 1e-3


def test_padding_is_read_by_none(model: Any, encoder: Encoder, branches: list[Item]) -> None:
    core = stock(model)
    for items in (branches, [branches[1], branches[0], branches[3]]):
        (batch,) = batches(encoder, items, share=items is branches)
        assert batch.branched == (items is branches)  # with and without a mask of its own
        padding = batch.segments.flatten() == PADDING
        assert padding.any()
        before, found = states(core, encoder, batch), states(core, encoder, changed(batch, padding))
        assert float((found - before)[~padding].abs().max()) <= 1e-6


# --- FlexAttention


@pytest.mark.parametrize("packed", [False, True])
def test_the_block_mask_says_what_the_dense_mask_says(encoder: Encoder, cases: list[Case], packed: bool) -> None:
    import torch

    from medforge.models.forward import block_mask

    (batch,) = batches(encoder, [one.item for one in cases], packed=packed)
    visible, blocks = batch.visible, block_mask(batch)
    assert visible is not None
    lines, length = batch.rows.shape
    b, q, k = torch.meshgrid(torch.arange(lines), torch.arange(length), torch.arange(length), indexing="ij")
    dense = blocks.mask_mod(b.flatten(), torch.zeros(b.numel(), dtype=torch.long), q.flatten(), k.flatten())
    assert torch.equal(dense.view(lines, length, length), visible[:, 0])
    # and a block that is skipped holds nothing that is seen
    side = blocks.BLOCK_SIZE[0]
    kept = blocks.to_dense().bool().expand(lines, -1, -1, -1)
    for line in range(lines):
        for row, column in (~kept[line, 0]).nonzero().tolist():
            assert not visible[line, 0, row * side : (row + 1) * side, column * side : (column + 1) * side].any()


def test_flex_attention_gives_the_dense_masks_losses(
    family: str, encoder: Encoder, cases: list[Case], tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run as plain operations: compiling it for the CPU would take minutes and prove nothing more."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    from medforge.train.speed import use_flex

    masks: list[Any] = []

    def attend(*args: Any, **kwargs: Any) -> Any:
        masks.append(kwargs["block_mask"])
        return flex_attention(*args, **kwargs)

    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda _: attend)
    core = load_model(tiny_models[family], "float32").cpu().eval()
    (batch,) = batches(encoder, [one.item for one in cases], packed=True)
    with torch.no_grad():
        dense = row_losses(core, encoder, batch)
        use_flex(core)
        assert core.model.language_model.config._attn_implementation == "flex_attention"
        assert core.model.visual.config._attn_implementation == "sdpa"
        flex = row_losses(core, encoder, batch, flex=True)
    np.testing.assert_allclose(flex.numpy(), dense.numpy(), rtol=1e-4, atol=1e-5)
    length = batch.input_ids.shape[1]
    assert [tuple(mask.shape) for mask in masks] == [(1, 1, length, length)] * core.config.text_config.num_hidden_layers


# --- the tower


def images_of(model: Any, encoder: Encoder, names: Sequence[str]) -> tuple[Any, Any, list[list[Any]]]:
    """Pixels, grid, and for each image its levels by the stock model."""
    import torch

    values = pixels(encoder, names)
    grid = torch.from_numpy(np.concatenate([encoder.see([PICTURES[name]]).grid for name in names]))
    output = model.model.get_image_features(values, grid)
    levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    return values, grid, [list(parts) for parts in zip(*levels, strict=True)]


@pytest.mark.parametrize("names", [["a"], ["large"], ["a", "large", "b", "a"]], ids=str)
def test_the_tower_says_what_the_stock_model_says(model: Any, encoder: Encoder, family: str, names: list[str]) -> None:
    import torch

    from medforge.models.tower import Tower

    core = stock(model)
    tower = Tower(core)
    with torch.no_grad():
        values, grid, expected = images_of(core, encoder, names)
        before = tower.before(values, grid)
        after, merged = tower.after(values, grid), tower.merge(before)
    assert len(expected) == len(after) == len(merged) == len(before) == len(names)
    for number, levels in enumerate(expected):
        assert len(levels) == (2 if family == "qwen3-vl" else 1)
        patches = int(grid[number].prod())
        assert [tuple(level.shape) for level in levels] == [(patches // MERGE**2, 128)] * len(levels)
        assert [tuple(level.shape) for level in before[number]] == [(patches, 96)] * len(levels)
        for one, two, three in zip(levels, after[number], merged[number], strict=True):
            assert torch.equal(one, two)
            torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-6)


def test_windows_are_put_in_order(tiny_models: dict[str, Path]) -> None:
    """The test above would not see a wrong order if the large image were one window."""
    encoder = Encoder(tiny_models["qwen2.5-vl"], *PIXELS)
    visual = load_model(tiny_models["qwen2.5-vl"], "float32").model.visual
    (_, height, width), windows = encoder.see([PICTURES["large"]]).grid[0], visual.window_size // visual.patch_size
    assert height != width
    assert height > windows
    assert width > windows


def test_features_before_the_merger_are_of_each_image_alone(model: Any, encoder: Encoder) -> None:
    import torch

    from medforge.models.tower import Tower

    tower = Tower(stock(model))
    with torch.no_grad():
        values, grid, _ = images_of(stock(model), encoder, ["large", "b"])
        together = tower.before(values, grid)
        alone = tower.before(*images_of(stock(model), encoder, ["b"])[:2])
    for one, two in zip(together[1], alone[0], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_no_hook_stays_behind(model: Any, encoder: Encoder) -> None:
    import torch

    from medforge.models.tower import Tower

    tower = Tower(stock(model))
    with torch.no_grad():
        values, grid, _ = images_of(stock(model), encoder, ["a"])
        tower.before(values, grid)
        with pytest.raises(RuntimeError):
            tower.before(values[:, :5], grid)
    assert not any(merger._forward_pre_hooks for merger in tower.mergers)


def test_several_deepstack_levels_keep_their_order(tiny_models: dict[str, Path]) -> None:
    """A Qwen3-VL whose tower is tapped twice: levels by the tower, and read by the language model in their order."""
    import torch
    import transformers

    from medforge.models.tower import Tower

    folder = tiny_models["qwen3-vl"]
    encoder = Encoder(folder, *PIXELS)
    config = transformers.AutoConfig.from_pretrained(str(folder))
    config.vision_config.depth = 4
    config.vision_config.deepstack_visual_indexes = [0, 2]
    torch.manual_seed(0)
    core = transformers.Qwen3VLForConditionalGeneration(config).eval()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tower = Tower(core)
    with torch.no_grad():
        values, grid, expected = images_of(core, encoder, ["b", "a"])
        merged = tower.merge(tower.before(values, grid))
        for levels, others in zip(expected, merged, strict=True):
            assert len(levels) == len(others) == 3
            for one, two in zip(levels, others, strict=True):
                torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
        one = case(encoder, ("b", "a"), "What changed?", "The lesion grew.")
        row = make_row([one.item], encoder.image_id, MERGE)
        batch = collate_rows([row], encoder.image_id, encoder.pad_id)
        loss = row_losses(core, encoder, batch).sum()
        assert float(loss) == pytest.approx(float(stock_loss(core, encoder, [one.whole])), rel=ROUNDING)
