"""Convolutional networks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.registry import entry


def _settle(model: nn.Module) -> nn.Module:
    """Running statistics that are not the ones a fresh batch norm has."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model


@entry("conv")
def cnn():
    """Convolution, max-pooling, linear."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return model, torch.randn(2, 1, 8, 8)


@entry("conv")
def cnn_1d():
    """One dimension, stride and dilation."""
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2), nn.GELU(), nn.Conv1d(4, 3, 2, dilation=2), nn.AdaptiveAvgPool1d(2), nn.Flatten()
    )
    return model, torch.randn(3, 2, 13)


@entry("conv")
def cnn_3d():
    """Three dimensions."""
    model = nn.Sequential(nn.Conv3d(1, 2, 2), nn.SiLU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(2, 2))
    return model, torch.randn(2, 1, 3, 3, 3)


@entry("conv")
def cnn_transposed():
    """Transposed convolutions with output padding, in one and two dimensions."""
    model = nn.Sequential(
        nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), nn.Tanh(),
        nn.ConvTranspose2d(3, 1, 2, bias=False), nn.Flatten(2), nn.ConvTranspose1d(1, 1, 2, stride=2, dilation=2),
    )  # fmt: skip
    return model, torch.randn(2, 2, 2, 2)


@entry("conv")
def cnn_grouped():
    """Grouped and depthwise convolutions."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.SiLU(), nn.Conv2d(4, 6, 1, groups=2), nn.Tanh(),
        nn.ConvTranspose2d(6, 3, 2, groups=3), nn.Flatten(), nn.Linear(48, 2),
    )  # fmt: skip
    return model, torch.randn(2, 4, 3, 3)


@entry("conv")
def cnn_padding_modes():
    """Circular, reflected and replicated borders."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Tanh(),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Tanh(),
        nn.Conv2d(2, 1, 3, padding="same", padding_mode="replicate"),
    )  # fmt: skip
    return model, torch.randn(2, 1, 4, 4)


@entry("conv")
def cnn_groupnorm():
    """Group and instance norm, with parameters and without."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 2, 2),
        nn.InstanceNorm2d(2), nn.Flatten(), nn.Linear(18, 2),
    )  # fmt: skip
    return model, torch.randn(2, 1, 6, 6)


class _Block(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
            nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b),
        )  # fmt: skip
        self.skip = (
            nn.Identity()
            if stride == 1 and a == b
            else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        )

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x), inplace=True)


@entry("conv")
def resnet():
    """Basic blocks with batch norm in eval mode and in-place activations."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
        _Block(3, 3, 1), _Block(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    with torch.no_grad():
        return _settle(model), torch.randn(2, 2, 6, 6)


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x):
        a = F.silu(self.down1(x))
        b = F.silu(self.down2(F.avg_pool2d(a, 2)))
        up = self.up(b) + F.interpolate(b[:, :3], scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.out(torch.cat([a, up], dim=1))


@entry("conv")
def unet():
    """Down, up, and a skip by concatenation."""
    return _UNet(), torch.randn(2, 1, 4, 4)


@entry("conv")
def vae_decoder():
    """From a latent vector to an image."""
    model = nn.Sequential(
        nn.Linear(3, 8), nn.ELU(), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1),
        nn.ELU(), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3, padding=1), nn.Sigmoid(),
    )  # fmt: skip
    return model, torch.randn(2, 3)


class _WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(2, 4, 2, dilation=2**i) for i in range(3))
        self.mix = nn.ModuleList(nn.Conv1d(2, 2, 1) for _ in range(3))

    def forward(self, x):
        total = torch.zeros_like(x)
        for layer, mix in zip(self.layers, self.mix, strict=True):
            a, b = layer(F.pad(x, (layer.dilation[0], 0))).chunk(2, dim=1)
            h = mix(torch.tanh(a) * torch.sigmoid(b))
            x, total = x + h, total + h
        return total


@entry("conv")
def wavenet():
    """Causal dilated convolutions with gates and skips."""
    return _WaveNet(), torch.randn(2, 2, 6)


@entry("conv")
def super_resolution():
    """Pixel shuffle."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.PixelShuffle(2))
    return model, torch.randn(2, 1, 3, 3)


class _SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Linear(16, 6)
        self.start = nn.Buffer(torch.tensor([0.9, 0.1, 0.0, -0.1, 0.8, 0.0]))

    def forward(self, x):
        theta = self.start + 0.1 * torch.tanh(self.where(x.flatten(1)))
        grid = F.affine_grid(theta.unflatten(1, (2, 3)), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


# No forward mode for grid_sample in torch.
@entry("conv", defeats=("forward",))
def spatial_transformer():
    """The image decides where it is sampled."""
    return _SpatialTransformer(), torch.randn(2, 1, 4, 4)


class _SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(2, 4, 3), nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x):
        h = F.hardswish(self.conv(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(h.mean(dim=(2, 3))))))
        return (h * gate[:, :, None, None]).amax(dim=(2, 3))


@entry("conv")
def squeeze_excite():
    """Channel gates from a pooled summary, and a global maximum."""
    return _SqueezeExcite(), torch.randn(2, 2, 5, 5)


@entry("conv")
def cnn_channels_last():
    """Channels-last memory."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2)).to(memory_format=torch.channels_last)
    return model, torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
