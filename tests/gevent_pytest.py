"""Run pytest in a patched process: `python tests/gevent_pytest.py tests/state`.

A conftest would be too late: pytest itself has imported threading and socket by then.
"""

from gevent import monkey

monkey.patch_all()

import sys  # noqa: E402 - nothing may be imported before the patch

import pytest  # noqa: E402

sys.exit(pytest.main([*sys.argv[1:], "-p", "no:cacheprovider"]))
