"""VQ image tokenizers of LlamaGen (VQ-16, VQ-8, any depth), Janus and Chameleon: taming-transformers' VQGAN.

Parameter names equal the keys of LlamaGen's checkpoints. ``conv_blocks.0`` of the decoder is the lowest resolution.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.families.model_facts import DERIVED, count_of, shape_of

NORM_GROUPS = 32
NORM_EPS = 1e-6

PREFIXES = ("", "gen_vision_model.", "model.vqmodel.")
"""What stands before the keys of a tokenizer by itself, and in both layouts of Janus."""

LANDMARK = "quantize.embedding.weight"
"""The tensor that a tokenizer is known by, behind its prefix."""

ENCODER_PREFIXES = ("encoder.", "quant_conv.")
"""Keys of the half that draws no images."""

IGNORED = (*ENCODER_PREFIXES, "quantize.codebook_used", "loss.")
"""Beginnings of the keys that are left in the file: the encoder's, and what training left."""

MOST_LEVELS = 8
"""Resolutions of a decoder: twice as many as were ever published, and a bound for the image's size."""

MIDDLE = {"mid.block_1.": "mid.0.", "mid.attn_1.": "mid.1.", "mid.block_2.": "mid.2."}
"""Names of the transformers library and Chameleon, and ours."""


@dataclass(frozen=True)
class VQConfig:
    """Shape of a VQ tokenizer.

    ``channels`` are the decoder's, level by level from the lowest resolution to the highest; the image side
    is ``2 ** (levels - 1)`` pixels a token. ``attention``: the levels with attention behind every residual block.
    ``unit_codes``: code vectors are l2-normalised at look-up.
    """

    codebook_size: int
    code_dim: int
    z_channels: int
    channels: tuple[int, ...]
    res_blocks: int = 2
    attention: tuple[int, ...] = (0,)
    unit_codes: bool = True

    def __post_init__(self) -> None:
        uneven = [c for c in self.channels if c % NORM_GROUPS]
        if not self.channels or uneven:
            raise ValueError(f"channels {self.channels} must be multiples of {NORM_GROUPS}")

    @property
    def patch(self) -> int:
        """Pixels along the side of one token."""
        return int(2 ** (len(self.channels) - 1))

    def tensor_shapes(self, *, encoder: bool = False) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor of the decoder (and, if asked, of the encoder)."""
        with torch.device("meta"):
            model = VQModel(self, encoder=encoder)
        return {name: tuple(p.shape) for name, p in model.named_parameters()}


@dataclass(frozen=True)
class Naming:
    """Keys of a checkpoint that draw images, to our names, and the others below the same prefix. ``unit_codes``: as in :class:`VQConfig`."""

    ours: Mapping[str, str]
    unknown: tuple[str, ...]
    unit_codes: bool


def naming(names: Iterable[str]) -> Naming | None:
    """Find an image tokenizer among the keys of a checkpoint; None if there is none.

    Levels are called ``conv_blocks.i`` by LlamaGen and Janus, from the lowest resolution on; ``up.i`` in the same order by the
    transformers library's Janus; and ``up.i`` from the highest on by Chameleon, whose codes are not normalised.
    """
    listed = list(names)
    for prefix in PREFIXES:
        if f"{prefix}{LANDMARK}" in listed and f"{prefix}decoder.conv_in.weight" in listed:
            break
    else:
        return None
    inner = [name.removeprefix(prefix) for name in listed if name.startswith(prefix)]
    levels = {int(match[1]) for name in inner if (match := re.match(r"decoder\.up\.([0-9]{1,4})\.", name))}
    # The highest resolution is the one that is not enlarged any more; a single one is Chameleon's where it stands by itself.
    reverse = bool(levels) and "decoder.up.0.upsample.conv.weight" not in inner
    reverse = reverse and (len(levels) > 1 or not prefix)
    ours, unknown = {}, []
    for name in inner:
        if name.startswith(IGNORED) or DERIVED.fullmatch(name):
            continue
        if not name.startswith(("decoder.", "post_quant_conv.", "quantize.")):
            unknown.append(prefix + name)
            continue
        mine = name
        for theirs, own in MIDDLE.items():
            mine = mine.replace(theirs, own)
        if match := re.fullmatch(r"decoder\.up\.([0-9]{1,4})\.(.+)", mine):
            level = max(levels) - int(match[1]) if reverse else int(match[1])
            mine = f"decoder.conv_blocks.{level}.{match[2].replace('block.', 'res.')}"
        ours[prefix + name] = mine
    return Naming(ours, tuple(unknown), unit_codes=not reverse)


def infer_config(shapes: Mapping[str, tuple[int, ...]], *, unit_codes: bool = True) -> VQConfig:
    """Read the configuration from tensor shapes.

    Args:
        shapes: name to shape, by our names (:func:`naming`).
        unit_codes: as in :class:`VQConfig`; no tensor tells.

    Raises:
        KeyError: a tensor that tells the size is missing; the argument is its name.
        ValueError: the sizes do not fit the architecture.
    """
    codebook_size, code_dim = shape_of(shapes, LANDMARK, 2)
    z_channels = shape_of(shapes, "post_quant_conv.weight", 4)[0]
    levels = range(count_of(shapes, "decoder.conv_blocks"))
    if len(levels) > MOST_LEVELS:
        raise ValueError(
            f"{len(levels)} levels, each of which doubles the image; there are {MOST_LEVELS} at most"
        )
    channels = tuple(
        shape_of(shapes, f"decoder.conv_blocks.{level}.res.0.conv1.weight", 4)[0] for level in levels
    )
    blocks = count_of(shapes, "decoder.conv_blocks.0.res")
    attention = tuple(level for level in levels if f"decoder.conv_blocks.{level}.attn.0.q.weight" in shapes)
    return VQConfig(codebook_size, code_dim, z_channels, channels, blocks - 1, attention, unit_codes)


class GroupNorm(nn.GroupNorm):
    """Group normalisation; in a graph, one normalisation of every group's values and an affine map of channels
    (as a BatchNormalization of mean 0 and variance 1: one pass over the map, where a product and a sum are two).

    ``GroupNormalization`` itself is no operator of ONNX Runtime's but a function of a dozen, which go over the map one
    after the other.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return super().forward(x)
        groups = x.reshape(len(x), NORM_GROUPS, -1)
        scale = torch.ones(NORM_GROUPS, dtype=x.dtype)
        normed = torch.onnx.ops.symbolic(
            "InstanceNormalization",
            (groups, scale, torch.zeros_like(scale)),
            attrs={"epsilon": self.eps},
            dtype=x.dtype,
            shape=groups.shape,
        )
        channels = torch.zeros(len(self.weight), dtype=x.dtype)
        return torch.onnx.ops.symbolic(
            "BatchNormalization",
            (normed.reshape(x.shape), self.weight, self.bias, channels, torch.ones_like(channels)),
            attrs={"epsilon": 0.0},
            dtype=x.dtype,
            shape=x.shape,
        )


def group_norm(channels: int) -> nn.GroupNorm:
    return GroupNorm(channels)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head attention over all positions of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2) for conv in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Upsample(nn.Module):
    """Twice the size by repetition, then a convolution.

    In a graph, and if ``by_phase``, the convolution comes first. Under a repeated pixel, three taps in a row read two
    pixels: each of the four phases of the result is a 2 x 2 convolution of the small map, with the taps that meet added
    up. That is 4/9 of the multiplications.
    """

    by_phase = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.compiler.is_exporting() and self.by_phase):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        height, width = x.shape[2:]
        taps = [self._pairs(rows, 3) for rows in self._pairs(self.conv.weight, 2)]
        kernels = torch.cat([kernel for row in taps for kernel in row])
        # Output i of the 2 x 2 convolution reads pixels i - 1 and i: the second phase is one further.
        phases = F.conv2d(x, kernels, self._bias().repeat(4), padding=1).chunk(4, dim=1)
        shifts = [(0, 0), (0, 1), (1, 0), (1, 1)]
        cut = [part[:, :, a : a + height, b : b + width] for part, (a, b) in zip(phases, shifts, strict=True)]
        return torch.onnx.ops.symbolic(
            "DepthToSpace",
            (torch.cat(cut, dim=1),),
            attrs={"blocksize": 2, "mode": "DCR"},
            dtype=x.dtype,
            shape=(len(x), len(kernels) // 4, 2 * height, 2 * width),
        )

    def _bias(self) -> Tensor:
        if self.conv.bias is None:
            raise TypeError("the convolution has a bias")
        return self.conv.bias

    @staticmethod
    def _pairs(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Two taps along ``axis`` for the first and for the second phase."""
        first, middle, last = weight.unbind(axis)
        return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """One resolution: residual blocks, attention after each where asked, and a change of resolution."""

    def __init__(
        self, c_in: int, c_out: int, blocks: int, *, attention: bool, resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out) for j in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        if isinstance(resample, Upsample):
            self.upsample = resample
        elif isinstance(resample, Downsample):
            self.downsample = resample

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[j](x)
        for name in ("upsample", "downsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        channels = config.channels[::-1]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                channels[max(i - 1, 0)],
                c,
                config.res_blocks,
                attention=last - i in config.attention,
                resample=Downsample(c) if i != last else None,
            )
            for i, c in enumerate(channels)
        )
        top = channels[-1]
        self.mid = nn.ModuleList([ResBlock(top, top), AttnBlock(top), ResBlock(top, top)])
        self.norm_out = group_norm(top)
        self.conv_out = nn.Conv2d(top, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in [*self.conv_blocks, *self.mid]:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        channels = config.channels
        last = len(channels) - 1
        low = channels[0]
        self.conv_in = nn.Conv2d(config.z_channels, low, 3, padding=1)
        self.mid = nn.ModuleList([ResBlock(low, low), AttnBlock(low), ResBlock(low, low)])
        self.conv_blocks = nn.ModuleList(
            Level(
                channels[max(i - 1, 0)],
                c,
                config.res_blocks + 1,
                attention=i in config.attention,
                resample=Upsample(c) if i != last else None,
            )
            for i, c in enumerate(channels)
        )
        self.norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for level in [*self.mid, *self.conv_blocks]:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """Code vectors, l2-normalised at look-up where the configuration says so."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.unit_codes = config.unit_codes
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        codes = self.embedding(tokens)
        return F.normalize(codes, dim=-1) if self.unit_codes else codes


class VQModel(nn.Module):
    """Tokens to pixels and, when built with its encoder, pixels to tokens."""

    def __init__(self, config: VQConfig, *, encoder: bool = False) -> None:
        super().__init__()
        self.config = config
        if encoder:
            self.encoder = Encoder(config)
            self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.quantize = Codebook(config)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def decode(self, tokens: Tensor) -> Tensor:
        """Pixels ``[I, 3, rows * patch, columns * patch]``, about [-1, 1] and not clamped, of tokens ``[I, rows, columns]``."""
        codes = self.quantize(tokens).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(codes))

    def latents(self, pixels: Tensor) -> Tensor:
        """Unit-length latents ``[I, code_dim, rows, columns]`` of ``pixels [I, 3, H, W]``, before quantisation."""
        return F.normalize(self.quant_conv(self.encoder(pixels)), dim=1)

    def nearest(self, latents: Tensor) -> Tensor:
        """Index ``[I, rows, columns]`` of the codebook entry nearest in angle to every latent."""
        codebook = F.normalize(self.quantize.embedding.weight, dim=-1)
        return torch.einsum("nchw,kc->nhwk", latents, codebook).argmax(-1)
