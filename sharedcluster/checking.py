"""The application, loaded once in a process that is thrown away, before the first worker is forked.

So what is wrong with it is said once, and by nobody else; and the primary, which must not import it, knows what it
needs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

from sharedcluster.config import Config
from sharedcluster.errors import AppLoadError, ConfigError, RedisNeededError, UserError
from sharedcluster.hooks import Hooks


def check_application(config: Config, redis_url: str) -> dict[str, Any]:
    """Load the application in a throw-away child, so that what is wrong with it is said once, and by nobody else.

    Returns:
        `found` (where), `shares_state` (whether it uses the extension), `warnings` (about Redis).

    Raises:
        AppLoadError: With the application's own traceback if it raised.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _check_in_child(config, redis_url, write)
    os.close(write)
    with open(read, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not answer:
        code = os.waitstatus_to_exitcode(status)
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise AppLoadError(f"Loading {config.app} did not come to an end: the process {ended}.")
    facts: dict[str, Any] = json.loads(answer)
    if "user_error" in facts:
        raise ConfigError(facts["user_error"], fact=facts["fact"], advice=tuple(facts["advice"]))
    if "redis_error" in facts:
        raise RedisNeededError(facts["redis_error"], fact=facts["fact"], advice=tuple(facts["advice"]))
    if "what" in facts:
        raise AppLoadError(
            facts["what"], fact=facts["fact"], advice=tuple(facts["advice"]), traceback=facts["traceback"]
        )
    return facts


def _check_in_child(config: Config, redis_url: str, write: int) -> None:
    answer: dict[str, Any] = {}
    try:
        if redis_url:
            os.environ["SHAREDCLUSTER_REDIS_URL"] = redis_url
        from gevent import monkey

        monkey.patch_all()  # as in a real worker, before the application can import anything
        from sharedcluster.cluster.loading import load

        if config.certfile:
            from sharedcluster.http.tls import make_context

            make_context(config.certfile, config.keyfile or None)
        Hooks.load(config.hooks)
        loaded = load(config.app)
        answer = {"found": loaded.found, "shares_state": loaded.extension is not None, "warnings": []}
        if loaded.extension is not None and redis_url:
            answer["warnings"] = loaded.extension.check()
    except AppLoadError as error:
        answer = {"what": error.what, "fact": error.fact, "advice": error.advice, "traceback": error.traceback}
    except UserError as error:
        kind = "redis_error" if isinstance(error, RedisNeededError) else "user_error"
        answer = {kind: error.what, "fact": error.fact, "advice": error.advice}
    except SystemExit as stop:
        answer = {
            "what": f"Loading {config.app} called sys.exit({stop.code!r}).",
            "fact": "",
            "advice": (),
            "traceback": "",
        }
    except BaseException:
        answer = {
            "what": f"Loading {config.app} failed.",
            "fact": "",
            "advice": (),
            "traceback": traceback.format_exc(),
        }
    finally:
        data = json.dumps(answer).encode()
        while data:
            data = data[os.write(write, data) :]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
