"""Triton's interpreter without what it does over and over; its results are its own.

For the time of a launch it replaces the functions of triton.language, in the modules of it that a kernel names. At each call of a
device function inside it looks through them again, and finds nothing that is not replaced; for each tensor it makes its table of
dtypes anew; and for each sum of integers it computes whether they overflow, which only its debug mode would say. Together that is
more than a half of its time.
"""

import dataclasses
import functools
from collections.abc import Callable


class Once:
    """`_patch_lang` for each module of the language once a launch."""

    def __init__(self, patch: Callable, scope: type, modules: tuple) -> None:
        self.patch, self.scope = patch, scope
        self.named = functools.cache(lambda fn: {m for m in modules if any(x is m for x in fn.__globals__.values())})
        self.launch, self.patched = None, set()

    def __call__(self, fn):
        more = self.named(fn) - self.patched
        if not more:
            return self.scope()
        scope = self.patch(fn)
        self.patched |= more
        if self.launch is not None:  # in a device function, whose scope nobody ends
            self.launch._changes += scope._changes
            return self.scope()
        self.launch, restore = scope, scope.restore

        def end():
            self.launch, self.patched = None, set()
            restore()

        scope.restore = end
        return scope


def looked_up(of_dtype: Callable, plain: type) -> Callable:
    """NumPy's dtype for one of Triton's: of a block that of its elements, which unless they are pointers can be a key."""
    known = functools.cache(of_dtype)
    return lambda dtype: known(dtype.scalar) if type(dtype.scalar) is plain else of_dtype(dtype)


def quicken() -> None:
    """Leaves an interpreter alone that is made otherwise than Triton 3.7's."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    tl = interpreter.tl
    interpreter._patch_lang = Once(interpreter._patch_lang, interpreter._LangPatchScope, (tl, tl.core))
    interpreter._get_np_dtype = looked_up(interpreter._get_np_dtype, tl.dtype)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
