"""Finding and loading the application, in a process that may be thrown away: a worker, or the check before the first.

Flask's own discovery is used (`flask.cli`), so what works with `flask run` works here: a package, `mod:attr`,
`mod:factory("x")`, a file name. Any other WSGI callable is taken too when it is named, or is called `application`
or `app`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol

from flask import Flask
from flask.cli import NoAppException, locate_app, prepare_import

from sharedcluster.errors import AppLoadError
from sharedcluster.flask_shortcuts import take_shortcuts

WSGIApplication = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Extension(Protocol):
    """What the Flask extension leaves in `app.extensions["sharedcluster"]`, as far as it concerns a worker."""

    needs_secret_key: Callable[[], bool]

    @property
    def state(self) -> object:
        """This process's shared state; it is made, and begins to listen for messages, when it is first asked for."""

    def check(self) -> list[str]:
        """Ask Redis whether it will do: warnings; raises `RedisNeededError` or `ConfigError`."""


@dataclass(frozen=True, slots=True)
class LoadedApp:
    """An application that is ready to be called.

    `found` says where it was found, for the start-up lines; `secret` is a fingerprint of its SECRET_KEY, "" if it has
    none or is no Flask application.
    """

    application: WSGIApplication
    found: str
    secret: str
    extension: Extension | None


def load(target: str) -> LoadedApp:
    """Import the application.

    Args:
        target: `pkg`, `mod:attr`, `mod:factory("x")`, `file.py`; "" looks for wsgi.py and app.py as Flask does.

    Raises:
        AppLoadError: With what is wrong and what to type; `traceback` is the application's own, if it raised.
    """
    path, name = _split(target)
    try:
        module_name = prepare_import(path)
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        application = locate_app(module_name, name)
    except NoAppException as error:
        application = _other_wsgi(path, name, error)
    except Exception as error:
        raise _raised(target, error) from error
    _refuse_asgi(target, application)
    return _loaded(path, application)


def _split(target: str) -> tuple[str, str | None]:
    if target:
        path, _, name = re.sub(r":(?![\\/])", "\0", target, count=1).partition("\0")
        return path, name or None
    for candidate in ("wsgi.py", "app.py"):
        if Path(candidate).exists():
            return candidate, None
    raise AppLoadError(
        "No application was named, and there is no wsgi.py or app.py here.",
        advice=("Name one: sharedcluster run MODULE:APP", "Or see it work: sharedcluster run demo_app"),
    )


def _loaded(path: str, application: Any) -> LoadedApp:
    extension: Extension | None = (
        application.extensions.get("sharedcluster") if isinstance(application, Flask) else None
    )
    secret = getattr(application, "secret_key", None) if isinstance(application, Flask) else None
    if extension is not None and extension.needs_secret_key():
        raise AppLoadError(
            "SECRET_KEY is not set, and the session cookie is signed with it.",
            advice=(
                'Make one: python -c "import secrets; print(secrets.token_hex(32))"',
                "Then set it: app.config['SECRET_KEY'] = os.environ['SECRET_KEY']",
            ),
        )
    if isinstance(application, Flask):
        take_shortcuts(application)
    name = getattr(application, "name", None) or type(application).__name__
    return LoadedApp(application, f'found "{name}" in {path}', fingerprint(secret), extension)


def fingerprint(secret: str | bytes | None) -> str:
    """Eight hex digits to compare secrets by, "" for none; they say nothing useful about the secret itself."""
    if not secret:
        return ""
    data = secret.encode() if isinstance(secret, str) else secret
    return hashlib.sha256(b"sharedcluster fingerprint\0" + data).hexdigest()[:8]


# -- what Flask's discovery does not take ------------------------------------------------------------------------


def _other_wsgi(path: str, name: str | None, error: NoAppException) -> Any:
    """A WSGI callable that is no Flask application, or the right words for what is wrong."""
    module_name = prepare_import(path)
    module = sys.modules.get(module_name)
    if module is None:
        raise _not_imported(path, module_name, error) from error
    if name is not None:
        return _named(module, name, error)
    for candidate in ("application", "app"):
        found = getattr(module, candidate, None)
        if callable(found):
            return found
    raise AppLoadError(_first_line(error), advice=f"Name it: sharedcluster run {path}:NAME") from error


def _named(module: ModuleType, name: str, error: NoAppException) -> Any:
    match = re.fullmatch(r"([A-Za-z_]\w*)(\(\s*\))?", name)
    if match is None:
        raise AppLoadError(_first_line(error)) from error
    found = getattr(module, match[1], None)
    if found is None:
        apps = [key for key, value in vars(module).items() if isinstance(value, Flask)]
        there = f"Flask apps found there: {', '.join(apps)}." if apps else "No Flask app was found there."
        advice = f"Use {module.__name__}:{apps[0]}" if apps else f"Use {module.__name__}:NAME"
        raise AppLoadError(f'"{module.__name__}" has no "{match[1]}".', fact=there, advice=advice) from error
    if not callable(found) or inspect.isclass(found):
        raise AppLoadError(f'"{module.__name__}:{name}" is a {type(found).__name__}, not an application.') from error
    return found() if match[2] else found


_ASGI: Final = ("fastapi.", "starlette.", "quart.", "litestar.", "django.core.handlers.asgi")


def _refuse_asgi(target: str, application: Any) -> None:
    call = getattr(application, "__call__", None)  # noqa: B004 - the method itself is inspected
    kind = f"{type(application).__module__}.{type(application).__name__}"
    if kind.startswith(_ASGI) or inspect.iscoroutinefunction(application) or inspect.iscoroutinefunction(call):
        raise AppLoadError(
            f"{target} is a {type(application).__name__} application (ASGI).",
            advice="sharedcluster serves WSGI; for ASGI use uvicorn.",
        )


def _not_imported(path: str, module_name: str, error: NoAppException) -> AppLoadError:
    """The module is missing, or (Flask's words) importing it raised an ImportError of its own."""
    if "ImportError was raised" in str(error):
        cause = error.__cause__ or error.__context__
        own = _trim(cause) if cause is not None else _after_first_line(error)
        return AppLoadError(f'Importing "{module_name}" raised an ImportError.', traceback=own)
    close = difflib.get_close_matches(path, _modules_here(), n=1)
    suggestion = f' Did you mean "{close[0]}"?' if close else ""
    return AppLoadError(
        f'No module named "{path}" (looked in {Path.cwd()} and sys.path).{suggestion}',
        advice="Name it as Python imports it: package.module:app",
    )


def _modules_here() -> list[str]:
    files = [file.stem for file in Path().glob("*.py")]
    packages = [folder.parent.name for folder in Path().glob("*/__init__.py")]
    installed = ["demo_app"] if importlib.util.find_spec("demo_app") else []
    return [*files, *packages, *installed]


def _raised(target: str, error: Exception) -> AppLoadError:
    if isinstance(error, AppLoadError):
        return error
    return AppLoadError(
        f"Loading {target or 'the application'} raised {type(error).__name__}.", traceback=_trim(error)
    )


def _first_line(error: NoAppException) -> str:
    return str(error).strip().splitlines()[0]


def _after_first_line(error: NoAppException) -> str:
    return "\n".join(str(error).strip().splitlines()[1:]).strip()


_NOT_THEIRS: Final = (f"{Path(__file__).parent.parent}/", "/flask/cli.py", "<frozen importlib", "/importlib/")


def _trim(error: BaseException) -> str:
    """The traceback without our frames and the import machinery's: what is left is the application's own."""
    text = traceback.TracebackException.from_exception(error)
    for part in _chain(text):
        kept = [frame for frame in part.stack if not any(mark in frame.filename for mark in _NOT_THEIRS)]
        part.stack = traceback.StackSummary.from_list(kept)
    return "".join(text.format()).rstrip()


def _chain(part: traceback.TracebackException | None) -> Iterable[traceback.TracebackException]:
    while part is not None:
        yield part
        part = part.__cause__ or part.__context__
