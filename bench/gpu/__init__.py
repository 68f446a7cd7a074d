"""What a GPU can show, in order of worth, for a card that is rented by the minute.

:mod:`.run` runs the steps of :mod:`.steps`, each in a process of its own (:mod:`.worker`), so that a kernel that
crashes or hangs ends one step. The rows of a step are on disk as soon as they are measured.
"""
