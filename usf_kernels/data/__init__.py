"""Images to train and test on: embedded textures with rendered defects, and folders in MVTec layout."""

from usf_kernels.data.defects import DEFECTS, render_defect
from usf_kernels.data.folder import FolderDataset, ImageFiles, open_image, read_image, resize_image
from usf_kernels.data.sample import Sample
from usf_kernels.data.textures import TEXTURES, TextureDataset, texture

__all__ = [
    "DEFECTS",
    "TEXTURES",
    "FolderDataset",
    "ImageFiles",
    "Sample",
    "TextureDataset",
    "open_image",
    "read_image",
    "render_defect",
    "resize_image",
    "texture",
]
