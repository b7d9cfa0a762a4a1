"""Families of transformers that nobody looked at while ``fuse`` learned its forms.

It found their blocks at first sight. A form that only fits the models it was written for would not.
"""

import copy

import pytest
import torch

from dlkernels import fuse
from tests.fusion.fusable import decided_glus, fused_runs
from tests.fusion.zoo import _GROUPED, _HEADS, _PATCHES, _T5, _language

_HEAD_GROUPS = {"num_key_value_heads": 2}
# Each with the gated blocks of a call.
GATED = {
    "modernbert": (2, {}),
    "gemma3_text": (2, _GROUPED),
    "lfm2": (2, _HEAD_GROUPS),
    "exaone4": (2, _GROUPED),
    "diffllama": (2, _HEAD_GROUPS),
    "bitnet": (2, _HEAD_GROUPS),
    "doge": (2, _HEAD_GROUPS),
    "dinov3_vit": (2, {**_PATCHES, "use_gated_mlp": True}),
    "pixtral": (2, _PATCHES),
    "umt5": (4, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "glm4": (2, _GROUPED),
    "cohere2": (2, _GROUPED),
    "hunyuan_v1_dense": (2, _GROUPED),
    "vaultgemma": (2, _GROUPED),
    "ministral": (2, _GROUPED),
    "nomic_bert": (2, {}),
    "eurobert": (2, _HEAD_GROUPS),
}
# Each with the chains of a call, of two layers.
CHAINS = {
    "persimmon": (2, {}),
    "nemotron": (2, _HEAD_GROUPS),
    "arcee": (2, _HEAD_GROUPS),
    "siglip_vision_model": (3, _PATCHES),
    "switch_transformers": (24, _T5),
    "mpt": (2, {"d_model": 32, "n_layers": 2, "n_heads": 2}),
    "codegen": (2, {**_HEADS, "rotary_dim": 8}),
    "xglm": (2, {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2}),
    "gpt_bigcode": (2, _HEADS),
}


def of(kind, settings):
    """Stock's model, the fused one, and their inputs. Skips what this version of transformers lacks or cannot run."""
    torch.manual_seed(0)
    try:
        model, inputs = _language(kind, **settings)
        model.eval()
        with torch.no_grad():
            model(**inputs)
    except Exception as missing:
        pytest.skip(f"stock: {missing}")
    return copy.deepcopy(model), fuse(model), inputs


def assert_same(model, stock, inputs):
    """Outputs, and the gradient of every parameter."""
    y, expected = model(**inputs)[0], stock(**inputs)[0]
    torch.testing.assert_close(y, expected)
    y.square().mean().backward()
    expected.square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", GATED)
def test_gated_blocks(kind):
    blocks, settings = GATED[kind]
    stock, model, inputs = of(kind, settings)
    with decided_glus() as counted:
        assert_same(model, stock, inputs)
    assert len(counted) == blocks


@pytest.mark.parametrize("kind", CHAINS)
def test_chains(kind):
    chains, settings = CHAINS[kind]
    stock, model, inputs = of(kind, settings)
    with fused_runs() as runs:
        assert_same(model, stock, inputs)
    assert (runs.ops, runs.layers) == (chains, 2 * chains)
