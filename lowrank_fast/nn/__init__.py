"""Drop-in modules for codebases without PEFT or transformers.

ResidualAdapter   out = y + s * dropout(x) A^T B^T            beside a whole transformer block (LoR2C), or a linear
layer (LoRA)
RoutedLinear      out = linear(x) + s * sum_e w_e x A^T B_e^T  Lily, EffiLoRA, HydraLoRA on one linear layer
Down, Up, Bank    the tensors they share: pass the same object to several modules
shared_state_dict, load_shared_state_dict, save_shared, load_shared    each shared tensor once, on disk too
"""

from .residual import ResidualAdapter
from .routed import RoutedLinear
from .shared_input import SharedInput
from .state import load_shared, load_shared_state_dict, save_shared, shared_state_dict
from .weights import Bank, Down, Up

__all__ = [
    "Bank",
    "Down",
    "ResidualAdapter",
    "RoutedLinear",
    "SharedInput",
    "Up",
    "load_shared",
    "load_shared_state_dict",
    "save_shared",
    "shared_state_dict",
]
