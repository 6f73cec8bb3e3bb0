"""Where models lie and how they come: models_dir, the Hugging Face cache, and the Hub."""

from helexa.neuron.store.disk import GGUF, SAFETENSORS, StoredModel
from helexa.neuron.store.store import Pulled, Store

__all__ = ["GGUF", "SAFETENSORS", "Pulled", "Store", "StoredModel"]
