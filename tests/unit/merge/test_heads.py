"""The task heads of the last stage that has any go with the merged model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medforge.config import ModelConfig
from medforge.files import read_json, sha256_file, tree_digest
from medforge.merge import run
from medforge.models.load import load_model

HEADS = ("heads/heads.json", "heads/heads.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A stack of three adapters that do something, without heads."""
    import torch
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("plain")
    for number, name in enumerate(("01-see", "02-ground", "03-say")):
        torch.manual_seed(number)
        config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
        get_peft_model(load_model(base, "float32").cpu(), config).save_pretrained(str(folder / name))
    return folder


@pytest.fixture
def stages(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "adapters"))


def give_heads(folder: Path, seed: int) -> list[str]:
    """Put untrained heads of a seed into a folder; returns their files' digests."""
    import torch

    from medforge.models.heads import TaskHeads, save_heads

    torch.manual_seed(seed)
    save_heads(TaskHeads(16, True, True), folder)
    return digests(folder)


def digests(folder: Path) -> list[str]:
    return [sha256_file(folder / name) for name in HEADS]


def test_the_last_heads_of_the_stack_are_copied(base: Path, phantoms: Path, stages: Path, tmp_path: Path) -> None:
    first, second = give_heads(stages / "01-see", 1), give_heads(stages / "02-ground", 2)
    assert first != second
    proof = run(base, stages, phantoms, tmp_path / "one", ModelConfig())
    assert digests(tmp_path / "one") == second
    assert proof["weights"]["heads/heads.safetensors"] == second[HEADS.index("heads/heads.safetensors")]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "one").rglob("*") if path.is_file()} == {0o644}
    run(base, stages, phantoms, tmp_path / "two", ModelConfig())
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    load_model(tmp_path / "one", "float32")  # the heads' file does not count as the model's weights


def test_a_base_with_heads_keeps_them_unless_a_stage_has_its_own(
    base: Path, phantoms: Path, stages: Path, tmp_path: Path
) -> None:
    headed = Path(shutil.copytree(base, tmp_path / "base"))
    its_own = give_heads(headed, 3)
    run(headed, stages, phantoms, tmp_path / "one", ModelConfig())
    assert digests(tmp_path / "one") == its_own
    trained = give_heads(stages / "03-say", 4)
    run(headed, stages, phantoms, tmp_path / "two", ModelConfig())
    assert digests(tmp_path / "two") == trained != its_own


def test_without_heads_there_are_none(base: Path, phantoms: Path, stages: Path, tmp_path: Path) -> None:
    run(base, stages, phantoms, tmp_path / "model", ModelConfig())
    assert not list((tmp_path / "model").glob("heads.*"))
    assert set(read_json(tmp_path / "model" / "merge_proof.json")["weights"]) == {"model.safetensors"}


def test_broken_heads_leave_nothing(base: Path, phantoms: Path, stages: Path, tmp_path: Path) -> None:
    give_heads(stages / "03-say", 1)
    (stages / "03-say" / "heads/heads.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"03-say.*heads\.safetensors"):
        run(base, stages, phantoms, tmp_path / "model", ModelConfig())
    assert not (tmp_path / "model").exists()
