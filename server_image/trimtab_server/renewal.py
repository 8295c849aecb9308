"""What vLLM's workers do for a trainer beside them: read all weights anew. Mixed into their class by vLLM."""

from __future__ import annotations

from typing import Any

EXTENSION = f"{__name__}.Renewal"
"""How vLLM is told of it."""


class Renewal:
    """See the module."""

    def read_anew(self, folder: str) -> None:
        """All weights from a folder of safetensors, in the place of the old ones."""
        worker: Any = self
        worker.reload_weights(weights_path=folder)
        for module in worker.model_runner.model.modules():
            # The CPU build keeps a packed copy of each matrix, and renews those that were read: a head that shares the
            # embeddings' matrix is not.
            if hasattr(module, "cpu_linear") and type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)
