import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from pydantic import ValidationError

from potstill.core.errors import ModelError
from potstill.core.settings import meaning
from potstill.core.store import Store
from potstill.models import EMBEDDED, TransformersModel, adapter_base, identity, parameter_count

EMBEDDED_NAME = "smollm2-135m-instruct"


def model(path, **fields):
    return TransformersModel(path=str(path), **fields)


def test_the_identity_follows_the_weights_and_not_the_path(tiny_model_folder, tmp_path):
    before = identity(model(tiny_model_folder))
    shutil.copytree(tiny_model_folder, tmp_path / "elsewhere" / "copy")
    assert identity(model(tmp_path / "elsewhere" / "copy")) == before
    weights = tiny_model_folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identity(model(tiny_model_folder)) != before


def test_the_identity_follows_the_configuration_but_not_its_provenance(tiny_model_folder):
    before, path = identity(model(tiny_model_folder)), tiny_model_folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"}), encoding="utf-8"
    )
    assert identity(model(tiny_model_folder)) == before
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.5}), encoding="utf-8")
    assert identity(model(tiny_model_folder)) != before


def test_a_stated_identity_stands_for_the_weights():
    assert identity(model("no/such/folder/anywhere", identity="mine")) == "mine"


def test_the_fingerprint_part_follows_the_tokenizer_and_the_template_too(tiny_model_folder, tmp_path):
    before = meaning(model(tiny_model_folder))
    assert str(tiny_model_folder) not in json.dumps(before)
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    with_template = meaning(model(tiny_model_folder, chat_template=str(template)))
    (tiny_model_folder / "chat_template.jinja").write_text("{{ other }}", encoding="utf-8")
    with_other_tokenizer = meaning(model(tiny_model_folder))
    assert len({json.dumps(each) for each in (before, with_template, with_other_tokenizer)}) == 3
    assert with_other_tokenizer["content"]["identity"] == before["content"]["identity"]


def test_how_a_model_is_executed_is_not_what_it_is(tiny_model_folder):
    assert meaning(model(tiny_model_folder, device="cpu", dtype="bfloat16")) == meaning(
        model(tiny_model_folder)
    )


def test_an_embedded_model_is_identified_without_being_fetched(store_root):
    assert meaning(model(EMBEDDED_NAME))["content"] == {"identity": identity(model(EMBEDDED_NAME))}
    assert parameter_count(model(EMBEDDED_NAME)) == 134_515_008
    assert not store_root.exists()


def test_an_embedded_name_comes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / EMBEDDED_NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    assert model(EMBEDDED_NAME).path == EMBEDDED_NAME


def test_a_path_is_found_beside_the_recipe(tiny_model_folder):
    context = {"folders": (tiny_model_folder.parent,)}
    found = TransformersModel.model_validate({"path": f"./{tiny_model_folder.name}"}, context=context)
    assert found.path == str(tiny_model_folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("smollm-135m", "did you mean 'smollm2-135m-instruct'"),
        ("./missing/folder", "no such model file or folder"),
        ("missing/model.gguf", "no such model file or folder"),
        ("model.gguf", "no such model file or folder"),
        ("too/many/parts", "no such model file or folder"),
        ("nobody/nothing", "not in the local hub cache, and the hub is switched off"),
        ("nobody/nothing@v1", "nobody/nothing@v1: is no folder"),
    ],
)
def test_a_path_that_leads_nowhere_says_so_and_how_to_mend_it(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError) as caught:
        identity(model(path))
    assert message in str(caught.value)
    assert caught.value.mend


def test_a_file_or_folder_that_is_no_model_says_what_was_expected(tmp_path):
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"a \.gguf file"):
        identity(model(tmp_path / "notes.txt"))
    with pytest.raises(ModelError, match=r"config\.json"):
        identity(model(tmp_path / "empty"))


def test_a_folder_without_weights_says_so(tiny_model_folder):
    (tiny_model_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        identity(model(tiny_model_folder))


def test_a_configuration_that_is_not_json_says_so(tiny_model_folder):
    (tiny_model_folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="not a JSON object"):
        identity(model(tiny_model_folder))


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError):
        TransformersModel.model_validate({"path": EMBEDDED_NAME, "quantise": "nf4"})


def test_parameters_are_counted_from_the_files_headers(tiny_model_folder, tiny_llama):
    assert parameter_count(model(tiny_model_folder)) == sum(p.numel() for p in tiny_llama.parameters())


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, tiny_model_folder) -> Path:
    """A hub cache holding someone/tiny at one commit."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_model_folder, repository / "snapshots" / "c0ffee")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee", encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_a_cached_hub_model_is_identified_by_its_commit(hub_cache):
    main = identity(model("someone/tiny"))
    assert identity(model("someone/tiny@c0ffee")) == main
    (hub_cache / "snapshots" / "c0ffee").rename(hub_cache / "snapshots" / "decade")
    (hub_cache / "refs" / "main").write_text("decade", encoding="utf-8")
    assert identity(model("someone/tiny")) != main
    assert parameter_count(model("someone/tiny"))


@pytest.fixture
def sealed_adapter(tmp_path):
    """Write an adapter artifact as a train step would, its manifest naming a base."""

    def seal(folder: Path, **extra):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "wrong"}', encoding="utf-8")
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        Store(tmp_path / "s").seal(
            folder, kind="train", fingerprint="f", settings={}, seed=0, seconds=0.0, extra=extra
        )
        return folder

    return seal


def test_the_manifest_and_not_pefts_path_names_the_base(sealed_adapter, tmp_path, tiny_model_folder):
    base = model(tiny_model_folder, quantize="nf4")
    adapter = sealed_adapter(tmp_path / "adapter", base=base.model_dump(), base_identity=identity(base))
    assert adapter_base(adapter) == base
    assert parameter_count(model(adapter)) == parameter_count(base)


def test_an_adapters_identity_follows_its_base(sealed_adapter, tmp_path, tiny_model_folder):
    on_tiny = sealed_adapter(tmp_path / "one", base={"path": str(tiny_model_folder)})
    on_embedded = sealed_adapter(tmp_path / "two", base={"path": EMBEDDED_NAME})
    assert identity(model(on_tiny)) != identity(model(on_embedded))


def test_an_adapter_whose_base_has_changed_is_refused(sealed_adapter, tmp_path, tiny_model_folder):
    adapter = sealed_adapter(tmp_path / "a", base={"path": str(tiny_model_folder)}, base_identity="other")
    with pytest.raises(ModelError, match="was trained on another base"):
        identity(model(adapter))


def test_an_adapter_whose_base_is_gone_is_refused(sealed_adapter, tmp_path):
    adapter = sealed_adapter(tmp_path / "adapter", base={"path": str(tmp_path / "gone")})
    with pytest.raises(ModelError, match="its base model is gone"):
        identity(model(adapter))


def test_a_base_of_the_same_store_is_found_where_the_store_lies_now(
    sealed_adapter, tmp_path, tiny_model_folder
):
    store = tmp_path / "store" / "artifacts"
    shutil.copytree(tiny_model_folder, store / "init-1")
    shutil.copytree(tiny_model_folder, store / "train-1" / "epoch1")
    for made, path in {"one": "init-1", "two": "train-1/epoch1"}.items():
        stated = {"path": f"/elsewhere/artifacts/{path}"}
        adapter = sealed_adapter(store / made, base=stated, base_identity=identity(model(tiny_model_folder)))
        assert adapter_base(adapter).path == str(store / path)
    changed = sealed_adapter(store / "three", base=stated, base_identity="other")
    with pytest.raises(ModelError, match="was trained on another base"):
        adapter_base(changed)
    for path in (
        "/elsewhere/artifacts/init-2",
        "/elsewhere/init-1",
        "/elsewhere/artifacts/../artifacts/init-1",
    ):
        adapter = sealed_adapter(store / path.replace("/", "-"), base={"path": path})
        with pytest.raises(ModelError, match="its base model is gone"):
            adapter_base(adapter)


def test_an_adapter_that_names_no_base_is_refused(sealed_adapter, tmp_path):
    with pytest.raises(ModelError, match="does not name the model that it was trained on"):
        identity(model(sealed_adapter(tmp_path / "adapter")))


def test_an_adapter_on_an_adapter_is_refused(sealed_adapter, tmp_path):
    first = sealed_adapter(tmp_path / "first", base={"path": EMBEDDED_NAME})
    second = sealed_adapter(tmp_path / "second", base={"path": str(first)})
    with pytest.raises(ModelError, match="which is an adapter itself") as caught:
        identity(model(second))
    assert "merge" in str(caught.value.mend)


def test_the_embedded_models_are_pinned():
    for one in EMBEDDED.values():
        assert "==" in one.requirement
        assert len(one.wheel_sha256) == len(one.sha256) == 64


def test_a_hub_model_is_looked_for_by_a_process_that_has_imported_nothing_else() -> None:
    code = "from potstill.models.hub import cached_hub_folder; print(cached_hub_folder('no/such', None))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
