"""DeltaProduct (Siems et al. 2025): the token mixer, the language model, group word problems."""

from .config import DeltaProductConfig
from .layer import DeltaProduct, LayerCache
from .model import DeltaProductLM, empty_cache

__all__ = ["DeltaProduct", "DeltaProductConfig", "DeltaProductLM", "LayerCache", "empty_cache"]
