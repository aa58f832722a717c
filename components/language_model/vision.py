"""Images as a model sees them: encoded bytes -> pixel values, and how one image's sequence of states is laid out.

Pixels are made by transformers' PIL processors whatever else is installed: torchvision's resize differs from PIL's, and
the same dataset must not depend on the machine that makes it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from components.corpus.images import ImageLayout
from components.settings import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_TRIALS = ((64, 48), (40, 80))  # widths and heights of the images that show whether every image becomes the same length


def load_processor(location: str, commit: str | None, name: str, trust_remote_code: bool, text: bool) -> Any:
    """The model's processor of images, or of images and text; a UserError where it has none."""
    import transformers

    loader = transformers.AutoProcessor if text else transformers.AutoImageProcessor
    try:
        processor = loader.from_pretrained(location, revision=commit, backend="pil", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"language_model.name: '{name}' has no usable image processor: {reason}") from error
    if text and not hasattr(processor, "image_processor"):
        raise UserError(f"language_model.name: '{name}' has no processor_config.json for images and text together")
    return processor


def decoded(encoded: bytes) -> Image:
    """The image in RGB; every channel and frame beyond that is dropped."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert("RGB")


def pixel_values(image_processor: Any, images: Sequence[bytes]) -> Tensor:
    """Encoded images -> `[n, channels, height, width]`."""
    made = image_processor(images=[decoded(image) for image in images], return_tensors="pt")
    return torch.as_tensor(made["pixel_values"])


def trial_images() -> list[Image]:
    from PIL import Image

    return [Image.new("RGB", size, (90, 120, 150)) for size in _TRIALS]


def trial_pixels(image_processor: Any, name: str, accepted: Container[str]) -> Tensor:
    """`[1, channels, height, width]` as every image becomes; a UserError for a processor whose sizes vary.

    accepted: what the model's forward takes. A processor may make more than that, but no more of that than pixels.
    """
    made = [image_processor(images=[image], return_tensors="pt") for image in trial_images()]
    shapes = {tuple(trial["pixel_values"].shape) for trial in made}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4 or any(key in accepted for key in made[0] if key != "pixel_values"):
        raise UserError(
            f"language_model.name: '{name}' turns images of different sizes into different numbers of patches; "
            "accepted are models with one fixed image size"
        )
    return torch.as_tensor(made[0]["pixel_values"])


def vision_layout(identity: str, length: int, pixels: Tensor, patch: int, name: str) -> ImageLayout:
    """The layout of a vision transformer's sequence: what stands before the patches (CLS, registers) is not counted."""
    patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    if patches > length:
        raise UserError(f"language_model.name: '{name}' gives {length} states for {patches} patches, which is not understood")
    before = length - patches
    return ImageLayout(
        identity=identity,
        tokens=(-1,) * length,
        counted=tuple(position >= before for position in range(length)),
        positions=tuple(max(position - before, 0) for position in range(length)),
        places=tuple(range(before, length)),
        grid=(pixels.shape[-2] // patch, pixels.shape[-1] // patch),
    )


def prompt_layout(identity: str, processor: Any, prompt: str, config: Any, name: str, accepted: Container[str]) -> ImageLayout:
    """The layout of a prompt with one image in it. What stands before the image is the same for every image and is not
    counted; positions are those of the tokens in the whole sequence. config: the model's."""
    image_token = config.image_token_id
    made = []
    for image in trial_images():
        try:
            made.append(processor(text=[prompt], images=[image], return_tensors="np"))
        except (ValueError, IndexError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"corpus.prompt: the processor of '{name}' does not take '{prompt}' with an image: {reason}"
            ) from error
    rows = [trial["input_ids"][0] for trial in made]
    if not (rows[0] == image_token).any():
        token = getattr(processor, "image_token", "<image>")
        raise UserError(f"corpus.prompt: '{prompt}' has no place for the image; write '{token}' once where it stands")
    others = set(made[0]) - {"input_ids", "attention_mask", "pixel_values", "token_type_ids"}
    shapes = {trial["pixel_values"].shape for trial in made}
    same = len(rows[0]) == len(rows[1]) and (rows[0] == rows[1]).all() and len(shapes) == 1 and len(shapes.pop()) == 4
    if not same or any(key in accepted for key in others):
        raise UserError(
            f"language_model.name: '{name}' turns images of different sizes into different numbers of tokens; "
            "accepted are models with one fixed image size"
        )
    tokens = tuple(rows[0].tolist())
    first, positions = tokens.index(image_token), tuple(range(len(tokens)))
    counted = tuple(position >= first for position in positions)
    places = tuple(position for position in positions if tokens[position] == image_token)
    height, width = made[0]["pixel_values"].shape[-2:]
    return ImageLayout(
        identity=identity,
        tokens=tokens,
        counted=counted,
        positions=positions,
        places=places,
        grid=_token_grid(config, len(places), height, width),
    )


def _token_grid(config: Any, tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of an image's tokens on the picture: its patches, or equal squares of them (Gemma 3 takes their means).
    None where they are neither, such as the latents of a resampler."""
    patch = getattr(config.vision_config, "patch_size", None)
    if not isinstance(patch, int):
        return None
    rows, columns = height // patch, width // patch
    side = 1
    if getattr(config, "mm_tokens_per_image", None) == tokens:
        side = math.isqrt(rows * columns // tokens)
    return (rows // side, columns // side) if rows // side * (columns // side) == tokens else None


def as_seen(image_processor: Any, images: Sequence[bytes]) -> list[Image]:
    """The part of each picture that the model sees, in its size: pixel values turned back into colours."""
    from PIL import Image

    values = pixel_values(image_processor, images).double()
    if getattr(image_processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(image_processor, name)).double() for name in ("image_mean", "image_std"))
        values = values * std[:, None, None] + mean[:, None, None]
    if getattr(image_processor, "do_rescale", False):
        values = values / image_processor.rescale_factor
    colours = values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(colour.numpy()) for colour in colours]
