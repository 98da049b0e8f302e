"""What a stage tunes, at which rates, and that what it writes is what it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medforge.files import list_files, read_json, tree_digest
from medforge.models.encode import Encoder
from medforge.models.families import FAMILIES
from medforge.models.load import load_model, stack
from medforge.stages import StageConfig
from medforge.train.adapters import attach, kinds, parameter_groups, save
from medforge.train.features import Features
from tests.unit.models.passes import PIXELS, batches, row_losses, some_cases, stock

torch = pytest.importorskip("torch")

from medforge.models.heads import TaskHeads, load_heads  # noqa: E402
from medforge.train.trainee import Trainee  # noqa: E402

MERGER = [f"model.visual.{m}.linear_fc{n}" for m in ("merger", "deepstack_merger_list.0") for n in (1, 2)]
ATTENTION = [f"model.language_model.layers.{n}.self_attn.{k}_proj" for n in range(3) for k in "qkvo"]


def stage(*tune: str, **changes: Any) -> StageConfig:
    return StageConfig.model_validate({"name": "say", "tune": list(tune) or ["vision_merger"], "steps": 1} | changes)


def attached(base: Path, config: StageConfig, dtype: str = "float32") -> tuple[Any, dict[str, str]]:
    """The model with what the stage tunes; adapters with a B that is not zero, as after some steps."""
    torch.manual_seed(0)
    model, targets = attach(load_model(base, dtype).cpu(), FAMILIES["qwen3-vl"], config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05) if "lora_B" in name else parameter.data.mul_(1.1)
    return model, targets


def trainee_of(model: Any, config: StageConfig, heads: TaskHeads | None = None) -> Trainee:
    from medforge.models.tower import Tower

    core = stock(model) if config.method == "lora" else model
    return Trainee(model, heads, Features(Tower(core), None, None), config.heads, "float32", torch.device("cpu"))


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights_of(trainee: Trainee) -> dict[str, Any]:
    """What the engine hands to `save`."""
    return {name: p.detach().clone() for name, p in trainee.named_parameters() if p.requires_grad}


# --- what is trained


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("tune", [["vision_merger"], ["vision_tower"], ["language_attention", "language_mlp"]], ids=str)
def test_adapters_are_on_the_named_layers_alone(tiny_models: dict[str, Path], family: str, tune: list[str]) -> None:
    model, targets = attach(load_model(tiny_models[family], "float32"), FAMILIES[family], stage(*tune))
    assert trained(model) == {
        f"base_model.model.{name}.lora_{kind}.default.weight" for name in targets for kind in "AB"
    }
    assert set(targets.values()) == set(tune)
    parts = {"vision_merger": "merger", "vision_tower": "visual.blocks", "language_attention": "language_model"}
    assert all(parts[tune[0]] in name for name in targets)


def test_a_full_stage_tunes_the_named_layers_themselves(base: Path) -> None:
    model, targets = attach(load_model(base, "bfloat16"), FAMILIES["qwen3-vl"], stage("vision_merger", method="full"))
    assert list(targets) == [name for name, _ in model.named_modules() if name in MERGER]
    assert trained(model) == {f"{name}.{kind}" for name in MERGER for kind in ("weight", "bias")}
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes[name] for name in trained(model)} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in trained(model)} == {torch.bfloat16}


def test_adapters_of_a_bfloat16_model_are_float32(base: Path) -> None:
    model, _ = attach(load_model(base, "bfloat16"), FAMILIES["qwen3-vl"], stage())
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32}


def test_new_adapters_change_nothing(base: Path) -> None:
    """B is zero at first (arXiv 2106.09685, section 4.1), and A is not."""
    encoder = Encoder(base, *PIXELS)
    (batch,) = batches(encoder, [some_cases(encoder)[0].item])
    plain = load_model(base, "float32")
    model, _ = attach(load_model(base, "float32"), FAMILIES["qwen3-vl"], stage("language_attention"))
    with torch.no_grad():
        expected = row_losses(plain, encoder, batch)
        assert torch.equal(row_losses(stock(model), encoder, batch), expected)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert bool((parameter == 0).all()) == ("lora_B" in name)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 4), (True, 32 / 4**0.5)])
def test_the_scale_of_the_update(base: Path, rslora: bool, scale: float) -> None:
    """W + B A alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
    lora = {"r": 4, "alpha": 32, "rslora": rslora}
    model, targets = attached(base, stage("language_attention", lora=lora))
    plain = load_model(base, "float32").state_dict()
    parts = dict(model.named_parameters())
    merged = model.merge_and_unload().state_dict()
    for name in targets:
        a, b = (parts[f"base_model.model.{name}.lora_{kind}.default.weight"] for kind in "AB")
        assert a.shape[0] == b.shape[1] == 4
        weight = plain[f"{name}.weight"] + scale * b @ a
        torch.testing.assert_close(merged[f"{name}.weight"], weight, rtol=1e-5, atol=1e-6)


def test_dora_by_hand(base: Path) -> None:
    """m (W + B A s) / ||W + B A s||, the norm over each output's row (arXiv 2402.09353, equation 5)."""
    model, targets = attached(base, stage("language_attention", lora={"r": 4, "alpha": 8, "dora": True}))
    plain = load_model(base, "float32").state_dict()
    parts = dict(model.named_parameters())
    assert sum("lora_magnitude_vector" in name for name in trained(model)) == len(targets)
    merged = model.merge_and_unload().state_dict()
    for name in targets:
        a, b = (parts[f"base_model.model.{name}.lora_{kind}.default.weight"] for kind in "AB")
        magnitude = parts[f"base_model.model.{name}.lora_magnitude_vector.default.weight"]
        direction = plain[f"{name}.weight"] + 2 * b @ a
        weight = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
        torch.testing.assert_close(merged[f"{name}.weight"], weight, rtol=1e-4, atol=1e-5)


def test_dropout_is_the_stages(base: Path) -> None:
    model, _ = attach(load_model(base, "float32"), FAMILIES["qwen3-vl"], stage(lora={"dropout": 0.3}))
    rates = {module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.3}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_shared_head_cannot_be_tuned(base: Path, method: str) -> None:
    """In a model whose output layer is the word embedding: tuning the one would change the other behind one's back."""
    model = load_model(base, "float32")
    with pytest.raises(ValueError, match="stage 'say': tune: lm_head shares its weights with the word embedding"):
        attach(model, FAMILIES["qwen3-vl"], stage("language_mlp", "re:lm_head", method=method))


# --- parameter groups


def groups_of(base: Path, config: StageConfig, heads: TaskHeads | None = None) -> list[dict[str, Any]]:
    model, targets = attached(base, config)
    trainee = trainee_of(model, config, heads)
    groups = parameter_groups(trainee, targets, config)
    named = dict(trainee.named_parameters())
    for group in groups:
        assert set(group) == {"params", "names", "lr", "weight_decay"}
        assert all(named[name] is p for name, p in zip(group["names"], group["params"], strict=True))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in named.items() if p.requires_grad)
    return groups


def test_each_entry_has_its_learning_rate(base: Path) -> None:
    queries = r"re:.*language_model.*\.q_proj"
    rates = {"vision_merger": 1e-3, queries: 5e-4}
    config = stage(queries, "vision_merger", "language_attention", learning_rate=1e-4, learning_rates=rates)
    found = {group["lr"]: group["names"] for group in groups_of(base, config)}
    assert set(found) == {1e-3, 5e-4, 1e-4}
    assert all("merger" in name for name in found[1e-3])
    assert all("q_proj" in name for name in found[5e-4])
    assert all("self_attn" in name and "q_proj" not in name for name in found[1e-4])
    assert [len(found[rate]) for rate in (1e-3, 5e-4, 1e-4)] == [2 * 4, 2 * 3, 2 * 9]


def test_biases_take_no_weight_decay(base: Path) -> None:
    config = stage("vision_merger", method="full", weight_decay=0.1)
    found = {group["weight_decay"]: group["names"] for group in groups_of(base, config)}
    assert set(found) == {0.1, 0.0}
    assert sorted(found[0.1]) == sorted(f"model.{name}.weight" for name in MERGER)
    assert sorted(found[0.0]) == sorted(f"model.{name}.bias" for name in MERGER)


def test_doras_magnitudes_take_no_weight_decay(base: Path) -> None:
    config = stage("language_attention", lora={"dora": True}, weight_decay=0.1)
    found = {group["weight_decay"]: group["names"] for group in groups_of(base, config)}
    assert all("lora_magnitude_vector" in name for name in found[0.0])
    assert len(found[0.0]) == len(ATTENTION)
    assert not any("magnitude" in name for name in found[0.1])


def test_the_heads_come_last_at_their_own_rate(base: Path) -> None:
    config = stage(heads={"learning_rate": 7e-3}, weight_decay=0.1)
    groups = groups_of(base, config, TaskHeads(128, True, True))
    heads = [group for group in groups if any(name.startswith("heads.") for name in group["names"])]
    assert groups[-len(heads) :] == heads
    # the log-variances have a rate of their own: tests/unit/models/heads
    layers = [group for group in heads if not any("log_variance" in name for name in group["names"])]
    assert {group["lr"] for group in layers} == {7e-3}
    decayed = [name for group in heads if group["weight_decay"] for name in group["names"]]
    assert sorted(decayed) == sorted(
        f"heads.{head}_head.{layer}.weight" for head in ("region", "match") for layer in (1, 3)
    )
    idle = [name for group in heads if not group["weight_decay"] for name in group["names"]]
    assert {f"heads.log_variance.{task}" for task in ("language", "region", "match")} < set(idle)


# --- files


CONFIGS = {
    "lora": stage("vision_merger", "language_attention"),
    "rslora": stage("vision_merger", "language_mlp", lora={"r": 4, "alpha": 16, "rslora": True}),
    "dora": stage("vision_merger", "language_attention", lora={"dora": True}),
    "full": stage("vision_merger", "language_mlp", method="full"),
    "tower": stage("vision_tower", method="full"),
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_what_is_written_is_what_was_trained(base: Path, tmp_path: Path, kind: str) -> None:
    """Loaded by the stack, the model gives the losses that it gave in training."""
    config = CONFIGS[kind]
    model, _ = attached(base, config)
    trainee = trainee_of(model, config)
    save(trainee, weights_of(trainee), config, tmp_path / "01-say")
    assert stack(tmp_path) == [tmp_path / "01-say"]
    loaded = load_model(base, "float32", stack(tmp_path)).cpu()
    encoder = Encoder(base, *PIXELS)
    (batch,) = batches(encoder, [one.item for one in some_cases(encoder)])
    with torch.no_grad():
        before = row_losses(load_model(base, "float32").cpu(), encoder, batch)
        expected = row_losses(trainee.stock.eval(), encoder, batch)
        found = row_losses(loaded, encoder, batch)
    assert float((expected - before).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_weights_that_are_given_are_written(base: Path, tmp_path: Path, kind: str) -> None:
    """Not the model's own: those of the best step, or what ZeRO-3 gathered."""
    from safetensors.torch import load_file

    config = CONFIGS[kind]
    model, _ = attached(base, config)
    trainee = trainee_of(model, config)
    given = {name: torch.full_like(tensor, number) for number, (name, tensor) in enumerate(weights_of(trainee).items())}
    save(trainee, given, config, tmp_path / "a")
    (path,) = (tmp_path / "a").glob("*.safetensors")
    found = load_file(path)
    assert len(found) == len(given)
    if config.method == "full":
        assert found.keys() == {name.removeprefix("model.") for name in given}
    else:
        assert found.keys() == {
            name.removeprefix("model.").replace(".default", "").removesuffix(".weight") + suffix
            for name in given
            for suffix in (["" if "magnitude" in name else ".weight"])
        }
    assert sorted(float(tensor.flatten()[0]) for tensor in found.values()) == [float(n) for n in range(len(given))]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_same_weights_give_the_same_bytes(base: Path, tmp_path: Path, kind: str) -> None:
    """Whatever the order in which a process holds them, and wherever the base lies."""
    config = CONFIGS[kind].model_copy(update={"heads": stage(heads={}).heads})
    torch.manual_seed(5)
    heads = TaskHeads(128, True, True)
    folders = []
    for number in range(2):
        model, _ = attached(base, config)
        model.name_or_path = f"somewhere/{number}"
        trainee = trainee_of(model, config, heads)
        weights = weights_of(trainee)
        folders.append(tmp_path / str(number) / "01-say")
        save(trainee, dict(sorted(weights.items(), reverse=bool(number))), config, folders[-1])
    assert tree_digest(folders[0]) == tree_digest(folders[1])
    own = ["weights.safetensors"] if kind == "full" else ["adapter_config.json", "adapter_model.safetensors"]
    assert list_files(folders[0]) == sorted([*own, "heads/heads.json", "heads/heads.safetensors"])
    for path in folders[0].rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o644
            assert b"somewhere" not in path.read_bytes()
            assert str(base).encode() not in path.read_bytes()


def test_the_adapters_description_names_no_machine(base: Path, tmp_path: Path) -> None:
    config = stage("language_attention", lora={"r": 4, "alpha": 8, "rslora": True, "dora": True})
    model, targets = attached(base, config)
    trainee = trainee_of(model, config)
    save(trainee, weights_of(trainee), config, tmp_path / "a")
    found = read_json(tmp_path / "a" / "adapter_config.json")
    assert found["target_modules"] == sorted(targets)
    assert found["base_model_name_or_path"] is None
    assert (found["r"], found["lora_alpha"], found["use_rslora"], found["use_dora"]) == (4, 8, True, True)


@pytest.mark.parametrize(("region", "match"), [(True, True), (True, False), (False, True)])
def test_the_heads_are_saved_along(base: Path, tmp_path: Path, region: bool, match: bool) -> None:
    config = stage(heads={"region": region, "match": match})
    torch.manual_seed(3)
    heads = TaskHeads(128, region, match)
    assert kinds(heads) == (region, match)
    model, _ = attached(base, config)
    trainee = trainee_of(model, config, heads)
    given = {name: tensor + 1 if name.startswith("heads.") else tensor for name, tensor in weights_of(trainee).items()}
    save(trainee, given, config, tmp_path / "a")
    loaded = load_heads(tmp_path / "a")
    assert loaded is not None
    assert kinds(loaded) == (region, match)
    expected = heads.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name] + 1) for name, tensor in loaded.state_dict().items())


def test_without_heads_none_are_written(base: Path, tmp_path: Path) -> None:
    model, _ = attached(base, stage())
    trainee = trainee_of(model, stage())
    save(trainee, weights_of(trainee), stage(), tmp_path / "a")
    assert load_heads(tmp_path / "a") is None
    assert list_files(tmp_path / "a") == ["adapter_config.json", "adapter_model.safetensors"]
