"""What is simulated: models, devices, how a model is spread over them, and what memory that takes."""

from specs.devices import DeviceSpec, Link, get_device, list_devices
from specs.errors import InputError
from specs.memory import MemoryFit, fit_memory
from specs.models import DTYPE_BYTES, ModelSpec, RopeScaling, get_model, list_models
from specs.parallel import ParallelSpec

__all__ = [
    "DTYPE_BYTES",
    "DeviceSpec",
    "InputError",
    "Link",
    "MemoryFit",
    "ModelSpec",
    "ParallelSpec",
    "RopeScaling",
    "fit_memory",
    "get_device",
    "get_model",
    "list_devices",
    "list_models",
]
