"""Published checkpoints: their tensors to our modules and parameters, and back.

    tensors = safetensors.numpy.load_file("model.safetensors")
    module, params = from_torch("fla_delta_product", tensors, config)
    logits, cache = module.apply({"params": params}, ids)

Files are not read or fetched here, and nothing of torch is imported; the command that converts
files is ``python -m scanax.models.interop``.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import numpy as np

from .. import layout
from ..delta_product import DeltaProductConfig, DeltaProductLM, interop as delta_product
from ..lightnet import LightNetLM, LightNetLMConfig, interop as lightnet
from ..limits import DTYPES
from ..radd import RADD, RADDConfig, interop as radd
from ..rmoe import RMoEConfig, RMoELM, RMoESeqConfig, RMoESeqLM, interop as rmoe
from ..unet import (
    DhariwalUNetConfig,
    EDMUNet,
    NCSNpp,
    NCSNppConfig,
    SongUNetConfig,
    interop as unet,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family of checkpoints needs.

    Attributes:
      config: (published config, dtype) -> our config.
      config_class: of our config.
      table: (our config) -> checkpoint name -> ``Leaf``.
      module: (our config) -> module.
      public_config: (our config) -> published config, the inverse of ``config``.
      family: the name under which configs know these models.
      read, write: (tensors, published config) -> the same under the names of ``table``, and back;
        None where these are the checkpoint's own.
    """

    config: Callable[[Mapping[str, Any], str], Any]
    config_class: type
    table: Callable[[Any], Mapping[str, layout.Leaf]]
    module: Callable[[Any], nn.Module]
    public_config: Callable[[Any], dict[str, Any]]
    family: str
    read: Callable[..., tuple[Mapping[str, Any], Mapping[str, Any]]] | None = None
    write: Callable[..., tuple[Mapping[str, Any], Mapping[str, Any]]] | None = None


_DELTA_PRODUCT = Family(
    delta_product.config_from_fla,
    DeltaProductConfig,
    delta_product.model_table,
    DeltaProductLM,
    delta_product.config_to_fla,
    "delta_product",
)
FAMILIES = {
    "fla_delta_product": _DELTA_PRODUCT,
    "official_delta_product": dataclasses.replace(
        _DELTA_PRODUCT, read=delta_product.join_steps, write=delta_product.split_steps
    ),
    "fla_lightnet": Family(
        lightnet.config_from_fla,
        LightNetLMConfig,
        lightnet.model_table,
        LightNetLM,
        lightnet.config_to_fla,
        "lightnet",
    ),
    "rmoe_llama": Family(
        rmoe.llama_config, RMoEConfig, rmoe.llama_table, RMoELM, rmoe.llama_public, "rmoe"
    ),
    "rmoe_seq": Family(
        rmoe.seq_config, RMoESeqConfig, rmoe.seq_table, RMoESeqLM, rmoe.seq_public, "rmoe_seq"
    ),
    "radd": Family(
        radd.config_from_radd,
        RADDConfig,
        radd.model_table,
        RADD,
        radd.config_to_radd,
        "radd",
        radd.read,
        radd.write,
    ),
    "ncsnpp": Family(
        unet.ncsnpp_config,
        NCSNppConfig,
        unet.ncsnpp_table,
        NCSNpp,
        unet.ncsnpp_public,
        "ncsnpp",
        unet.ncsnpp_read,
        unet.ncsnpp_write,
    ),
    "edm_songunet": Family(
        unet.song_config,
        SongUNetConfig,
        unet.edm_table,
        EDMUNet,
        unet.song_public,
        "edm_songunet",
        unet.edm_read,
        unet.edm_write,
    ),
    "edm_dhariwal": Family(
        unet.dhariwal_config,
        DhariwalUNetConfig,
        unet.edm_table,
        EDMUNet,
        unet.dhariwal_public,
        "edm_dhariwal",
        unet.edm_read,
        unet.edm_write,
    ),
}


def from_torch(
    family: str, tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[nn.Module, Any]:
    """A module and its parameters from a published checkpoint.

    Args:
      family: a name of ``FAMILIES``.
      tensors: numpy arrays by checkpoint name.
      config: the published configuration; keys it leaves out have the published defaults.

    Returns:
      The module, which computes in the dtype of the checkpoint's largest tensor, and the
      parameters, each in the dtype of its tensor.

    Raises:
      ValueError: if the family is unknown, the configuration is not supported, or a tensor is
        missing, left over or of the wrong shape; the message names it.
    """
    entry = find(family)
    if entry.read is not None:
        tensors, config = entry.read(tensors, config)
    ours = entry.config(config, _compute_dtype(tensors))
    return entry.module(ours), layout.load(entry.table(ours), tensors)


def to_torch(family: str, params: Any, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of :func:`from_torch`: contiguous arrays by checkpoint name, bitwise equal.

    ``params`` may be any tree of the same form: gradients, or an average of parameters.

    Raises:
      ValueError: as :func:`from_torch`, about parameters instead of tensors.
    """
    entry, public = find(family), config
    if entry.read is not None:
        _, config = entry.read({}, config)
    tensors = layout.dump(entry.table(entry.config(config, DTYPES[0])), params)
    return dict(entry.write(tensors, public)[0]) if entry.write is not None else tensors


def find(name: str) -> Family:
    """The family of a name; a ValueError that lists them if there is none."""
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _compute_dtype(tensors: Mapping[str, Any]) -> str:
    """The dtype of the largest tensor; small ones (decay rates) may be wider."""
    if not tensors:
        raise ValueError("the checkpoint has no tensors")
    name, largest = max(tensors.items(), key=lambda item: np.size(item[1]))
    dtype = str(np.asarray(largest).dtype)
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} is {dtype}; supported are {', '.join(DTYPES)}")
    return dtype
