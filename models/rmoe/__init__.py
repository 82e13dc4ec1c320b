"""RMoE: mixture of experts whose router remembers over the layers (Qiu et al. 2024).

router.py     logits from tokens and memory: cells, heads, and the choice of experts
losses.py     load balance, and the size of logits
config.py     every switch of the models
moe.py        router and experts of a layer
mixer.py      the token mixer of a block: attention, DeltaProduct or LightNet
attention.py  rotary attention
llama.py      pre-norm language model: the paper's large ones
seq.py        post-norm language model: the paper's small ones
analysis.py   what routers do: entropy, balance, information between layers
interop.py    published checkpoints
bench.py      what routers cost
"""

from . import losses
from .config import RMoEConfig, RMoESeqConfig
from .llama import RMoELM
from .mixer import Cache, empty_cache, states
from .moe import BALANCE, ROUTING, STATISTICS, settle
from .seq import RMoESeqLM, empty_seq_cache

__all__ = [
    "BALANCE",
    "ROUTING",
    "STATISTICS",
    "Cache",
    "RMoEConfig",
    "RMoELM",
    "RMoESeqConfig",
    "RMoESeqLM",
    "empty_cache",
    "empty_seq_cache",
    "losses",
    "settle",
    "states",
]
