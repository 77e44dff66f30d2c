"""What `import quant_core` offers."""

from __future__ import annotations

import quant_core


def test_a_shell_completes_the_public_names_and_each_is_there():
    public = [name for names in quant_core.PUBLIC.values() for name in names]

    assert set(public) <= set(dir(quant_core))
    assert all(getattr(quant_core, name).__name__ == name for name in public)
