"""The trainer: ``python -m fastjac.train``. It needs the ``train`` extra."""
