"""The peer of training: the same network, loss and update in plain PyTorch (extra `benchmark`).

Modules bear the names of their counterparts in `dopfn_jax.model`, whose weights they load. Missing
cells are left out, since the paper's prior has none, and so are the regressions of `linear_fit`.

Axes: B tasks, N context rows, R rows (context first, then queries), F covariates, C tokens per row,
D width, H heads, P features of a cell, Q buckets.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dopfn_jax.config import Config, ModelConfig
from dopfn_jax.model.embedding import OutcomeEmbedding as Outcome
from dopfn_jax.model.embedding import RowEmbedding as Row
from dopfn_jax.model.standardise import LINEAR_RANGE
from dopfn_jax.prior import Task
from dopfn_jax.training.score import TARGET_LIMIT

# Median of |Z| for a standard normal Z: a tail's scale is its bucket's width over it.
_HALF_NORMAL_MEDIAN = 0.6744897501960817
_LOG_PEAK = math.log(_HALF_NORMAL_MEDIAN * math.sqrt(2 / math.pi))


class Trainer:
    """One network and its update by AdamW: clipping and a moving average, as in the JAX step.

    Args:
        config: model and training; the arithmetic is float32, whatever it says.
        weights: of the JAX model, by dotted name.
        device: such as "cpu" or "cuda".
    """

    def __init__(self, config: Config, weights: Mapping[str, NDArray], device: str):
        training = config.training
        self.device = device
        self.model = DoPFN(config.model)
        self.model.load_state_dict(_translate(weights), strict=True)
        self.model.to(device)
        self._clip_norm = training.clip_norm
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self._average = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(training.ema_decay)
        )

    def load(self, task: Task) -> dict[str, Tensor]:
        """A batch on the device, by field."""
        names = "context_x context_t context_y context_mask covariate_mask query_x query_t query_y"
        fields = (*names.split(), "query_mask", "valid")
        arrays = {name: np.array(getattr(task, name)) for name in fields}
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """Forward, backward and update; the loss before it."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self._optimizer.step()
        self._average.update_parameters(self.model)
        return loss.item()  # which also waits for the device


class DoPFN(nn.Module):
    """`dopfn_jax.model.transformer.DoPFN`."""

    borders: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.register_buffer("borders", torch.zeros(config.buckets + 1))
        self.embedding = (
            CellEmbedding(config) if config.features_per_token else RowEmbedding(config.width)
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head_norm = _norm(config.width)
        self.head_hidden = nn.Linear(config.width, 2 * config.width)
        self.head = nn.Linear(2 * config.width, config.buckets)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, M, Q) of the queries and their standardised targets (B, M)."""
        mask, columns = batch["context_mask"], batch["covariate_mask"]
        x_loc, x_scale = _moments(batch["context_x"], mask[..., None])
        y_loc, y_scale = _moments(batch["context_y"], mask)
        x = torch.cat([batch["context_x"], batch["query_x"]], dim=1)
        x = torch.where(columns[:, None], _compress((x - x_loc) / x_scale), 0.0)
        t = torch.cat([batch["context_t"], batch["query_t"]], dim=1)
        y = torch.where(mask, _compress((batch["context_y"] - y_loc) / y_scale), 0.0)
        tokens, token_mask = self.embedding(x, t, y, mask, columns)
        token_bias, row_bias = _bias(token_mask), _bias(mask)
        for layer in self.layers:
            tokens = layer(tokens, mask.shape[1], token_bias, row_bias)
        last = self.head_norm(tokens[:, -1, mask.shape[1] :])
        logits = self.head(F.gelu(self.head_hidden(last), approximate="tanh"))
        return logits, (batch["query_y"] - y_loc) / y_scale

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood of the bar distribution over the rows that count."""
        logits, target = self(batch)
        y = target.clamp(-TARGET_LIMIT, TARGET_LIMIT)
        widths = self.borders.diff()
        peaks = -widths.log()
        peaks[[0, -1]] += _LOG_PEAK
        scales = widths[[0, -1]] / _HALF_NORMAL_MEDIAN
        lower = ((self.borders[1] - y) / scales[0]).clamp(min=0)
        upper = ((y - self.borders[-2]) / scales[1]).clamp(min=0)
        bucket = torch.bucketize(y, self.borders[1:-1], right=True)
        log_mass = F.log_softmax(logits, -1).gather(-1, bucket[..., None])[..., 0]
        log_prob = log_mass + peaks[bucket] - 0.5 * (lower**2 + upper**2)
        weight = (batch["query_mask"] & batch["valid"][:, None]).float()
        return -(log_prob * weight).sum() / weight.sum().clamp(min=1)


class Layer(nn.Module):
    """`dopfn_jax.model.transformer.Layer`, context and query rows in one array."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, heads = config.width, config.heads
        self.several_tokens = config.features_per_token > 0
        if self.several_tokens:
            self.token_norm, self.token_attention = _norm(width), Attention(width, heads)
        self.row_norm, self.row_attention = _norm(width), Attention(width, heads)
        self.mlp_norm = _norm(width)
        self.up = nn.Linear(width, config.mlp_ratio * width)
        self.down = nn.Linear(config.mlp_ratio * width, width)

    def forward(
        self, tokens: Tensor, context_rows: int, token_bias: Tensor, row_bias: Tensor
    ) -> Tensor:
        """Tokens (B, C, R, D) after this layer."""
        if self.several_tokens:
            by_row = self.token_norm(tokens.transpose(1, 2))
            tokens = tokens + self.token_attention(by_row, by_row, token_bias).transpose(1, 2)
        normed = self.row_norm(tokens)
        tokens = tokens + self.row_attention(normed, normed[:, :, :context_rows], row_bias)
        return tokens + self.down(F.relu(self.up(self.mlp_norm(tokens))) ** 2)


class Attention(nn.Module):
    """Attention of (B, A, M, D) to (B, A, N, D) tokens with a (B, N) bias, per B and A."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, tokens: Tensor, source: Tensor, bias: Tensor) -> Tensor:
        """What each token reads, (B, A, M, D)."""
        across = tokens.shape[1]
        mixed = F.scaled_dot_product_attention(
            self._split_heads(self.query(tokens)),
            self._split_heads(self.key(source)),
            self._split_heads(self.value(source)),
            attn_mask=bias.repeat_interleave(across, 0)[:, None, None],
        )
        return self.out(mixed.transpose(1, 2).reshape(tokens.shape))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        *_, length, width = tokens.shape
        split = tokens.reshape(-1, length, self.heads, width // self.heads)
        return split.transpose(1, 2)


class RowEmbedding(nn.Module):
    """`dopfn_jax.model.embedding.RowEmbedding`."""

    def __init__(self, width: int):
        super().__init__()
        p, j, h = Row.CELL_FEATURES, Row.OUTCOME_FEATURES, Row.DESCRIPTION
        self.cell_slope, self.cell_shift = (nn.Parameter(torch.zeros(p - 2)) for _ in range(2))
        self.moments = nn.Linear(3, j - 4)
        self.describe = nn.Linear(p * j, h)
        self.mix = nn.Linear(h, h)
        self.pool = nn.Linear(h, h, bias=False)
        self.readout = nn.Linear(h, p * width)
        self.treatment = nn.Linear(1, width)
        self.outcome = OutcomeEmbedding(width)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1, R, D) and their mask (B, 1); x and t of all rows, y of the context."""
        tasks, rows, covariates = x.shape
        context = y.shape[1]
        steps = torch.tanh(self.cell_slope * (x[..., None] - self.cell_shift))
        cells = torch.cat([x[..., None], torch.zeros_like(x)[..., None], steps], dim=-1)
        p = cells.shape[-1]

        ty = torch.stack([t[:, :context], y, t[:, :context] * y], dim=-1)
        ones = torch.ones_like(y)[..., None]
        outcomes = torch.cat([ones, ty, torch.tanh(self.moments(ty))], dim=-1)
        outcomes = outcomes * mask[..., None]
        flat = cells.flatten(2)  # (B, R, F P)
        moments = flat[:, :context].transpose(1, 2) @ outcomes
        moments = moments.reshape(tasks, covariates, -1) / mask.sum(-1)[:, None, None]
        description = _gelu(self.describe(moments))
        exists = columns[..., None]
        count = exists.sum(1, keepdim=True).clamp(min=1)
        others = (description * exists).sum(1, keepdim=True) / count
        description = _gelu(self.mix(description) + self.pool(others))
        readout = self.readout(description) / p**0.5 * exists
        tokens = flat @ readout.reshape(tasks, covariates * p, -1)
        tokens = tokens + self.treatment(t[..., None]) + self.outcome(y, rows - context)
        return tokens[:, None], torch.ones_like(columns[:, :1])


class CellEmbedding(nn.Module):
    """`dopfn_jax.model.embedding.CellEmbedding`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.group = config.features_per_token
        self.cells = nn.Linear(2 * self.group, config.width)
        self.treatment = nn.Linear(1, config.width)
        self.outcome = OutcomeEmbedding(config.width)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, C, R, D) and their mask (B, C); arguments as for `RowEmbedding`."""
        fill = -x.shape[-1] % self.group
        x, columns = F.pad(x, (0, fill)), F.pad(columns, (0, fill))
        cells = torch.stack([x, torch.zeros_like(x)], dim=-1)
        tokens = torch.cat(
            [
                self.cells(cells.reshape(*x.shape[:2], -1, 2 * self.group)),
                self.treatment(t[..., None])[:, :, None],
                self.outcome(y, t.shape[1] - y.shape[1])[:, :, None],
            ],
            dim=2,
        )
        exists = columns.reshape(len(columns), -1, self.group).any(-1)
        return tokens.transpose(1, 2), F.pad(exists, (0, 2), value=True)


class OutcomeEmbedding(nn.Module):
    """`dopfn_jax.model.embedding.OutcomeEmbedding`, for context rows and the queries after them."""

    def __init__(self, width: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(Outcome.FEATURES - 1))
        self.project = nn.Linear(Outcome.FEATURES, width)
        self.unknown = nn.Parameter(torch.zeros(width))

    def forward(self, y: Tensor, queries: int) -> Tensor:
        """(B, N) outcomes of the context -> (B, R, D)."""
        steps = torch.tanh(2 * (y[..., None] - self.shift))
        known = self.project(torch.cat([y[..., None], steps], dim=-1))
        return torch.cat([known, self.unknown.expand(len(y), queries, -1)], dim=1)


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, bias=False)


def _gelu(values: Tensor) -> Tensor:
    return F.gelu(values, approximate="tanh")


def _compress(z: Tensor) -> Tensor:
    excess = (z.abs() - LINEAR_RANGE).clamp(min=0)
    return z.clamp(-LINEAR_RANGE, LINEAR_RANGE) + z.sign() * excess.log1p()


def _moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked mean and standard deviation over axis 1; a scale of 1 where nothing varies."""
    count = mask.sum(1, keepdim=True)
    mean = (values * mask).sum(1, keepdim=True) / count
    centred = (values - mean) * mask
    scale = (centred**2).sum(1, keepdim=True).div(count).sqrt()
    largest = (values * mask).abs().amax(1, keepdim=True)
    return mean, torch.where(scale > 1e-6 * largest, scale, 1.0)


def _bias(mask: Tensor) -> Tensor:
    """0 where a token exists, else minus infinity."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)


def _translate(weights: Mapping[str, NDArray]) -> dict[str, Tensor]:
    """Our weights under PyTorch's names; stacked layers become a module each."""
    translated = {}
    for path, array in weights.items():
        *modules, last = path.split(".")
        name = "weight" if last in ("kernel", "scale") else last
        for number, part in enumerate(array) if modules[:1] == ["layers"] else [(None, array)]:
            places = modules if number is None else ["layers", str(number), *modules[1:]]
            tensor = torch.from_numpy(np.array(part.T if last == "kernel" else part))
            translated[".".join([*places, name])] = tensor
    return translated
