"""GPT-2 (Radford et al., 2019): a small GPT2LMHeadModel of transformers learns Python's documentation by characters.

Each feed-forward block is fused: two of GPT-2's Conv1D, with its tanh-approximated GELU between them. At the end the
model continues a sentence.

python examples/gpt.py [--small]
"""

from options import options

from both import Prepare, Training
from characters import CHARACTERS, FULL, SMALL, Learnt, compare, learn
from prose import import_transformers


def train(prepare: Prepare, small: bool = False) -> Training[Learnt]:
    setting = SMALL if small else FULL
    transformers = import_transformers()
    config = transformers.GPT2Config(
        vocab_size=len(CHARACTERS), n_positions=setting.context, n_embd=setting.width, n_layer=setting.layers, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return (yield from learn(prepare(transformers.GPT2LMHeadModel(config)), setting))


if __name__ == "__main__":
    compare(train, options(__doc__))
