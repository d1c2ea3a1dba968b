"""The model of "World Models": a VAE, and an LSTM over its latents that predicts the next one.

    h_t, c_t = LSTM(h_{t-1}, c_{t-1}, z_{t-1}, a_{t-1})
    posterior   q(z_t | x_t)
    transition  p(z_t | h_t): a mixture in the paper, any distribution here

No gradient flows from the LSTM into the latents: the encoder learns from the reconstruction, the KL to the marginal, and the
heads' losses at z itself.

Source: Ha and Schmidhuber 2018, sections 2.1 and 2.2; there the VAE is trained first and the LSTM after it.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldmodel.dynamics.base import DynamicsConfig, RecurrentDynamics, RecurrentState
from worldmodel.nn.networks import linear
from worldmodel.registry import register


class LSTM(nn.Module):
    """An LSTM cell without biases, whose forget gate is open at first.

        i, f, o, g = W x + U h
        c' = sigmoid(f + 1) * c + sigmoid(i) * tanh(g),   h' = sigmoid(o) * tanh(c')

    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000 for f; Jozefowicz et al. 2015 for the 1 in it.
    """

    def __init__(self, units: int):
        super().__init__()
        self.recurrent = linear(units, 4 * units, bias=False)

    def forward(
        self, projected: Float[Tensor, "N G"], h: Float[Tensor, "N D"], c: Float[Tensor, "N D"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
        """(h', c') from W x; G = 4 D."""
        i, f, o, g = (projected + self.recurrent(h)).to(c.dtype).chunk(4, -1)
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class MDNRNNConfig(DynamicsConfig):
    """Sizes, and the kind of latent."""

    kind: Literal["mdn_rnn"] = "mdn_rnn"


@register("dynamics", "mdn_rnn", MDNRNNConfig)
class MDNRNN(RecurrentDynamics):
    """h and c move by an LSTM."""

    stop_gradient = True

    @property
    def combined_dim(self) -> int:
        return 4 * self.config.deter

    def _make_recurrence(self) -> None:
        self.lstm = LSTM(self.config.deter)

    def zero_recurrent(self, batch_size: int) -> RecurrentState:
        zeros = self.z_in.weight.new_zeros(batch_size, self.config.deter)
        return {"h": zeros, "c": zeros}

    def project(self, combined: Float[Tensor, "*N X"]) -> Float[Tensor, "*N G"]:
        return combined

    def cell(self, projected: Float[Tensor, "N G"], recurrent: RecurrentState) -> RecurrentState:
        h, c = self.lstm(projected, recurrent["h"], recurrent["c"])
        return {"h": h, "c": c}

    def compile_step(self) -> None:
        self.lstm.compile()
