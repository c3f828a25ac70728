"""A tiny GPT-2 over characters, made from its configuration alone, the text it learns, and its optimizer."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from examples.chargpt.text import CONTEXT
from sassha_fused import Sassha


class Windows(Dataset):
    """Pieces of a text, one after the other, as the Trainer takes them: CONTEXT characters each."""

    def __init__(self, characters: Tensor) -> None:
        self._pieces = characters.unfold(0, CONTEXT, CONTEXT)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self._pieces[i], "labels": self._pieces[i]}  # the model shifts its labels itself


def model_of(characters: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=96,
        vocab_size=characters,
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # for the Trainer, which then counts the tokens that the loss counts
    return model


def optimizer_of(parameters: Iterable[nn.Parameter], lr: float = 0.3) -> Sassha:
    return Sassha(parameters, lr=lr, rho=0.02, hessian_power=1.0, bias_correction="update", hessian_interval=10)
