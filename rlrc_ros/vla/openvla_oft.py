"""OpenVLA-OFT: a chunk of continuous actions from one pass, instead of a token after another.

Behind the prompt come as many places as the chunk has numbers, their embeddings zero, then the stop
token; every token attends to every other. A small head turns the states that the places are
predicted from into actions. Names are upstream's, so that its checkpoints load key for key.
Reference: Kim, Finn and Liang, Fine-Tuning Vision-Language-Action Models, arXiv 2502.19645.
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import ActionHeadConfig, ArchitectureConfig
from rlrc_ros.vla.openvla import Inputs, OpenVLA


class ResidualBlock(nn.Module):
    """x + ReLU(W · norm(x) + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ResidualMlp(nn.Module):
    """(…, inputs) -> (…, outputs)."""

    def __init__(self, blocks: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class ActionHead(nn.Module):
    """The states of an action's numbers side by side, to the action.

    (B, chunk × dimensions, hidden) -> (B, chunk, dimensions), scaled as the action codec has it.
    """

    def __init__(self, config: ActionHeadConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        inputs = config.dimensions * hidden_size
        self.model = ResidualMlp(config.blocks, inputs, hidden_size, config.dimensions)

    def forward(self, states: Tensor) -> Tensor:
        return self.model(states.reshape(len(states), self.config.chunk, -1))


class OpenVLAOFT(OpenVLA):
    """Images, proprioception and instruction in, a chunk of actions out.

    The sequence is BOS, patches, proprioception (if any), the rest of the prompt, the places of the
    actions, stop token. As in training, where each token predicts the next one, the state that
    stands for a place is the one before it: the first is the prompt's last token's.

    Args:
        config: with an `action_head`.
        n_bins: of the action codec; not used in decoding.
    """

    def __init__(self, config: ArchitectureConfig, n_bins: int) -> None:
        head = config.action_head
        assert head is not None
        super().__init__(config, n_bins, head.places)
        self.action_head = ActionHead(head, config.decoder.hidden_size)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that parameters and bytes are reported by."""
        return super().parts | {"action_head": self.action_head}

    def forward(self, inputs: Inputs) -> Tensor:  # type: ignore[override]
        """One bidirectional pass: (B, chunk, dimensions), scaled as the action codec has it."""
        return self.action_head(self.action_states(inputs))

    def action_states(self, inputs: Inputs) -> Tensor:
        """What the head reads: (B, chunk × dimensions, hidden)."""
        prefix, mask = self.embed(inputs)
        batch, length, hidden = prefix.shape
        assert self.config.action_head is not None
        stop = self.language_model.model.embed_tokens.weight[self.config.action_head.stop_token_id]
        places = prefix.new_zeros(batch, self.action_tokens, hidden)
        embeds = torch.cat([prefix, places, stop.to(prefix.dtype).expand(batch, 1, -1)], 1)
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=prefix.device)
        last = mask.sum(1) - 1
        mask = F.pad(mask, (0, self.action_tokens + 1), value=True)
        states = self.language_model.model(
            inputs_embeds=embeds,
            attention_mask=mask[:, None, None],  # four dimensions: taken as it is, so not causal
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        # Of a padded prompt the last token is not the one before the first place.
        first = states[torch.arange(batch, device=states.device), last]
        return torch.cat([first[:, None], states[:, length : length + self.action_tokens - 1]], 1)

    def generate(self, *_: object, **__: object) -> NoReturn:
        """There are no tokens to decode.

        Raises:
            UserError: always.
        """
        raise UserError("the policy gives chunks of continuous actions (OpenVLA-OFT), not tokens")

    def state(self, *_: object) -> NoReturn:
        """Nor a state that one action hangs on.

        Raises:
            UserError: always.
        """
        self.generate()
