"""The hook into PEFT.

:mod:`.patch` replaces what :mod:`.hooks` lists. PEFT then injects adapters (``injection``), whose layers are
initialized (``layers``) and compute with residuals (``weights``). ``saving`` and ``guards`` come after:
files, and operations on the model.
"""
