"""Files of weights as others save them: torchvision's, timm's, a state dict of one's own. Nothing is unpickled but
tensors (torch.load with weights_only=True), or safetensors, which holds nothing else.
"""

import argparse
import io
import re

import safetensors
import safetensors.torch
import torch

# Of training scripts (torchvision's references, timm, Lightning); the average before what it is the average of.
_WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # in what torch says of a pickled object
_ADDED = ("module.", "_orig_mod.")  # by DistributedDataParallel and averages of weights; by torch.compile


def state_dict(content: bytes, path: str) -> dict[str, torch.Tensor]:
    """{name: tensor} on the CPU, without what trainers wrap around it. path: for messages.

    ValueError: not a file of weights, damaged, or one that holds more than tensors.
    """
    found = _read(content, path)
    while isinstance(found, dict) and (name := next((n for n in _WRAPPERS if isinstance(found.get(n), dict)), None)):
        found = found[name]
    if not isinstance(found, dict) or not any(isinstance(value, torch.Tensor) for value in found.values()):
        held = ", ".join(map(str, list(found)[:5])) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path} holds no weights by their names ({held}): save model.state_dict()")
    state = {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
    state.pop("n_averaged", None)
    while state and (added := next((p for p in _ADDED if all(key.startswith(p) for key in state)), None)):
        state = {key.removeprefix(added): value for key, value in state.items()}
    return {key.replace("._orig_mod.", "."): value for key, value in state.items()}


def _read(content: bytes, path: str):
    if content[8:9] == b"{":
        try:
            return safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors ({error})") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # torchvision's and timm's options: mere values
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # on what is no such file torch raises whatever its reading runs into
        if held := _GLOBAL.search(str(error)):
            why = f"{path} holds more than tensors ({held[1]}), and nothing else is unpickled"
            raise ValueError(f"{why}: save model.state_dict(), or safetensors") from None
        raise ValueError(f"{path} is damaged, or no file of weights ({type(error).__name__})") from None
