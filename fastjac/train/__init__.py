"""The trainer: ``python -m fastjac.train``. It needs the ``train`` extra.

:func:`load_trained` builds the networks that it has trained; it is imported when it is first read, as it
needs PyTorch, and ``--help`` does not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastjac.train.build import Trained, load_trained

__all__ = ["Trained", "load_trained"]

if not TYPE_CHECKING:  # else every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fastjac.train import build

        return getattr(build, name)
