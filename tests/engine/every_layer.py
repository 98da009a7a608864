"""A network with layers of every kind of rule, for what must hold of all of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class EveryLayer(nn.Module):
    """Layers with rules, chains, and calls that have no rule; some draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.Dropout2d(0.1),
        )
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.recurrent = nn.GRU(8, 8, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.features(x).flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(F.dropout(self.recurrent(tokens)[0].mean(1), 0.1, self.training))
