"""Existing FrEIA and anomalib models on this package's operations; one call converts, one call restores."""

from usf_kernels.integrations.replacement import Replacement, replace_blocks, restore_blocks

__all__ = ["Replacement", "replace_blocks", "restore_blocks"]
