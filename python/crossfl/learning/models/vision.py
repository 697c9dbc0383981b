"""VGG with group normalisation: an image classifier whose layers hold no statistics of the data.

Simonyan and Zisserman 2015, https://arxiv.org/abs/1409.1556, with the normalisation of Wu and He
2018, https://arxiv.org/abs/1803.08494, in place of batch normalisation, whose running statistics
differ from facility to facility and do not average (Hsieh et al. 2020,
https://arxiv.org/abs/1910.00189).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

SIXTEEN = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""The convolutions of VGG16: output channels, by stage."""


class VGGConfig(PreTrainedConfig):
    """The `config.json` of a VGG; the defaults are VGG16 on images of 32 by 32 in colour.

    Attributes:
        num_channels: channels of an image.
        image_size: its height and width in pixels; each stage halves them.
        stages: output channels of the convolutions, by stage.
        groups: groups of each normalisation; they divide the channels of every convolution.
        hidden_size: width of the two hidden layers of the classifier.
        dropout: share of their values that is dropped in training.
    """

    model_type = "crossfl_vgg"

    num_channels: int = 3
    image_size: int = 32
    stages: Any = SIXTEEN
    groups: int = 32
    hidden_size: int = 512
    dropout: float = 0.0

    def __init__(self, **values: Any) -> None:
        for name in ("num_channels", "image_size", "stages", "groups", "hidden_size", "dropout"):
            setattr(self, name, values.pop(name, getattr(type(self), name)))
        self.stages = [list(stage) for stage in self.stages]
        super().__init__(**values)


class VGGForImageClassification(PreTrainedModel):
    """Convolutions, each normalised, in stages that end in pooling; then three linear layers."""

    config_class = VGGConfig
    base_model_prefix = "vgg"
    main_input_name = "pixel_values"
    _no_split_modules = ["Stage"]  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: VGGConfig) -> None:
        super().__init__(config)
        side, channels = config.image_size >> len(config.stages), config.num_channels
        if side < 1:
            raise ValueError(
                f"image_size {config.image_size} is too small for {len(config.stages)} stages"
            )
        stages = []
        for widths in config.stages:
            stages.append(Stage([channels, *widths], config.groups))
            channels = widths[-1]
        self.stages = nn.Sequential(*stages)
        hidden = config.hidden_size
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * side * side, hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, int(config.num_labels or 0)),
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Logits [images, classes] of images [images, channels, height, width]."""
        return ImageClassifierOutput(logits=self.classifier(self.stages(pixel_values)))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class Stage(nn.Sequential):
    """Convolutions of 3 by 3 from each width to the next, then pooling of 2 by 2."""

    def __init__(self, widths: list[int], groups: int) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(groups, after)]
            layers.append(nn.ReLU())
        super().__init__(*layers, nn.MaxPool2d(2))


def register() -> None:
    """Make `AutoConfig` and `AutoModelForImageClassification` know the VGG of a `config.json`."""
    AutoConfig.register(VGGConfig.model_type, VGGConfig, exist_ok=True)
    AutoModelForImageClassification.register(VGGConfig, VGGForImageClassification, exist_ok=True)
