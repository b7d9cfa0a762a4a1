"""Small models with random weights from torchvision, transformers and torch, and a mode that counts their sites.

``MODELS`` maps a name to a function that returns a model and its inputs (a tensor or a dict of keyword arguments).
"""

import contextlib
import importlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dlkernels.data.vision import import_torchvision


def _torch_encoder(**settings):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 6, 16)


def _torch_transformer():
    model = nn.Transformer(16, 2, 1, 2, 32, activation="gelu", batch_first=True)
    return model, {"src": torch.randn(2, 6, 16), "tgt": torch.randn(2, 4, 16)}


def _vision(name, pixels=64, **settings):
    models = import_torchvision().models
    return models.get_model(name, weights=None, num_classes=7, **settings), torch.randn(2, 3, pixels, pixels)


def _alexnet():
    """It has 32 hidden features instead of 4096, to keep the test fast."""
    model, x = _vision("alexnet")
    model.classifier[1], model.classifier[4] = nn.Linear(256 * 6 * 6, 32), nn.Linear(32, 32)
    model.classifier[6] = nn.Linear(32, 7)
    return model, x


def _vit():
    models = import_torchvision().models
    model = models.VisionTransformer(16, 8, 2, 2, 32, 64, num_classes=7, representation_size=24)
    nn.init.normal_(model.heads.head.weight)  # otherwise they are zero, and so are all gradients
    return model, torch.randn(2, 3, 16, 16)


def _swin(version):
    swin = importlib.import_module("torchvision.models.swin_transformer")
    parts = {1: {}, 2: {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}}[version]
    model = swin.SwinTransformer([2, 2], 16, [2, 1], [2, 2], [4, 4], num_classes=7, **parts)
    return model, torch.randn(2, 3, 32, 32)


def _convnext():
    convnext = importlib.import_module("torchvision.models.convnext")
    blocks = [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 1)]
    return convnext.ConvNeXt(blocks, layer_scale=0.5, num_classes=7), torch.randn(2, 3, 32, 32)


def _maxvit():
    models = import_torchvision().models
    model = models.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=7)
    return model, torch.randn(2, 3, 32, 32)


def _box_head():
    faster_rcnn = importlib.import_module("torchvision.models.detection.faster_rcnn")
    return faster_rcnn.TwoMLPHead(16, 24), torch.randn(3, 4, 2, 2)


def _vision_mlp():
    import_torchvision()
    return importlib.import_module("torchvision.ops").MLP(8, [16, 16, 4], activation_layer=nn.GELU), torch.randn(5, 8)


def googlenet():
    """It has its auxiliary heads, as in training mode."""
    return _vision("googlenet", aux_logits=True, init_weights=False)


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _language(kind, **settings):
    with contextlib.suppress(ImportError):  # transformers imports it if it is installed, and would fail there
        import_torchvision()
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **settings})
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    if model.main_input_name == "pixel_values":
        pixels = config.image_size
        return model, {"pixel_values": torch.randn(2, 3, pixels, pixels)}
    inputs = {"input_ids": torch.randint(5, 99, (2, 9))}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, 99, (2, 7))
    return model, inputs


_HEADS = {"n_embd": 32, "n_layer": 2, "n_head": 2}
_T5 = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2}
_BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_PATCHES = {"image_size": 32, "patch_size": 8}

TORCH = {
    "encoder": _torch_encoder,
    "encoder-gelu-norm-first": partial(_torch_encoder, activation="gelu", norm_first=True),
    "encoder-silu-module": partial(_torch_encoder, activation=nn.SiLU()),
    "transformer": _torch_transformer,
}
VISION = {
    "alexnet": _alexnet,
    "resnet18": _vision,
    "mobilenet_v3_small": _vision,
    "squeezenet1_1": _vision,
    "vit": _vit,
    "swin": partial(_swin, 1),
    "swin_v2": partial(_swin, 2),
    "convnext": _convnext,
    "maxvit": _maxvit,
    "box_head": _box_head,
    "ops.MLP": _vision_mlp,
}
VISION = {n: partial(f, n) if getattr(f, "func", f) is _vision else f for n, f in VISION.items()}
LANGUAGE = {
    "albert": {"embedding_size": 16},
    "bart": _BART,
    "beit": _PATCHES,
    "bert": {},
    "bert-relu": {"hidden_act": "relu"},
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "clip_text_model": {},
    "ctrl": {**_HEADS, "dff": 48},
    "deberta-v2": {},
    "deit": _PATCHES,
    "dinov2": {"image_size": 28, "patch_size": 14},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
    "electra": {"embedding_size": 16},
    "gemma": _GROUPED,
    "gpt2": _HEADS,
    "gpt2-relu": {**_HEADS, "activation_function": "relu"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2},
    "gpt_neox": {},
    "gptj": {**_HEADS, "rotary_dim": 8},
    "llama": {"num_key_value_heads": 2},
    "mistral": _GROUPED,
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "mpnet": {},
    "mt5": _T5,
    "nystromformer": {"num_landmarks": 3, "segment_means_seq_len": 9},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "qwen2": {"num_key_value_heads": 2},
    "roberta": {},
    "t5": _T5,
    "vit_hf": _PATCHES,
}
_KINDS = {"vit_hf": "vit", "bert-relu": "bert", "gpt2-relu": "gpt2"}
MODELS = {
    **{f"torch:{n}": f for n, f in TORCH.items()},
    **{f"torchvision:{n}": f for n, f in VISION.items()},
    **{f"transformers:{n}": partial(_language, _KINDS.get(n, n), **s) for n, s in LANGUAGE.items()},
}


# ---- the witness -----------------------------------------------------------------------------------------------------

_FUNCTIONS = {
    *(F.relu, F.leaky_relu, F.gelu, F.silu, F.tanh, F.sigmoid),
    *(torch.relu, torch.relu_, torch.tanh, torch.sigmoid),
    *(torch.Tensor.relu, torch.Tensor.relu_, torch.Tensor.tanh, torch.Tensor.sigmoid),
}
# Activations of several operators: the first one does not identify them.
_COMPOSITE = ("NewGELUActivation", "AccurateGELUActivation", "ReLUSquaredActivation")


def _is_linear(module):
    return type(module).__name__ == "Conv1D" or (
        isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    )


class _Witness(TorchFunctionMode):
    """Sees every called function of torch, and follows the outputs of linear layers."""

    def __init__(self):
        super().__init__()
        self.outputs, self.uses, self.alive, self.inside = {}, {}, [], 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        mine = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and id(t) in self.outputs]
        if not self.inside and "__get__" not in repr(function):
            for t in mine:
                self.uses[id(t)].append(function in _FUNCTIONS)
        result = function(*args, **kwargs)
        for t in mine:
            if result is t and function in (F.relu, torch.relu_, torch.Tensor.relu_, F.silu):
                self.seal(t)  # overwritten: from here on it is the activation's value
        return result

    def seal(self, t):
        linear = self.outputs.pop(id(t))
        self.sealed.append((linear, self.uses.pop(id(t))))

    sealed: list


def linear_outputs_into_activations(model, run):
    """Return the linear layers of ``model`` whose output goes only to one activation when ``run`` runs it."""
    witness, handles = _Witness(), []
    witness.sealed = []

    def leaves_linear(module, inputs, output):
        witness.alive.append(output)  # so that no other tensor gets its id
        witness.outputs[id(output)], witness.uses[id(output)] = module, []

    def enters_composite(module, inputs):
        if id(inputs[0]) in witness.outputs:
            witness.uses[id(inputs[0])].append(True)
        witness.inside += 1

    def leaves_composite(module, inputs, output):
        witness.inside -= 1

    for module in model.modules():
        if _is_linear(module):
            handles.append(module.register_forward_hook(leaves_linear))
        elif type(module).__name__ in _COMPOSITE:
            handles.append(module.register_forward_pre_hook(enters_composite))
            handles.append(module.register_forward_hook(leaves_composite))
    with witness, torch.no_grad():
        run(model)
    for handle in handles:
        handle.remove()
    followed = witness.sealed + [(linear, witness.uses[key]) for key, linear in witness.outputs.items()]
    return {linear for linear, uses in followed if uses == [True]}
