"""Llama (Touvron et al., 2023): a small LlamaForCausalLM of transformers learns Python's documentation by characters.

The feed-forward block of Llama is a gated MLP, down(silu(gate(x)) * up(x)) (Shazeer, 2020). In each block gate, up,
SiLU and the product are fused: one call of dlkernels.functional.linear_glu. At the end the model continues a sentence.

python examples/llama.py [--small]
"""

from options import options

from both import Prepare, Training
from characters import CHARACTERS, FULL, SMALL, Learnt, compare, learn
from prose import import_transformers


def train(prepare: Prepare, small: bool = False) -> Training[Learnt]:
    setting = SMALL if small else FULL
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=len(CHARACTERS), max_position_embeddings=setting.context, hidden_size=setting.width,
        intermediate_size=setting.width * 11 // 4, num_hidden_layers=setting.layers, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return (yield from learn(prepare(transformers.LlamaForCausalLM(config)), setting))


if __name__ == "__main__":
    compare(train, options(__doc__))
