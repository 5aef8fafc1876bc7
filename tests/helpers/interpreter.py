"""Triton's interpreter, without what it does again and again."""

import os


def patch_the_language_once() -> None:
    """Make calls of jit functions by jit functions leave the language as the launch has patched it. Triton 3.9 patches
    it again in each of them, which takes a quarter of the time of our kernels."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.language import core
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang

    def unless_patched(fn):
        languages = [x for x in fn.__globals__.values() if x is core or x is interpreter.tl]
        if any(core.is_builtin(language.load) for language in languages):
            return patch(fn)
        return interpreter._LangPatchScope()

    if patch.__name__ != unless_patched.__name__:
        interpreter._patch_lang = unless_patched
